"""`lorakit.train`: the loop from Python."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from lorakit.errors import LorakitError
from lorakit.recipes.schema import apply_aliases, build_recipe, default_output
from lorakit.training.console import ConsoleWatcher, SilentWatcher
from lorakit.training.loop import Watcher
from lorakit.training.prepare import prepare
from lorakit.training.run import Run, claim, execute


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
    given, _ = apply_aliases(settings)
    name = model if isinstance(model, str) else getattr(getattr(model, "base_info", None), "name", "in-memory")
    loaded: Any = None if isinstance(model, str) else model
    if loaded is not None:
        if tokenizer is not None:
            loaded.tokenizer = tokenizer
        if not hasattr(loaded, "tokenizer"):
            raise LorakitError("train: this model brings no tokenizer; give tokenizer=")
        if getattr(loaded, "mounted", ()):
            adapter_keys = {
                "method",
                "rank",
                "alpha",
                "targets",
                "dropout",
                "exclude",
                "init",
                "rank_pattern",
                "alpha_pattern",
            }
            clash = adapter_keys & set(given)
            if clash:
                raise LorakitError(
                    f"train: the model already carries an adapter, so {', '.join(sorted(clash))} would be ignored"
                )
            method = loaded.adapter().plan.method
            given |= {"rank": getattr(method, "rank", None), "alpha": getattr(method, "alpha", 32.0)}
        elif any(p.requires_grad for p in loaded.parameters()):
            given.setdefault("method", "full")
    recipe = build_recipe({"model": name, "data": data, **given}, "train")
    folder = Path(recipe.output_dir or default_output(recipe))
    claim(folder, overwrite)
    prepared = prepare(recipe, loaded)
    return execute(prepared, folder, watcher or (SilentWatcher() if quiet else ConsoleWatcher()))
