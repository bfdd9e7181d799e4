"""DoRA: μ ⊙ (W + s·B·A) / ‖W + s·B·A‖ by row (Liu et al. 2024, arXiv 2402.09353).

The norm is held constant in the backward (their eq. 11). It is computed from the thin matrices,

    ‖W + s·B·A‖² = ‖W‖² + 2s·Σ (W·Aᵀ)⊙B + s²·Σ (B·(A·Aᵀ))⊙B      (sums along rows),

so W + s·B·A is never made.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from lorakit.adapters.delta import delta
from lorakit.adapters.methods.lora import LoRA, LoraState, weight_of
from lorakit.adapters.plan import ModulePlan, Shape
from lorakit.errors import LorakitError


class DoraState(LoraState):
    """A low-rank pair and the magnitude μ (out,) of one module."""

    def __init__(self, plan: ModulePlan, tensors: Mapping[str, torch.Tensor], target: nn.Module):
        super().__init__(plan, tensors)
        self.magnitude = nn.Parameter(tensors["magnitude"])
        self._target: Any = (target,)  # in a tuple: a reference, not a submodule

    def row_norms(self) -> torch.Tensor:
        """‖W + s·B·A‖ by row, (out,), fp32, without a gradient."""
        with torch.no_grad():
            weight = weight_of(self.plan, self._target[0]).to(self.lora_A.dtype)
            return row_norms(weight, self.lora_A, self.lora_B, self.plan.scale)

    def forward(self, x: torch.Tensor, base: torch.Tensor, y: torch.Tensor, weight: float) -> torch.Tensor:
        bias = getattr(self._target[0], "bias", None)
        linear = base if bias is None else base - bias
        gain = (self.magnitude / self.row_norms()).to(base.dtype)
        # W'x - Wx = (gain - 1)·Wx + gain·s·BAx
        return y + weight * (gain * self._add(x, linear, self._factor) - linear)


def row_norms(weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scale: float) -> torch.Tensor:
    """‖W + s·B·A‖ by row: W (out, in), A (r, in), B (out, r) → (out,)."""
    squares = weight.square().sum(1)
    squares = squares + 2 * scale * ((weight @ a.t()) * b).sum(1) + scale**2 * ((b @ (a @ a.t())) * b).sum(1)
    return squares.clamp_min(torch.finfo(squares.dtype).tiny).sqrt()


@dataclass(frozen=True)
class DoRA(LoRA):
    """Weight-decomposed LoRA: as `LoRA`, and a trained magnitude for each output."""

    name: ClassVar[str] = "dora"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.init not in ("uniform", "gaussian"):
            raise LorakitError(f"init: {self.init} changes what DoRA's magnitude refers to; use uniform or gaussian")

    def shapes(self, module: ModulePlan) -> dict[str, Shape]:
        return {**super().shapes(module), "magnitude": (module.out_features,)}

    def build(
        self, module: ModulePlan, target: nn.Module, tensors: Mapping[str, torch.Tensor] | None, seed: int
    ) -> DoraState:
        made = self.tensors_for(module, target, tensors, seed)
        if "magnitude" not in made:
            made["magnitude"] = weight_of(module, target).detach().float().norm(dim=1)
        return DoraState(module, made, target)

    def delta(
        self, module: ModulePlan, tensors: Mapping[str, torch.Tensor], weight: torch.Tensor | None = None
    ) -> torch.Tensor:
        if weight is None:
            raise LorakitError(f"the update of DoRA on {module.path} depends on the base's weight; give it")
        moved = weight.float() + delta(module, tensors["lora_A"], tensors["lora_B"])
        return (tensors["magnitude"].float() / moved.norm(dim=1))[:, None] * moved - weight.float()
