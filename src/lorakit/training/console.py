"""A run as people see it: a bar with loss, real tokens a second and time left."""

from __future__ import annotations

import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from lorakit.training.checkpoint import Progress as RunProgress


class ConsoleWatcher:
    """Draws a progress bar on a terminal, and prints a line now and then elsewhere."""

    def __init__(self, console: Console | None = None, every_seconds: float = 10.0):
        self.console = console or Console(stderr=False)
        self._bar: Progress | None = None
        self._task: Any = None
        self._every = every_seconds
        self._last = 0.0
        self._held_out = ""

    def begin(self, total: int, progress: RunProgress) -> None:
        self._last = time.monotonic()
        if not self.console.is_terminal:
            return
        self._bar = Progress(
            TextColumn("training"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}"),
            TimeRemainingColumn(compact=True),
            TextColumn("left"),
            console=self.console,
            speed_estimate_period=60,
        )
        self._bar.start()
        self._task = self._bar.add_task("", total=total, completed=progress.step, figures="")

    def step(self, total: int, progress: RunProgress, loss: float, tokens_per_second: float) -> None:
        recent = sum(progress.last_losses) / len(progress.last_losses) if progress.last_losses else loss
        figures = f"loss {recent:.3f}{self._held_out}  {tokens_per_second:,.0f} tok/s"
        if self._bar is not None:
            self._bar.update(self._task, completed=progress.step, figures=figures)
        elif time.monotonic() - self._last >= self._every or progress.step == total:
            self._last = time.monotonic()
            left = progress.seconds / progress.step * (total - progress.step)
            self.console.print(f"step {progress.step}/{total}  {figures}  {left:.0f} s left", highlight=False)

    def evaluated(self, step: int, loss: float, is_best: bool) -> None:
        self._held_out = f"  held out {loss:.3f}"

    def note(self, text: str) -> None:
        self.console.print(f"[yellow]note:[/] {text}", highlight=False)

    def end(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


class SilentWatcher:
    """Looks on and says nothing."""

    def begin(self, total: int, progress: RunProgress) -> None: ...

    def step(self, total: int, progress: RunProgress, loss: float, tokens_per_second: float) -> None: ...

    def evaluated(self, step: int, loss: float, is_best: bool) -> None: ...

    def note(self, text: str) -> None: ...

    def end(self) -> None: ...
