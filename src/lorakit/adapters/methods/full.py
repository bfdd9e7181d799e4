"""Full fine-tuning: every parameter of the base is trained. The yardstick, and pretraining."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, NoReturn

import torch
from torch import nn

from lorakit.adapters.methods.base import Method
from lorakit.adapters.plan import AdapterPlan, ModulePlan, Shape
from lorakit.errors import LorakitError


@dataclass(frozen=True)
class Full(Method):
    """Train the base itself. There is no adapter: the result is a whole model."""

    name: ClassVar[str] = "full"
    trains_base: ClassVar[bool] = True

    def plan(self, model: nn.Module) -> AdapterPlan:
        return AdapterPlan(self, ())

    def shapes(self, module: ModulePlan) -> dict[str, Shape]:
        return {}

    def build(
        self, module: ModulePlan, target: nn.Module, tensors: Mapping[str, torch.Tensor] | None, seed: int
    ) -> NoReturn:
        raise LorakitError("full fine-tuning has no adapter to mount; it trains the base itself")

    def delta(
        self, module: ModulePlan, tensors: Mapping[str, torch.Tensor], weight: torch.Tensor | None = None
    ) -> NoReturn:
        raise LorakitError("full fine-tuning has no low-rank update")
