"""`lorakit train` and `lorakit resume`: from a file to an adapter, with everything shown on the way."""

from __future__ import annotations

import shlex
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lorakit.errors import LorakitError

if TYPE_CHECKING:
    from lorakit.data.dataset import TokenData
    from lorakit.proving.evaluate import Question, Scores
    from lorakit.recipes.schema import Recipe
    from lorakit.training.prepare import Prepared
    from lorakit.training.run import Run

# Every key of the recipe is a flag; they are checked by the recipe itself, which knows the nearest name.
CONTEXT = {"allow_extra_args": True, "ignore_unknown_options": True}
_SHOWN = 3


def train(
    ctx: typer.Context,
    recipe: Annotated[list[str] | None, typer.Argument(help="A YAML recipe and/or key=value pairs.")] = None,
    model: Annotated[str | None, typer.Option(help="The base: tiny, a folder, or a hub id.")] = None,
    data: Annotated[str | None, typer.Option(help="Examples: JSONL, JSON, CSV, Parquet, a folder, a hub id.")] = None,
    resume: Annotated[str, typer.Option(help="'auto' continues a run that was interrupted.")] = "no",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a run that is in the output folder.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Plan and check everything, train nothing.")] = False,
    keys: Annotated[bool, typer.Option("--keys", help="List every key of the recipe.")] = False,
    schema: Annotated[bool, typer.Option("--schema", help="Print the recipe's JSON schema.")] = False,
) -> None:
    """Fine-tune a model on a file of examples.

    Any key of a recipe is a flag too (--lr 3e-4 --rank 8); see them with --keys.
    """
    if keys or schema:
        _describe(schema)
        return
    from lorakit.cli.show import note
    from lorakit.recipes.load import load_recipe, parse_overrides
    from lorakit.recipes.schema import default_output

    words = list(recipe or [])
    flags, loose = _flags([*words, *ctx.args])
    files = [word for word in loose if "=" not in word]
    if len(files) > 1:
        raise LorakitError(f"train: one recipe at a time, not {', '.join(files)}")
    path = files[0] if files else None
    loose = [word for word in loose if "=" in word]
    if model is not None:
        flags["model"] = model
    if data is not None:
        flags["data"] = data
    if path is not None and not path.endswith((".yaml", ".yml")):
        raise LorakitError(f"train: {path!r} is neither a .yaml recipe nor key=value. Examples go to --data {path}")
    made, said = load_recipe(path, {**parse_overrides(loose), **flags})
    for line in said:
        note(line)
    folder = Path(made.output_dir or default_output(made))
    made = made.model_copy(update={"output_dir": str(folder)})
    if resume not in ("no", "auto"):
        raise LorakitError(
            f"train: --resume is 'auto' or 'no', not {resume!r}; to continue a run: lorakit resume {folder}"
        )
    if resume == "auto" and not dry_run:
        from lorakit.training.run import is_resumable

        if is_resumable(folder):
            _resume(folder, given=made)
            return
    _run(made, folder, overwrite=overwrite, dry_run=dry_run)


def resume(run: Annotated[Path, typer.Argument(help="The run's folder.")]) -> None:
    """Continue an interrupted run.

    It goes on exactly where its last whole checkpoint stands.
    """
    _resume(run)


def _flags(words: list[str]) -> tuple[dict[str, Any], list[str]]:
    """``--lr 3e-4 rank=8`` → ({"lr": 3e-4}, ["rank=8"])."""
    from lorakit.recipes.load import parse_value

    flags: dict[str, Any] = {}
    loose: list[str] = []
    rest = iter(words)
    for word in rest:
        if not word.startswith("--"):
            loose.append(word)
            continue
        key, sign, value = word[2:].partition("=")
        if not sign:
            value = next(rest, "")
            if not value or value.startswith("--"):
                raise LorakitError(f"train: --{key} needs a value (for a switch: --{key} true)")
        flags[key.replace("-", "_")] = parse_value(value)
    return flags, loose


def _describe(schema: bool) -> None:
    import json

    from lorakit.cli.show import facts
    from lorakit.recipes.schema import Recipe, json_schema

    if schema:
        print(json.dumps(json_schema(), indent=2))
        return
    rows = []
    for name, field in Recipe.model_fields.items():
        default = "" if field.is_required() or field.default in (None, [], {}) else f" (default {field.default})"
        rows.append((name, f"{field.description}{default}"))
    facts(rows)


def _resume(folder: Path, given: Recipe | None = None) -> None:
    from lorakit.cli.show import note
    from lorakit.training.run import stored_recipe

    stored = stored_recipe(folder)
    if given is not None:
        for key in sorted(given.model_fields_set - {"output_dir"}):
            left_open = getattr(given, key) in (None, "auto")
            if not left_open and getattr(given, key) != getattr(stored, key):
                raise LorakitError(
                    f"{folder}: the run there was begun with {key} {getattr(stored, key)!r}, not {getattr(given, key)!r}. "
                    "Continue it as it is (lorakit resume), or start anew with --overwrite"
                )
    note(f"continuing {folder}")
    _run(stored, folder, resuming=True)


def _run(recipe: Recipe, folder: Path, overwrite: bool = False, dry_run: bool = False, resuming: bool = False) -> None:
    started = time.perf_counter()
    from lorakit.cli.show import console, next_step, note, tracked
    from lorakit.data.dataset import encode, read_examples
    from lorakit.training.console import ConsoleWatcher
    from lorakit.training.loop import Interrupted
    from lorakit.training.prepare import prepare
    from lorakit.training.run import check_free, execute

    if not resuming and not dry_run:
        check_free(folder, overwrite)
    with console.status("loading"):
        import transformers  # noqa: F401  (seconds, the first time)
    prepared = prepare(recipe, progress=tracked("encoding"))
    test = None
    if recipe.test_data:
        examples, form = read_examples(recipe.test_data, recipe.format, recipe.columns)
        assert prepared.recipe.max_length
        test = encode(examples, form, prepared.template, max_length=prepared.recipe.max_length, loss=recipe.loss)
    _show_plan(prepared, folder)
    for text in prepared.notes:
        note(text)
    if dry_run:
        console.print("\nNothing was trained (--dry-run).")
        return
    before = _score(prepared, test, "base")
    after: list[Scores | None] = []

    def complete(summary: dict[str, Any]) -> dict[str, Any]:
        after.append(_score(prepared, test, _kind(prepared)))
        return _summary(summary, prepared, before if test else None, after[0], time.perf_counter() - started)

    console.print()
    try:
        run = execute(
            prepared, folder, ConsoleWatcher(console), resume=resuming, overwrite=overwrite, complete=complete
        )  # fmt: skip
    except Interrupted as stop:
        console.print(f"\nStopped after step {stop.step} of {prepared.recipe.steps}; nothing is lost.")
        next_step(f"lorakit resume {folder}")
        sys.exit(130)
    _finish(run, prepared, before, after[0], bool(test))


def _kind(prepared: Prepared) -> str:
    return "model" if prepared.recipe.method == "full" else "adapter"


def _show_plan(prepared: Prepared, folder: Path) -> None:
    from lorakit.cli.show import coloured_row, console, facts, heading, note, short, size
    from lorakit.data.report import special_strings_inside

    recipe, data, model = prepared.recipe, prepared.data, prepared.model
    info = getattr(model, "base_info", None)
    total = sum(p.numel() for p in model.parameters())
    base = total - (prepared.plan.trainable_parameters if recipe.method != "full" else 0)
    rows = [
        (
            "base",
            f"{recipe.model}: {short(base)} parameters, {recipe.precision} on {info.device if info else recipe.device}",
        ),
        ("data", f"{recipe.data}: {len(data.rows):,} rows, {data.form.describe()}"),
        ("", f"{data.tokens:,} tokens, {data.loss_tokens:,} of them trained ({data.loss_tokens / data.tokens:.0%})"),
        ("template", prepared.template.origin),
    ]
    if prepared.held_out:
        rows.append(("held out", f"{len(prepared.held_out.rows):,} rows"))
    share = prepared.trainable / base
    told = f"{recipe.method}: {prepared.trainable:,} trained parameters ({share:.1%} of the base)"
    if recipe.method != "full":
        leaves = list(dict.fromkeys(path.rsplit(".", 1)[-1] for path in prepared.plan.paths))
        told += (
            f", {size(4 * prepared.trainable)} on disk, on {len(prepared.plan.modules)} modules ({', '.join(leaves)})"
        )
    rows.append(("method", told))
    rows.append(("run", str(folder)))
    heading("Plan")
    facts(rows)
    heading("Chosen for you (give any of them to choose otherwise)")
    facts([(default.key, f"{default.value}: {default.reason}") for default in prepared.defaults])
    heading("One row as the model sees it (underlined: trained)")
    console.print(coloured_row(data.rows[0], model.tokenizer))
    count, where = special_strings_inside(data, model.tokenizer)
    if count:
        note(f"{count} rows spell one of the tokenizer's special tokens in their own text (first: {where})")


def _score(prepared: Prepared, test: TokenData | None, label: str) -> Scores | None:
    """The test data's scores; without test data, answers to a few held-out prompts."""
    from lorakit.cli.show import counting
    from lorakit.data.dataset import stop_tokens
    from lorakit.inference.generate import Sampling
    from lorakit.proving.evaluate import METRICS, evaluate, prompts_in

    data = test or prepared.held_out or prepared.data
    plain = any(example.text is not None for example in data.examples)
    if plain and not test:
        return None
    answer = max(row.loss_tokens for row in data.rows)
    prompts = 1 if plain else prompts_in(data) if test else _SHOWN
    metrics = ("loss",) if plain else METRICS if test else ("exact",)
    with counting(f"scoring the {label}", prompts) as advance:
        return evaluate(
            prepared.model, data, prepared.template, stop_tokens(prepared.model, prepared.data), metrics,
            Sampling(max_new_tokens=min(256, answer + 16)), limit=None if test else _SHOWN, scorer=prepared.scorer,
            progress=advance,
        )  # fmt: skip


def _summary(
    summary: dict[str, Any], prepared: Prepared, before: Scores | None, after: Scores | None, seconds: float
) -> dict[str, Any]:
    """The run's summary with scores, and with the time and memory of the whole command."""
    from lorakit.base.devices import peak_memory_bytes

    peak = max(summary["peak_memory_bytes"], peak_memory_bytes(prepared.scorer.device.type))
    result = {"loss": summary["eval_loss"], "bytes": summary["bytes"], "parameters": prepared.trainable}
    extra: dict[str, Any] = {
        "training_seconds": summary["seconds"], "seconds": round(seconds, 2), "peak_memory_bytes": peak,
    }  # fmt: skip
    if before and after:
        extra["base"] = before.values
        result |= after.values
    return {**extra, _kind(prepared): result}


def _finish(run: Run, prepared: Prepared, before: Scores | None, after: Scores | None, tested: bool) -> None:
    from rich.table import Table

    from lorakit.cli.show import before_after, console, duration, facts, heading, next_step, note, size
    from lorakit.training.run import SUMMARY

    summary, kind = run.summary, _kind(prepared)
    if before and after and after.questions:
        heading("Before and after")
        before_after(_examples(before, after, after.questions))
        if after.unfinished:
            note(
                f"{after.unfinished} of {len(after.answers)} answers ran into the length limit without an end-of-turn "
                "token; train longer, or look at: lorakit data check"
            )
    if after and after.too_long:
        note(f"{after.too_long} prompts fill the model's context and were not answered")
    if before and after and tested:
        heading(f"Scores on {prepared.recipe.test_data}")
        table = Table()
        for column in ("", "base", kind):
            table.add_column(column, justify="right" if column else "left")
        names = {"loss": "loss (nats per token)", "bleu": "BLEU (all references)", "exact": "exact match"}
        for metric in after.values:
            digits = "{:.3f}" if metric == "loss" else "{:.1f}" if metric == "bleu" else "{:.1%}"
            table.add_row(names[metric], digits.format(before.values[metric]), digits.format(after.values[metric]))
        console.print(table)
    heading("Done")
    facts(
        [
            ("time", f"{duration(summary['seconds'])} ({duration(summary['training_seconds'])} of it training, "
                     f"{summary['tokens_per_second']:,.0f} tokens/s)"),
            ("memory", f"{size(summary['peak_memory_bytes'])} at its peak"),
            (kind, f"{run.result} ({size(summary['bytes'])})"),
            ("picture", str(run.folder / "loss.png")),
            ("summary", str(run.folder / SUMMARY)),
        ]
    )  # fmt: skip
    commands = [f"lorakit chat {run.folder}"]
    if after and after.questions:
        prompt = min((question.shown for question in after.questions), key=len)
        if len(prompt) < 160:
            commands.insert(0, f"lorakit generate {run.folder} --prompt {shlex.quote(prompt)}")
    next_step(*commands)


def _examples(before: Scores, after: Scores, questions: tuple[Question, ...]) -> list[tuple[str, str, str, str]]:
    chosen = range(min(_SHOWN, len(questions)))
    return [
        (questions[i].shown, before.answers[i].text, after.answers[i].text, questions[i].references[0]) for i in chosen
    ]
