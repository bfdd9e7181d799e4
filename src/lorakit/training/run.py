"""A run folder: made, locked, trained into, finished, and resumed.

RUN/recipe.yaml      as resolved; with it `resume` needs nothing else
RUN/manifest.json    versions and fingerprints of data, base and template
RUN/events.jsonl     one line a step
RUN/checkpoints/     whole states
RUN/adapter/         the result (RUN/model/ for full fine-tuning)
RUN/loss.png, RUN/summary.json
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lorakit.data.dataset import stop_tokens
from lorakit.errors import LorakitError
from lorakit.recipes.load import dump_recipe, read_yaml
from lorakit.recipes.schema import Recipe, build_recipe
from lorakit.store.files import friendly_io, new_folder, read_json, write_json
from lorakit.training.events import EventLog, make_sinks, read_events
from lorakit.training.loop import Loop, Watcher
from lorakit.training.plot import plot_losses
from lorakit.training.prepare import Prepared, versions

_WRITTEN = {
    ".lock", "recipe.yaml", "manifest.json", "events.jsonl", "summary.json", "checkpoints", "adapter", "model",
    "loss.png", "tensorboard", "wandb",
}  # fmt: skip
RECIPE, MANIFEST, EVENTS, SUMMARY = "recipe.yaml", "manifest.json", "events.jsonl", "summary.json"


@dataclass(frozen=True)
class Run:
    """A finished run."""

    folder: Path
    result: Path
    model: Any
    summary: dict[str, Any]


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """One process in a run folder at a time; the lock goes with the process, however it ends."""
    with friendly_io(folder):
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise LorakitError(f"{folder}: another process is training into this folder") from None
        yield
    finally:
        os.close(handle)


def is_resumable(folder: Path) -> bool:
    """Whether a folder holds a run that was begun and not finished."""
    return (folder / RECIPE).exists() and not (folder / SUMMARY).exists() and any(folder.glob("checkpoints/step-*"))


def check_free(folder: Path, overwrite: bool = False) -> None:
    """Make sure that a new run in this folder would not destroy anything; changes nothing itself.

    Raises:
        LorakitError: the folder holds a run (and `overwrite` is not set), or files of somebody else's.
    """
    if not folder.exists():
        return
    if folder.is_file():
        raise LorakitError(f"{folder} is a file, not a folder; it was not touched. Give another output_dir")
    if not _is_run(folder):
        if any(path.name not in (".lock", ".manifest.json.tmp") for path in folder.iterdir()):
            raise LorakitError(
                f"{folder} exists and is not a run folder; nothing in it was touched. Give another output_dir"
            )
        return
    # A run that died before its first checkpoint is no loss.
    begun = (folder / SUMMARY).exists() or any(folder.glob("checkpoints/step-*"))
    if begun and not overwrite:
        how = f"continue it with: lorakit resume {folder}" if is_resumable(folder) else "it is finished"
        raise LorakitError(f"{folder} already holds a run ({how}). Give another output_dir, or --overwrite")


def _is_run(folder: Path) -> bool:
    """Whether a manifest of ours is there: the first thing a run writes."""
    try:
        return "lorakit" in read_json(folder / MANIFEST)["versions"]
    except (OSError, LorakitError, KeyError, TypeError):
        return False


def _clear(folder: Path) -> None:
    """Remove what a former run wrote, and nothing else. Called with the lock held."""
    for name in _WRITTEN - {".lock"}:
        path = folder / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def stored_recipe(folder: Path) -> Recipe:
    """The resolved recipe of a run that can be resumed.

    Raises:
        LorakitError: no run there, finished, or without a checkpoint.
    """
    if not (folder / RECIPE).exists():
        raise LorakitError(f"{folder} is not a run folder (it has no {RECIPE})")
    if (folder / SUMMARY).exists():
        raise LorakitError(f"{folder} is finished; there is nothing to resume. Its result is in {folder}/adapter")
    if not any(folder.glob("checkpoints/step-*")):
        raise LorakitError(f"{folder} has no checkpoint yet; start it again with --overwrite")
    return build_recipe(read_yaml(folder / RECIPE), str(folder / RECIPE))


def _manifest(prepared: Prepared) -> dict[str, Any]:
    info = getattr(prepared.model, "base_info", None)
    return {
        "versions": versions(),
        "base": None
        if info is None
        else {"name": info.name, "revision": info.revision, "fingerprint": info.fingerprint},
        "data": {
            "source": prepared.recipe.data,
            "format": prepared.data.form.describe(),
            "rows": len(prepared.data.rows),
            "fingerprint": prepared.data.fingerprint(),
            "held_out": prepared.held_out.fingerprint() if prepared.held_out else None,
        },
        "template": {"origin": prepared.template.origin, "sha256": prepared.template.sha256},
    }


def _check_same(old: dict[str, Any], new: dict[str, Any], folder: Path) -> None:
    """A resumed run has to see what it saw before."""
    for what, path in (("data", ("data", "fingerprint")), ("held-out data", ("data", "held_out")),
                       ("chat template", ("template", "sha256")), ("base", ("base", "fingerprint"))):  # fmt: skip
        a, b = old.get(path[0]) or {}, new.get(path[0]) or {}
        if a.get(path[1]) != b.get(path[1]):
            raise LorakitError(
                f"{folder}: the {what} has changed since the run began ({str(a.get(path[1]))[:12]} then, "
                f"{str(b.get(path[1]))[:12]} now); resuming would not be the same run. Start a new one"
            )


def execute(
    prepared: Prepared,
    folder: Path,
    watcher: Watcher,
    resume: bool = False,
    overwrite: bool = False,
    complete: Callable[[dict[str, Any]], dict[str, Any]] = lambda summary: summary,
) -> Run:
    """Train a prepared run in its folder, from the start or from its newest whole checkpoint.

    Args:
        overwrite: replace a run that is in the folder; it is removed only now, when all is checked.
        complete: adds to the summary (scores, say) before it is written; a run with a summary is finished.

    Raises:
        Interrupted: Ctrl-C or SIGTERM; the run can be resumed.
        LorakitError: see `Loop.run`; also changed data or base on resuming.
    """
    recipe = prepared.recipe
    manifest = _manifest(prepared)
    with locked(folder):
        if resume:
            _check_same(read_json(folder / MANIFEST), manifest, folder)
        else:
            check_free(folder, overwrite)
            with friendly_io(folder):
                _clear(folder)
                write_json(folder / MANIFEST, manifest)
                (folder / "checkpoints").mkdir()
                (folder / RECIPE).write_text(dump_recipe(recipe), encoding="utf-8")
        loop = Loop(
            prepared.model, prepared.scorer, prepared.data.rows, prepared.held_out.rows if prepared.held_out else (),
            recipe, folder / "checkpoints", watcher,
        )  # fmt: skip
        if not resume:
            torch.manual_seed(recipe.seed)
        else:
            loop.progress, notes = loop.checkpoints.restore()
            for note in notes:
                watcher.note(note)
        log = EventLog(
            folder / EVENTS,
            loop.progress.step if resume else None,
            make_sinks(recipe.report_to, folder, recipe.model_dump(mode="json")),
        )
        try:
            loop.run(log)
            log.write("end", loop.progress.step)
        finally:
            log.close()
        run = _finish(prepared, loop, folder)
        run.summary.update(complete(run.summary))
        write_json(folder / SUMMARY, run.summary)
        return run


def _finish(prepared: Prepared, loop: Loop, folder: Path) -> Run:
    progress = loop.progress
    model = prepared.model
    if prepared.recipe.method == "full":
        result = _save_model(model, folder / "model", prepared)
    else:
        model.describe(**_record(prepared))
        result = model.save(folder / "adapter")
    plot_losses(read_events(folder / EVENTS), folder / "loss.png")
    weights = list(result.rglob("*.safetensors"))
    summary = {
        "steps": progress.step,
        "tokens": progress.tokens,
        "loss_tokens": progress.loss_tokens,
        "seconds": round(progress.seconds, 3),
        "tokens_per_second": round(progress.tokens / progress.seconds, 1) if progress.seconds else None,
        "peak_memory_bytes": progress.peak_memory_bytes,
        "train_loss": round(sum(progress.last_losses) / len(progress.last_losses), 6) if progress.last_losses else None,
        "eval_loss": progress.best_loss,
        "best_step": progress.best_step,
        "stopped_early": progress.stopped_early,
        "trainable_parameters": prepared.trainable,
        "bytes": sum(p.stat().st_size for p in weights),
    }
    return Run(folder, result, model, summary)


def _record(prepared: Prepared) -> dict[str, Any]:
    """What `lorakit.json` tells beyond PEFT's config."""
    return {
        "template": {"origin": prepared.template.origin, "sha256": prepared.template.sha256},
        "template_text": prepared.template.chat,
        "data_fingerprint": prepared.data.fingerprint(),
        "stop_token_ids": stop_tokens(prepared.model, prepared.data),
    }


def _save_model(model: Any, folder: Path, prepared: Prepared) -> Path:
    """A whole model with its tokenizer and template, in the precision its config names."""
    recipe, tokenizer = prepared.recipe, model.tokenizer
    narrow = recipe.precision == "bf16" or recipe.weights == "random"
    dtype = torch.bfloat16 if narrow else model.config.dtype
    copies: dict[int, torch.Tensor] = {}  # tied weights stay one tensor, so that they are written once
    state = {
        name: copies.setdefault(t.data_ptr(), t.to(dtype) if t.is_floating_point() else t)
        for name, t in model.state_dict().items()
    }
    tokenizer.chat_template = prepared.template.chat
    model.generation_config.eos_token_id = stop_tokens(model, prepared.data)
    before, model.config.dtype = model.config.dtype, dtype
    try:
        with new_folder(folder) as scratch:
            model.save_pretrained(scratch, state_dict=state)
            tokenizer.save_pretrained(scratch)
    finally:
        model.config.dtype = before
    return folder
