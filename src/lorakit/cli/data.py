"""`lorakit data check`: what is in a file, and what a model would be trained on."""

from __future__ import annotations

from typing import Annotated

import typer

app = typer.Typer(help="Look at training data.", no_args_is_help=True)


@app.callback()
def _group() -> None: ...


@app.command("check")
def check(
    data: Annotated[str, typer.Argument(help="A file, a folder, or a hub id.")],
    model: Annotated[str, typer.Option(help="Whose tokenizer and template to use.")] = "tiny",
    format: Annotated[str, typer.Option(help="auto, or one of the formats.")] = "auto",
    columns: Annotated[str, typer.Option(help="part=column,… for other column names.")] = "",
    template: Annotated[str, typer.Option(help="auto, none, or a Jinja file.")] = "auto",
    loss: Annotated[str, typer.Option(help="auto, completion, last, all.")] = "auto",
    max_length: Annotated[int | None, typer.Option(help="Count rows longer than this.")] = None,
    row: Annotated[int, typer.Option(help="Which row to show, counted from 1.", min=1)] = 1,
) -> None:
    """Counts, lengths, the share of trained tokens, and one row in colour."""
    from lorakit.base.files import find_model
    from lorakit.base.load import load_tokenizer
    from lorakit.cli.show import coloured_row, console, facts, heading, histogram, next_step, note, tracked
    from lorakit.data.dataset import encode, read_examples
    from lorakit.data.report import special_strings_inside, summarise
    from lorakit.data.template import LOSSES, Template
    from lorakit.errors import LorakitError, did_you_mean
    from lorakit.recipes.schema import parse_columns

    if loss not in LOSSES:
        raise LorakitError(f"loss: {loss!r} is none of {', '.join(LOSSES)}. {did_you_mean(loss, LOSSES)}")
    examples, form = read_examples(data, format, parse_columns(columns))
    if row > len(examples):
        raise LorakitError(f"data: there is no row {row}; {data} has {len(examples)}")
    tokenizer = load_tokenizer(find_model(model))
    made = Template(tokenizer, template)
    rows = encode(examples, form, made, max_length=1 << 40, loss=loss, progress=tracked("encoding"))
    summary = summarise(rows)
    heading(data)
    facts(
        [
            ("format", form.describe()),
            ("template", f"{made.origin}{f' (sha256 {made.sha256[:12]})' if made.sha256 else ''}"),
            ("rows", f"{summary.rows:,}, with {summary.prompts:,} different prompts"),
            ("tokens", f"{summary.tokens:,}, {summary.loss_tokens:,} of them trained ({summary.loss_share:.1%})"),
            ("row length", f"{summary.shortest} to {summary.longest} tokens, median {summary.median}"),
            ("fingerprint", rows.fingerprint()[:16]),
        ]
    )
    heading("Rows by length in tokens")
    histogram(summary)
    if max_length:
        over = sum(length > max_length for length in rows.lengths)
        console.print(f"\n{over} of {summary.rows} rows are longer than {max_length}")
    heading(f"{examples[row - 1].where} (underlined: trained)")
    console.print(coloured_row(rows.rows[row - 1], tokenizer, limit=3000))
    count, where = special_strings_inside(rows, tokenizer)
    if count:
        note(f"{count} rows spell one of the tokenizer's special tokens in their own text (first: {where})")
    next_step(f"lorakit train --model {model} --data {data}")
