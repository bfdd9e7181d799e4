"""`attach` and `load_adapter`: a model and its adapters, from memory and from disk."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lorakit import __version__
from lorakit.adapters.kinds import kind_of
from lorakit.adapters.methods import Full, LoRA, Method
from lorakit.adapters.model import AdaptedModel, check_fit, extend_model, install
from lorakit.adapters.plan import Adapter, AdapterPlan
from lorakit.adapters.targets import output_head
from lorakit.errors import LorakitError, nearest
from lorakit.store.adapters import FOUND_ON_READING, read_adapter, write_adapter
from lorakit.store.peft_format import to_peft


class AttachedModel(AdaptedModel):
    """An adapted model that can write its adapters, and mount more from disk."""

    def save(self, folder: Path | str, name: str | None = None, template: str | None = None) -> Path:
        """Write one adapter in PEFT's format, with `lorakit.json` beside it.

        Args:
            folder: made if it is not there.
            name: which adapter; the active one by default.
            template: the chat template the adapter was trained with, written beside it.
        """
        adapter = self.adapter(name)
        info = getattr(self, "base_info", None)
        generates = hasattr(self, "prepare_inputs_for_generation") and output_head(self) is not None
        original = type(self).__bases__[1]
        config, tensors = to_peft(
            adapter,
            [path for path, _ in _base_modules(self)],
            info.name if info else getattr(getattr(self, "config", None), "_name_or_path", None) or None,
            "CAUSAL_LM" if generates else None,
            (original.__name__, original.__module__),
        )
        record: dict[str, Any] = {
            "lorakit_version": __version__,
            "method": adapter.plan.method.name,
            "trainable_parameters": adapter.plan.trainable_parameters,
            "scales": {m.path: m.scale for m in adapter.plan.modules},
            **{k: v for k, v in adapter.record.items() if k not in FOUND_ON_READING},
        }
        if info:
            record["base"] = {"name": info.name, "revision": info.revision, "fingerprint": info.fingerprint}
        kept: Any = adapter.record.get("template_text")
        return write_adapter(folder, config, tensors, record, template or kept)

    def save_pretrained(
        self, save_directory: Path | str, *args: Any, is_main_process: bool = True, **kwargs: Any
    ) -> None:
        """transformers' name for `save`: writes the active adapter alone, never the base."""
        if is_main_process:
            self.save(save_directory)

    def mount(self, source: Path | str | Adapter, name: str | None = None, *, any_base: bool = False) -> str:
        """Mount an adapter from a folder (ours or PEFT's) or from memory; it does not become active.

        Args:
            source: a folder, or an `Adapter`.
            name: to call it by; the folder's name by default.
            any_base: mount it although it was made for another base of the same shapes.

        Returns:
            The name.

        Raises:
            LorakitError: damaged files, another base, modules or shapes that do not fit.
        """
        whole: Mapping[str, torch.Tensor] = {}
        if isinstance(source, Adapter):
            adapter = source
            name = name or "default"
        else:
            adapter, whole = read_adapter(source)
            name = name or re.sub(r"[^A-Za-z0-9_\-]+", "-", Path(source).resolve().name)
        _check_base(self, adapter, str(source) if not isinstance(source, Adapter) else "the adapter", any_base)
        check_fit(self, adapter)
        _check_whole(self, whole, str(source))
        _check_complete(self, adapter, str(source))
        install(self, name, _as_kinds_of(self, adapter.plan), adapter.tensors, record=adapter.record)
        return name


def _base_modules(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The model's own modules, without what adapters added."""
    return [(p, m) for p, m in model.named_modules() if p and not re.search(r"(^|\.)adapter_states(\.|$)", p)]


def _as_kinds_of(model: nn.Module, plan: AdapterPlan) -> AdapterPlan:
    """Files do not tell a Linear from a Conv1D: the model does."""
    modules = []
    for module in plan.modules:
        target = model.get_submodule(module.path)
        kind = kind_of(target)
        assert kind is not None
        modules.append(replace(module, kind=kind.name, gain=kind.gain(target)))
    return AdapterPlan(plan.method, tuple(modules))


def _check_base(model: nn.Module, adapter: Adapter, where: str, any_base: bool) -> None:
    made_for: Any = adapter.record.get("base") or {}
    info = getattr(model, "base_info", None)
    wanted = made_for.get("fingerprint")
    if any_base or not made_for:
        return
    if not wanted:
        warnings.warn(
            f"{where} was trained on a base made in memory, which has no fingerprint; only names and shapes were compared",
            stacklevel=4,
        )
        return
    if info is None or info.fingerprint is None:
        warnings.warn(
            f"{where} was trained on {made_for.get('name')} (fingerprint {wanted[:12]}); this model was made in memory "
            "and has no fingerprint, so only names and shapes were compared",
            stacklevel=4,
        )
    elif wanted != info.fingerprint:
        raise LorakitError(
            f"{where} was trained on another base ({made_for.get('name')}, fingerprint {wanted[:12]}) than this one "
            f"({info.name}, {info.fingerprint[:12]}). Load that base, or say any_base to mount it all the same"
        )


def _check_whole(model: nn.Module, whole: Mapping[str, torch.Tensor], where: str) -> None:
    """Base weights that PEFT saved beside the adapter must be this base's own."""
    for path, tensor in whole.items():
        try:
            own = model.get_submodule(path).weight
        except AttributeError:
            raise LorakitError(f"{where} carries weights for {path}, a module this model does not have") from None
        assert isinstance(own, torch.Tensor)
        if own.shape != tensor.shape or not torch.allclose(
            own.detach().float().cpu(), tensor.float(), atol=1e-2, rtol=1e-2
        ):
            raise LorakitError(
                f"{where} carries its own weights for {path} ({tuple(tensor.shape)}, this base's: {tuple(own.shape)}), "
                "and they differ: it was made for a base with changed or resized embeddings"
            )


def _check_complete(model: nn.Module, adapter: Adapter, where: str) -> None:
    """The modules that the config names and the tensors must be the same ones."""
    method = adapter.plan.method
    if not isinstance(method, LoRA) or method.targets == "all-linear" or isinstance(method.targets, str):
        return
    have = set(adapter.plan.paths)
    leaves = {path.rsplit(".", 1)[-1] for path in have}
    for target in method.targets:
        if target not in have and not any(path.endswith("." + target) for path in have):
            close = nearest(target, leaves)
            raise LorakitError(
                f"{where}: the config targets {target!r}, but no tensor of the adapter is for it"
                + (f" (nearest: {close[0]})" if close else "")
            )
    expected = {
        p for p, m in _base_modules(model)
        if kind_of(m) and any(p == t or p.endswith("." + t) for t in method.targets)
    }  # fmt: skip
    missing = sorted(expected - have)
    if missing and not adapter.record.get("peft_partial"):
        raise LorakitError(
            f"{where}: the config targets {len(expected)} modules of this model, but {len(missing)} of them have no "
            f"tensors in the file ({missing[0]}, …): it is incomplete, or made for a smaller base"
        )


def attach(model: nn.Module, method: Method | None = None, *, name: str = "default", seed: int = 0) -> Any:
    """Put a fresh adapter on a model, make it active, and give the model itself back.

    The base is frozen; the model's class gains `mount`, `switch`, `using`, `route`, `adapter`,
    `save`, and a `save_pretrained` that writes the adapter alone. ΔW is zero at the start.

    Args:
        model: any `torch.nn.Module`.
        method: `LoRA()` by default. With `Full()` nothing is attached: the base becomes trainable.
        name: of the adapter.
        seed: of the initial values.

    Raises:
        LorakitError: targets that match nothing, a name in use, an impossible rank.
    """
    method = method or LoRA()
    if isinstance(method, Full):
        if isinstance(model, AdaptedModel) and model.mounted:
            raise LorakitError("full fine-tuning trains the base itself; unmount the adapters first")
        model.requires_grad_(True)
        model.trains_base = True  # type: ignore[assignment]
        return model
    plan = method.plan(model)
    attached = extend_model(model, AttachedModel)
    install(attached, name, plan, seed=seed)
    attached.switch(name)
    return attached


def load_adapter(model: nn.Module, folder: Path | str, name: str = "default", *, any_base: bool = False) -> Any:
    """Mount an adapter folder (ours or PEFT's) on a model and make it active; gives the model back."""
    attached = extend_model(model, AttachedModel)
    assert isinstance(attached, AttachedModel)
    attached.switch(attached.mount(folder, name, any_base=any_base))
    return attached
