"""How things look on a terminal; shared by the verbs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from lorakit.base.batch import TokenRow
    from lorakit.data.report import DataSummary

console = Console(highlight=False)


@contextmanager
def counting(label: str, total: int) -> Iterator[Callable[[int], None]]:
    """A bar for work that is counted; gives the function that adds to it."""
    with Progress(
        TextColumn(label), BarColumn(bar_width=None), MofNCompleteColumn(), TimeRemainingColumn(compact=True),
        console=console, transient=True,
    ) as bar:  # fmt: skip
        task = bar.add_task("", total=total)
        yield lambda done: bar.update(task, advance=done)


def tracked(label: str) -> Callable[[Iterable[Any]], Iterable[Any]]:
    """Wraps an iteration in a bar that vanishes when it is done."""

    def wrap(items: Iterable[Any]) -> Iterator[Any]:
        items = list(items)
        with counting(label, len(items)) as advance:
            for item in items:
                yield item
                advance(1)

    return wrap


def heading(text: str) -> None:
    console.print()
    console.print(Text(text, style="bold"))


def facts(rows: Sequence[tuple[str, str]]) -> None:
    """Aligned pairs of a name and what is to say of it."""
    table = Table.grid(padding=(0, 2))
    table.add_column(style="cyan", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows:
        table.add_row(name, Text(value))
    console.print(table)


def note(text: str) -> None:
    console.print(Text.assemble(("note: ", "yellow"), text))


def next_step(*commands: str) -> None:
    heading("Next")
    for command in commands:
        console.print(Text("  " + command, style="green"), soft_wrap=True)


def short(number: float) -> str:
    """1234567 → 1.2 M."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= size:
            return f"{number / size:.1f} {letter}"
    return f"{number:g}"


def size(number: float) -> str:
    """Bytes, in words."""
    for limit, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if number >= limit:
            return f"{number / limit:.1f} {unit}"
    return f"{number:.0f} bytes"


def duration(seconds: float) -> str:
    """95 → 1 min 35 s."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def clipped(text: str, limit: int = 240) -> str:
    text = " ".join(text.split())
    return text if len(text) <= limit else text[: limit - 1] + "…"


def coloured_row(row: TokenRow, tokenizer: Any, limit: int = 600) -> Text:
    """One row as text, the trained tokens in green (and underlined, for terminals without colour)."""
    from lorakit.data.report import token_pieces

    text = Text()
    for piece, trained in token_pieces(row, tokenizer):
        text.append(piece, style="green underline" if trained else "dim")
    if len(text) > limit:
        text = text[:limit]
        text.append(" …")
    return text


def histogram(summary: DataSummary, width: int = 40) -> None:
    """Row lengths as bars."""
    most = max(count for *_, count in summary.histogram)
    for low, high, count in summary.histogram:
        bar = "█" * round(width * count / most) or ("▏" if count else "")
        console.print(Text.assemble((f"{low:>7}-{high:<7}", "cyan"), f"{bar} {count}"))


def before_after(shown: Sequence[tuple[str, str, str, str]]) -> None:
    """Prompt, the base's answer, the new answer and one reference, for a few prompts."""
    for prompt, before, after, reference in shown:
        table = Table.grid(padding=(0, 2))
        table.add_column(style="cyan", no_wrap=True)
        table.add_column(overflow="fold")
        table.add_row("prompt", Text(clipped(prompt), style="bold"))
        table.add_row("before", Text(clipped(before) or "(nothing)", style="dim"))
        table.add_row("after", Text(clipped(after) or "(nothing)", style="green"))
        table.add_row("reference", Text(clipped(reference)))
        console.print(table)
        console.print()
