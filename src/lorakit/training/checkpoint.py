"""Checkpoints: all of a run's state in one folder that is whole or not there.

Trained tensors, optimiser, random state, data position and what was best so far. Safetensors and
JSON only. Each file's checksum is recorded; a damaged checkpoint is passed over for the one before.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save
from torch import nn

from lorakit.errors import LorakitError
from lorakit.store.files import friendly_io, new_folder, read_json, sync, write_json


@dataclass
class Progress:
    """Where a run is. Together with the tensors it determines the rest of the run."""

    step: int = 0
    tokens: int = 0
    loss_tokens: int = 0
    seconds: float = 0.0
    peak_memory_bytes: int = 0
    first_losses: list[float] = field(default_factory=list)
    last_losses: list[float] = field(default_factory=list)
    best_loss: float | None = None
    best_step: int | None = None
    best_checksum: str = ""
    evaluations_without_gain: int = 0
    alarmed: bool = False
    stopped_early: bool = False


def random_state() -> dict[str, torch.Tensor]:
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state |= {f"cuda.{i}": s for i, s in enumerate(torch.cuda.get_rng_state_all())}
    return state


def restore_random_state(state: Mapping[str, torch.Tensor]) -> None:
    torch.set_rng_state(state["cpu"])
    for name, value in state.items():
        if name.startswith("cuda.") and torch.cuda.is_available():
            torch.cuda.set_rng_state(value, int(name[5:]))


def _write(path: Path, tensors: Mapping[str, torch.Tensor]) -> str:
    data = save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()})
    path.write_bytes(data)
    return hashlib.sha256(data).hexdigest()


def _laid_out_as(parameter: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
    """The state with its parameter's strides: fused optimisers walk both by address."""
    return torch.empty_like(parameter, dtype=state.dtype).copy_(state) if state.shape == parameter.shape else state


class Checkpoints:
    """The checkpoints of one run folder.

    Args:
        folder: ``RUN/checkpoints``.
        parameters: the trained parameters by name, in a fixed order.
        optimizers: theirs.
        keep: how many to keep; the best weights are kept besides.
    """

    def __init__(
        self,
        folder: Path,
        parameters: Mapping[str, nn.Parameter],
        optimizers: Iterable[torch.optim.Optimizer],
        keep: int = 2,
    ):
        self.folder = folder
        self.parameters = dict(parameters)
        self.optimizers = list(optimizers)
        self.keep = keep

    def steps(self) -> list[int]:
        """Steps that have a checkpoint, ascending."""
        names = (re.fullmatch(r"step-(\d{7,})", path.name) for path in self.folder.iterdir())
        return sorted(int(name[1]) for name in names if name)

    def _path(self, step: int) -> Path:
        return self.folder / f"step-{step:07d}"

    def _best_path(self, step: int) -> Path:
        return self.folder / f"best-{step:07d}.safetensors"

    def save(self, progress: Progress) -> None:
        """Write the present state, then drop what is no longer needed."""
        optimizer = {
            f"{o}.{i}.{key}": value if isinstance(value, torch.Tensor) else torch.tensor(value)
            for o, opt in enumerate(self.optimizers)
            for i, state in opt.state_dict()["state"].items()
            for key, value in state.items()
        }
        with new_folder(self._path(progress.step)) as scratch:
            sums = {
                "trained.safetensors": _write(scratch / "trained.safetensors", self.parameters),
                "optimizer.safetensors": _write(scratch / "optimizer.safetensors", optimizer),
                "random.safetensors": _write(scratch / "random.safetensors", random_state()),
            }
            write_json(scratch / "state.json", {"progress": asdict(progress), "sha256": sums})
        self._prune(progress)

    def _prune(self, progress: Progress) -> None:
        steps = self.steps()
        for step in steps[: -self.keep]:
            shutil.rmtree(self._path(step))
        for leftover in [*self.folder.glob(".*.tmp"), *self.folder.glob(".*.old")]:
            shutil.rmtree(leftover, ignore_errors=True)
        needed = {self._best_path(progress.best_step or 0).name}
        for step in steps[-self.keep :]:
            with contextlib.suppress(LorakitError, OSError, KeyError):  # a damaged one needs nothing
                needed.add(self._best_path(self._state(step)["progress"]["best_step"] or 0).name)
        for path in self.folder.glob("best-*.safetensors"):
            if path.name not in needed:
                path.unlink()

    def _state(self, step: int) -> dict[str, Any]:
        return read_json(self._path(step) / "state.json")

    def restore(self) -> tuple[Progress, list[str]]:
        """Put the newest whole checkpoint into the parameters, optimisers and random state.

        Returns:
            Where the run was, and a line for each damaged checkpoint that was passed over.

        Raises:
            LorakitError: none is whole.
        """
        notes: list[str] = []
        for step in reversed(self.steps()):
            try:
                progress = self._restore(step)
            except Exception as error:  # whatever is wrong with it, the one before may be whole
                notes.append(f"checkpoint step-{step:07d} is damaged ({error}); going back to the one before")
                continue
            for later in self.steps():
                if later > step:  # damaged, and about to be made again
                    shutil.rmtree(self._path(later))
            return progress, notes
        raise LorakitError(f"{self.folder}: no whole checkpoint to resume from" + (f" ({notes[0]})" if notes else ""))

    def _read(self, path: Path, checksum: str) -> dict[str, torch.Tensor]:
        data = path.read_bytes()
        if hashlib.sha256(data).hexdigest() != checksum:
            raise LorakitError(f"{path.name}: checksum differs")
        return load(data)

    def _restore(self, step: int) -> Progress:
        path, state = self._path(step), self._state(step)
        progress = Progress(**state["progress"])
        # Everything is read and checked before anything is changed.
        trained, optimizer, random = (
            self._read(path / f"{name}.safetensors", state["sha256"][f"{name}.safetensors"])
            for name in ("trained", "optimizer", "random")
        )
        if set(trained) != set(self.parameters):
            raise LorakitError("its tensors are not those of this run's adapter")
        self._assign(trained)
        for o, opt in enumerate(self.optimizers):
            states: dict[int, dict[str, Any]] = {}
            owned = [parameter for group in opt.param_groups for parameter in group["params"]]
            for name, tensor in optimizer.items():
                owner, index, key = name.split(".", 2)
                if int(owner) == o:
                    states.setdefault(int(index), {})[key] = _laid_out_as(owned[int(index)], tensor)
            opt.load_state_dict({"state": states, "param_groups": opt.state_dict()["param_groups"]})
        restore_random_state(random)
        return progress

    def _assign(self, tensors: Mapping[str, torch.Tensor]) -> None:
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(tensors[name])

    def save_best(self, step: int) -> str:
        """Keep the present weights as the best so far; gives their checksum."""
        path = self._best_path(step)
        with friendly_io(path):
            scratch = path.with_name(f".{path.name}.part")
            checksum = _write(scratch, self.parameters)
            sync(scratch)
            scratch.replace(path)
        return checksum

    def load_best(self, step: int, checksum: str) -> None:
        """Put the best weights into the parameters.

        Raises:
            LorakitError: they are missing or damaged.
        """
        path = self._best_path(step)
        if not path.exists():
            raise LorakitError(f"{path} is missing")
        self._assign(self._read(path, checksum))
