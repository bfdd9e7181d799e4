"""Where adapters sit: a target module extended in place.

The module keeps its identity, its parameters and their names; its class gains one base that adds
the mounted adapters to its output (the way `torch.distributed.fsdp.fully_shard` extends modules).
So state-dict keys, tied weights and `isinstance` checks stay as they were, and taking the last
adapter off gives the original class back.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import nn

from lorakit.adapters.methods.base import ModuleState
from lorakit.adapters.route import Mix, Switch
from lorakit.errors import LorakitError


class Site(nn.Module):
    """Mixed in before a target's own class."""

    adapter_states: nn.ModuleDict
    adapter_switch: Switch

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        y = super().forward(*args, **kwargs)
        route = self.adapter_switch.current()
        if route is None:  # the base alone costs nothing
            return y
        x = args[0] if args else next(iter(kwargs.values()))
        flat_y = y.reshape(-1, y.shape[-1])
        flat_x = x.reshape(-1, x.shape[-1]) if x.is_floating_point() else x.reshape(-1)
        if route.whole is not None:
            return self._mix(flat_x, flat_y, route.whole).view_as(y)
        pieces, end = [], 0
        for start, stop, mix in route.segments_for(len(flat_y)):
            pieces.append(flat_y[end:start])
            pieces.append(self._mix(flat_x[start:stop], flat_y[start:stop], mix))
            end = stop
        pieces.append(flat_y[end:])
        return torch.cat(pieces).view_as(y)

    def _mix(self, x: torch.Tensor, base: torch.Tensor, mix: Mix) -> torch.Tensor:
        y = base
        for name, weight in mix.items():
            # An adapter need not have a tensor on every site that another one has.
            if name in self.adapter_states:
                y = self.adapter_states[name](x, base, y, weight)
        return y


def extend_class(module: nn.Module, mixin: type) -> None:
    """Put `mixin` before the module's class; the name stays, as libraries look at it."""
    cls = type(module)
    module.__class__ = type(cls.__name__, (mixin, cls), {"__module__": cls.__module__})


def restore_class(module: nn.Module) -> None:
    """Undo `extend_class`."""
    module.__class__ = type(module).__bases__[1]


def add_state(module: nn.Module, name: str, state: ModuleState, switch: Switch) -> None:
    """Mount one adapter's state on a target module."""
    if not isinstance(module, Site):
        extend_class(module, Site)
        site = cast(Site, module)
        site.adapter_states = nn.ModuleDict()
        site.adapter_switch = switch
    site = cast(Site, module)
    if site.adapter_switch is not switch:
        raise LorakitError(
            "this model, or a part of it, is already attached through another model object; "
            "attach once and mount further adapters on it"
        )
    state.train(module.training)
    site.adapter_states[name] = state


def remove_state(module: nn.Module, name: str) -> None:
    """Take one adapter off; the last one gives the module its own class back."""
    site = cast(Site, module)
    del site.adapter_states[name]
    if not len(site.adapter_states):
        del site.adapter_states, site.adapter_switch
        restore_class(site)
