"""Immutable plans: what an adapter will be, known before any module is touched.

The same plan is mounted, counted, saved and checked on loading, so a figure that is printed
before training is the figure that is found on disk after it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from lorakit.adapters.methods.base import Method

Shape = tuple[int, ...]


@dataclass(frozen=True)
class ModulePlan:
    """One target module and the adapter it will carry.

    `in_features` and `out_features` are those of the map y = x·Wᵀ, whatever the layout of the
    stored weight: an embedding maps vocabulary → width. `gain` is what the module itself multiplies
    W·x with (a scaled embedding), which the update has to follow.
    """

    path: str
    kind: str
    in_features: int
    out_features: int
    rank: int
    alpha: float
    scale: float
    dropout: float = 0.0
    gain: float = 1.0


@dataclass(frozen=True)
class AdapterPlan:
    """All modules of one adapter, in the model's order, and the method that made the plan."""

    method: Method
    modules: tuple[ModulePlan, ...]

    @property
    def paths(self) -> tuple[str, ...]:
        return tuple(module.path for module in self.modules)

    def shapes(self) -> dict[str, Shape]:
        """Every tensor of the adapter: ``{"<path>.<tensor>": shape}``."""
        return {
            f"{module.path}.{name}": shape
            for module in self.modules
            for name, shape in self.method.shapes(module).items()
        }

    @property
    def trainable_parameters(self) -> int:
        """The exact count, Σ r·(d_in + d_out) for LoRA."""
        return sum(math.prod(shape) for shape in self.shapes().values())


@dataclass(frozen=True)
class Adapter:
    """An adapter as data: its plan and its tensors, with no model in memory.

    `tensors` maps a module's path to its named tensors (``{"lora_A": …, "lora_B": …}``).
    `record` is what PEFT's format cannot say (base, template, data); see `lorakit.json`.
    """

    plan: AdapterPlan
    tensors: Mapping[str, Mapping[str, torch.Tensor]]
    record: Mapping[str, object]

    def delta(self, path: str, weight: torch.Tensor | None = None) -> torch.Tensor:
        """ΔW of one module in fp32, shape (out_features, in_features).

        Args:
            weight: the target's, (out_features, in_features); needed where ΔW depends on it (DoRA).
        """
        module = next(m for m in self.plan.modules if m.path == path)
        return self.plan.method.delta(module, self.tensors[path], weight)
