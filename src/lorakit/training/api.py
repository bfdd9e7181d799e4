"""`lorakit.train`: the loop from Python."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from lorakit.errors import LorakitError
from lorakit.recipes.schema import apply_aliases, build_recipe, default_output
from lorakit.training.console import ConsoleWatcher, SilentWatcher
from lorakit.training.loop import Watcher
from lorakit.training.prepare import prepare
from lorakit.training.run import Run, check_free, execute


def train(
    model: nn.Module | str,
    data: str,
    *,
    tokenizer: Any = None,
    watcher: Watcher | None = None,
    quiet: bool = False,
    overwrite: bool = False,
    **settings: Any,
) -> Run:
    """Train and give the run back: its folder, the result's folder, the model and the summary.

    Args:
        model: a name for `load_base`, a loaded base, or one with an adapter attached, which is then
            the one that is trained.
        data: a file of examples, a folder, or a hub id.
        tokenizer: for a model that was not loaded by `load_base`.
        watcher: who is told of the progress; a terminal bar by default.
        quiet: no bar.
        overwrite: replace a run that is already in the folder.
        settings: any key of the recipe (`lr=3e-4`, `output_dir="runs/mine"`, …).

    Raises:
        LorakitError: see `prepare` and `execute`.
    """
    watcher = watcher or (SilentWatcher() if quiet else ConsoleWatcher())
    given, said = apply_aliases(settings)
    name = model if isinstance(model, str) else getattr(getattr(model, "base_info", None), "name", "in-memory")
    loaded: Any = None if isinstance(model, str) else model
    if loaded is not None:
        if tokenizer is not None:
            loaded.tokenizer = tokenizer
        if not hasattr(loaded, "tokenizer"):
            raise LorakitError("train: this model brings no tokenizer; give tokenizer=")
        if getattr(loaded, "mounted", ()):
            given |= _described(loaded, given)
        elif getattr(loaded, "trains_base", False):
            given.setdefault("method", "full")
    recipe = build_recipe({"model": name, "data": data, **given}, "train")
    folder = Path(recipe.output_dir or default_output(recipe))
    check_free(folder, overwrite)
    prepared = prepare(recipe, loaded)
    for line in [*said, *prepared.notes, *(f"{d.key}: {d.value} ({d.reason})" for d in prepared.defaults)]:
        watcher.note(line)
    return execute(prepared, folder, watcher, overwrite=overwrite)


def _described(model: Any, given: dict[str, Any]) -> dict[str, Any]:
    """The recipe's words for the adapter a model carries, so that the run can be resumed from them."""
    if model.active is None:
        raise LorakitError("train: the model's adapters are switched off; model.switch(name) says which one to train")
    method = model.adapter().plan.method
    fields = {field.name: getattr(method, field.name) for field in dataclasses.fields(method)}
    rslora = fields.pop("use_rslora", False)
    described = {"method": "rslora" if rslora else method.name, **fields}
    clash = sorted(key for key in described if key in given and given[key] != described[key])
    if clash:
        raise LorakitError(f"train: the model already carries an adapter, so {', '.join(clash)} would be ignored")
    return {key: dict(v) if isinstance(v, Mapping) else v for key, v in described.items()}
