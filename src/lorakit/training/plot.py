"""The run's loss as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any


def smoothed(values: Sequence[float], window: int) -> list[float]:
    """Mean over the last `window` values, at each place."""
    result = []
    for i in range(len(values)):
        part = values[max(0, i + 1 - window) : i + 1]
        result.append(sum(part) / len(part))
    return result


def plot_losses(events: Sequence[dict[str, Any]], path: Path) -> None:
    """Training loss (faint, and smoothed) and evaluation loss over steps, as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    steps = [e for e in events if e["event"] == "step"]
    evals = [e for e in events if e["event"] == "eval"]
    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    losses = [e["loss"] for e in steps]
    numbers = [e["step"] for e in steps]
    axes.plot(numbers, losses, color="#9bb8d3", linewidth=0.8, label="training")
    axes.plot(numbers, smoothed(losses, max(5, len(losses) // 30)), color="#1f5f99", linewidth=1.8, label="smoothed")
    if evals:
        axes.plot(
            [e["step"] for e in evals],
            [e["loss"] for e in evals],
            "o-",
            color="#c8553d",
            markersize=4,
            label="held out",
        )
    axes.set(xlabel="step", ylabel="loss (nats per token)")
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    figure.savefig(path, dpi=130)
