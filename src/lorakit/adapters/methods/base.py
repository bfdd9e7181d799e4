"""What a method of fine-tuning has to say for itself.

A method is an immutable description (`LoRA(rank=16)`). It makes a plan from a model, says which
tensors a planned module carries, and installs the trainable state. Adding one is a file in this
folder and a line in `METHODS`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from lorakit.adapters.plan import AdapterPlan, ModulePlan, Shape


class ModuleState(nn.Module, ABC):
    """The trainable tensors of one adapter on one module, and how they act."""

    plan: ModulePlan

    @abstractmethod
    def forward(self, x: torch.Tensor, base: torch.Tensor, y: torch.Tensor, weight: float) -> torch.Tensor:
        """The output with this adapter added to it.

        Args:
            x: flat input of the module, (tokens, …).
            base: what the module itself gave, (tokens, out).
            y: the output so far: `base`, and what other adapters of a mix have added.
            weight: the adapter's share in a mix; 1.0 when it acts alone.
        """

    def tensors(self) -> dict[str, torch.Tensor]:
        """The tensors by the names of `Method.shapes`."""
        return dict(self.named_parameters(recurse=False))


@dataclass(frozen=True)
class Method(ABC):
    """Base of every method."""

    name: ClassVar[str]
    #: True when the base itself is trained, and no adapter is installed.
    trains_base: ClassVar[bool] = False

    @abstractmethod
    def plan(self, model: nn.Module) -> AdapterPlan:
        """The immutable plan of this method on a model (weights not needed: meta tensors do)."""

    @abstractmethod
    def shapes(self, module: ModulePlan) -> dict[str, Shape]:
        """The tensors of one planned module."""

    @abstractmethod
    def build(
        self, module: ModulePlan, target: nn.Module, tensors: Mapping[str, torch.Tensor] | None, seed: int
    ) -> ModuleState:
        """The state for one module: from given tensors, or at its initial values."""

    @abstractmethod
    def delta(
        self, module: ModulePlan, tensors: Mapping[str, torch.Tensor], weight: torch.Tensor | None = None
    ) -> torch.Tensor:
        """ΔW in fp32, (out, in), for methods that have one.

        Args:
            weight: the target's, (out, in), for methods whose update depends on it.
        """
