"""The run's log: one JSON object a line, and further places on request.

A page or a plot reads the file; nothing needs the process that writes it.
"""

from __future__ import annotations

import importlib.util
import json
import os
from pathlib import Path
from typing import Any, Protocol

from lorakit.errors import LorakitError
from lorakit.store.files import friendly_io


class Sink(Protocol):
    def write(self, event: dict[str, Any]) -> None: ...

    def close(self) -> None: ...


class EventLog:
    """``events.jsonl``, and the sinks named in ``report_to``.

    Args:
        path: of the file.
        resume_from: keep events up to this step and forget later ones, which will be made again.
    """

    def __init__(self, path: Path, resume_from: int | None = None, sinks: list[Sink] | None = None):
        self.path = path
        self.sinks = sinks or []
        if resume_from is None:
            path.unlink(missing_ok=True)
        elif path.exists():
            kept = [e for e in read_events(path) if e.get("step", 0) <= resume_from and e["event"] != "end"]
            scratch = path.with_name(f".{path.name}.tmp")
            scratch.write_text("".join(json.dumps(event) + "\n" for event in kept), encoding="utf-8")
            scratch.replace(path)
        self._file = path.open("a", encoding="utf-8")

    def write(self, event: str, step: int, **values: Any) -> None:
        """Append one event; it is in the system's hands when this returns."""
        entry = {"event": event, "step": step, **values}
        with friendly_io(self.path):
            self._file.write(json.dumps(entry) + "\n")
            self._file.flush()
        for sink in self.sinks:
            sink.write(entry)

    def close(self) -> None:
        with friendly_io(self.path):
            os.fsync(self._file.fileno())
            self._file.close()
        for sink in self.sinks:
            sink.close()


def read_events(path: Path) -> list[dict[str, Any]]:
    """All whole events of a log; a last line cut by a crash is left out."""
    events = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            events.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return events


class _TensorBoard:
    def __init__(self, folder: Path):
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder / "tensorboard"))

    def write(self, event: dict[str, Any]) -> None:
        for key, value in event.items():
            if isinstance(value, (int, float)) and key != "step":
                self._writer.add_scalar(f"{event['event']}/{key}", value, event["step"])

    def close(self) -> None:
        self._writer.close()


class _WandB:
    def __init__(self, folder: Path, config: dict[str, Any]):
        import wandb

        self._run = wandb.init(project="lorakit", dir=str(folder), name=folder.name, config=config, resume="allow")

    def write(self, event: dict[str, Any]) -> None:
        numbers = {f"{event['event']}/{k}": v for k, v in event.items() if isinstance(v, (int, float)) and k != "step"}
        self._run.log(numbers, step=event["step"])

    def close(self) -> None:
        self._run.finish()


def make_sinks(names: list[Any], folder: Path, config: dict[str, Any]) -> list[Sink]:
    """The sinks of ``report_to``; one that is not installed is an error that says how to get it."""
    sinks: list[Sink] = []
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise LorakitError(f"report_to: {name} is not installed: pip install 'lorakit[{name}]'")
        sinks.append(_TensorBoard(folder) if name == "tensorboard" else _WandB(folder, config))
    return sinks
