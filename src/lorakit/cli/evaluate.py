"""`lorakit eval`: loss, BLEU and exact match of a run, an adapter or a model on held-out examples."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Annotated

import typer

from lorakit.errors import LorakitError


def evaluate(
    target: Annotated[str, typer.Argument(help="A run, an adapter, or a model.")],
    data: Annotated[str, typer.Option(help="Examples with answers to compare with.")],
    model: Annotated[str | None, typer.Option(help="Put the adapter on this base.")] = None,
    metrics: Annotated[str, typer.Option(help="Any of loss, bleu, exact, with commas.")] = "loss,bleu,exact",
    limit: Annotated[int | None, typer.Option(help="Generate for at most this many prompts.", min=1)] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Length of an answer at most.", min=1)] = 128,
    columns: Annotated[str, typer.Option(help="part=column,… for other column names.")] = "",
    base_too: Annotated[bool, typer.Option("--base/--no-base", help="Score the base alone beside it.")] = True,
    out: Annotated[Path | None, typer.Option(help="Write scores and every answer as JSON.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, mps.")] = "auto",
    precision: Annotated[str, typer.Option(help="auto, fp32, bf16.")] = "auto",
    any_base: Annotated[bool, typer.Option("--any-base", help="Accept an adapter of another base.")] = False,
) -> None:
    """Score a run, an adapter or a model.

    Every answer is compared with all references that the data has for its prompt.
    """
    from rich.table import Table

    from lorakit.base.forward import Scorer
    from lorakit.base.load import context_length
    from lorakit.cli.show import console, counting, heading, note
    from lorakit.cli.target import open_target
    from lorakit.data.dataset import encode, read_examples
    from lorakit.inference.generate import Sampling
    from lorakit.proving.evaluate import check_metrics, prompts_in
    from lorakit.proving.evaluate import evaluate as score
    from lorakit.recipes.schema import parse_columns

    wanted = [m.strip() for m in metrics.split(",") if m.strip()]
    check_metrics(wanted)
    if out is not None and out.is_dir():
        raise LorakitError(f"--out {out} is a folder; name a file")
    examples, form = read_examples(data, columns=parse_columns(columns))
    opened = open_target(target, model, device, precision, any_base)
    rows = encode(examples, form, opened.template, max_length=context_length(opened.model))
    scorer = Scorer(opened.model)
    for text in scorer.layout.notes:
        note(text)
    adapted = hasattr(opened.model, "mounted")
    results = {}
    for label in ("base", "adapter") if adapted and base_too else ("adapter",) if adapted else ("model",):
        choice = opened.model.using(None) if label == "base" else contextlib.nullcontext()
        with choice, counting(f"scoring the {label}", min(limit or 10**9, prompts_in(rows))) as advance:
            results[label] = score(
                opened.model, rows, opened.template, opened.stop, wanted, Sampling(max_new_tokens),
                limit=limit, scorer=scorer, progress=advance,
            )  # fmt: skip
    heading(f"{opened.label} on {data} ({len(rows.rows)} rows)")
    table = Table()
    for column in ("", *results):
        table.add_column(column, justify="right" if column else "left")
    for metric in wanted:
        table.add_row(metric, *(f"{scores.values[metric]:.4g}" for scores in results.values()))
    console.print(table)
    last = list(results.values())[-1]
    if last.too_long:
        note(f"{last.too_long} prompts fill the model's context and were not answered")
    if last.unfinished:
        note(f"{last.unfinished} of {len(last.answers)} answers ran into --max-new-tokens without an end")
    if out is not None:
        from lorakit.store.files import write_json

        out.parent.mkdir(parents=True, exist_ok=True)
        write_json(
            out,
            {
                label: {
                    **scores.values,
                    "answers": [
                        {"prompt": q.shown, "answer": a.text, "references": list(q.references)}
                        for q, a in zip(scores.questions, scores.answers, strict=True)
                    ],
                }
                for label, scores in results.items()
            },
        )
        console.print(f"written: {out}")
