"""The model that carries adapters: the caller's own object, with a few more methods."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Mapping
from typing import Any

from torch import nn

from lorakit.adapters.kinds import kind_of
from lorakit.adapters.methods.base import ModuleState
from lorakit.adapters.plan import Adapter, AdapterPlan
from lorakit.adapters.route import Mix, Route, Switch, as_mix
from lorakit.adapters.sites import Site, add_state, extend_class, remove_state
from lorakit.errors import LorakitError, did_you_mean, nearest

_NAME = re.compile(r"[A-Za-z0-9_\-]+")


class AdaptedModel(nn.Module):
    """Mixed in before the class of an attached model.

    Adapters are mounted by name. What acts is the default choice (`switch`), unless a `using`
    or `route` block says otherwise.
    """

    adapter_plans: dict[str, AdapterPlan]
    adapter_records: dict[str, dict[str, Any]]
    adapter_switch: Switch

    @property
    def mounted(self) -> tuple[str, ...]:
        """Names of the mounted adapters, in the order of mounting."""
        return tuple(self.adapter_plans)

    @property
    def active(self) -> dict[str, float] | None:
        """The default choice, ``{name: weight}``; None is the base alone."""
        default = self.adapter_switch.default
        return None if default is None else default.whole

    def switch(self, choice: str | Mix | None) -> None:
        """Make an adapter, an exact mix ``{name: weight}``, or None (the base) the default."""
        mix = self._checked(as_mix(choice))
        self.adapter_switch.default = Route.everywhere(mix) if mix else None

    def using(self, choice: str | Mix | None) -> contextlib.AbstractContextManager[None]:
        """``with model.using("other"):`` — one choice for all tokens inside the block."""
        mix = self._checked(as_mix(choice))
        return self.adapter_switch.using(Route.everywhere(mix) if mix else None)

    def route(self, route: Route) -> contextlib.AbstractContextManager[None]:
        """``with model.route(Route([...])):`` — a choice for each range of flattened tokens."""
        self._checked(dict.fromkeys(route.names, 1.0))
        return self.adapter_switch.using(route)

    def unmount(self, name: str) -> None:
        """Take an adapter off and free it. If it was the default, the base alone is now."""
        self._checked({name: 1.0})
        for module in self._sites():
            if name in module.adapter_states:
                remove_state(module, name)
        del self.adapter_plans[name], self.adapter_records[name]
        if self.active and name in self.active:
            self.adapter_switch.default = None

    def adapter(self, name: str | None = None) -> Adapter:
        """A mounted adapter as data (tensors shared with the model, detached)."""
        name = self._one(name)
        plan = self.adapter_plans[name]
        tensors = {
            module.path: {k: t.detach() for k, t in self._state(module.path, name).tensors().items()}
            for module in plan.modules
        }
        return Adapter(plan, tensors, self.adapter_records[name])

    def describe(self, name: str | None = None, **record: Any) -> None:
        """Add to what is written beside an adapter when it is saved."""
        self.adapter_records[self._one(name)].update(record)

    def activation_checkpointing_enable(self, activation_checkpointing_kwargs: Any = None, **kwargs: Any) -> None:
        """transformers' switch, with the route re-entered when activations are recomputed."""
        options = {
            **(activation_checkpointing_kwargs or {}),
            "use_reentrant": False,
            "context_fn": self.adapter_switch.checkpoint_contexts,
        }
        inherited = getattr(super(), "activation_checkpointing_enable", None)
        if inherited is None:
            raise LorakitError(
                f"{type(self).__name__} has no activation checkpointing of its own; with torch.utils.checkpoint, pass "
                "context_fn=model.adapter_switch.checkpoint_contexts and use_reentrant=False"
            )
        inherited(activation_checkpointing_kwargs=options, **kwargs)

    # ------------------------------------------------------------------ inside

    def _sites(self) -> list[Site]:
        return [module for module in self.modules() if isinstance(module, Site)]

    def _state(self, path: str, name: str) -> ModuleState:
        site = self.get_submodule(path)
        assert isinstance(site, Site)
        state = site.adapter_states[name]
        assert isinstance(state, ModuleState)
        return state

    def _one(self, name: str | None) -> str:
        if name is None:
            if self.active and len(self.active) == 1:
                return next(iter(self.active))
            if len(self.mounted) == 1:
                return self.mounted[0]
            raise LorakitError(f"several adapters are mounted ({', '.join(self.mounted)}); name one")
        self._checked({name: 1.0})
        return name

    def _checked(self, mix: dict[str, float]) -> dict[str, float]:
        for name in mix:
            if name not in self.adapter_plans:
                raise LorakitError(
                    f"no adapter named {name!r} is mounted (mounted: {', '.join(self.mounted) or 'none'}). "
                    + did_you_mean(name, self.mounted)
                )
        return mix


def _no_fast_path(module: nn.Module, arguments: Any) -> None:
    """Does nothing; that it is there makes torch call the sub-modules one by one."""


def extend_model(model: nn.Module, mixin: type[AdaptedModel] = AdaptedModel) -> AdaptedModel:
    """Give a model the methods of `mixin`, in place and once. Freezes its parameters."""
    if isinstance(model, AdaptedModel):
        return model
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer):
            # Its fast path in evaluation reads weights directly, past any adapter; a hook keeps it off.
            module.register_forward_pre_hook(_no_fast_path)
    extend_class(model, mixin)
    assert isinstance(model, AdaptedModel)
    model.adapter_plans = {}
    model.adapter_records = {}
    model.adapter_switch = Switch()
    return model


def install(
    model: AdaptedModel,
    name: str,
    plan: AdapterPlan,
    tensors: Mapping[str, Mapping[str, Any]] | None = None,
    seed: int = 0,
    record: Mapping[str, Any] | None = None,
) -> None:
    """Mount a planned adapter under a name: at its initial values, or with given tensors."""
    if not _NAME.fullmatch(name) or hasattr(nn.ModuleDict(), name):
        raise LorakitError(
            f"adapter name {name!r}: use letters, digits, '-' and '_', and no name that Python's "
            "dictionaries use themselves"
        )
    if name in model.adapter_plans:
        raise LorakitError(f"an adapter named {name!r} is already mounted; unmount it first or use another name")
    # Everything is built before anything is changed, so that a failure leaves the model as it was.
    states = {
        module.path: plan.method.build(
            module, model.get_submodule(module.path), None if tensors is None else tensors[module.path], seed
        )
        for module in plan.modules
    }
    for path, state in states.items():
        add_state(model.get_submodule(path), name, state, model.adapter_switch)
    model.adapter_plans[name] = plan
    model.adapter_records[name] = dict(record or {})


def check_fit(model: nn.Module, adapter: Adapter) -> None:
    """Refuse an adapter whose modules or shapes are not this model's.

    Raises:
        LorakitError: a path the model has not (with the nearest), or features that differ.
    """
    modules = dict(model.named_modules())
    for module in adapter.plan.modules:
        target = modules.get(module.path)
        if target is None:
            close = nearest(module.path, modules)
            raise LorakitError(
                f"the adapter has tensors for {module.path}, a module this model does not have"
                + (f" (nearest: {close[0]})" if close else "")
                + "; it was made for another base"
            )
        kind = kind_of(target)
        if kind is None:
            raise LorakitError(f"the adapter has tensors for {module.path}, a {type(target).__name__}: not a target")
        fan_in, fan_out = kind.features(target)
        if (fan_in, fan_out) != (module.in_features, module.out_features):
            raise LorakitError(
                f"the adapter's {module.path} is {module.out_features}x{module.in_features}, this model's is "
                f"{fan_out}x{fan_in}; it was made for another base"
            )
