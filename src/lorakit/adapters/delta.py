"""The one update: ΔW = s·B·A.

Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models", arXiv 2106.09685, eq. 3;
s = α/r there, α/√r in Kalajdzievski 2023 (rsLoRA, arXiv 2312.03732).
"""

from __future__ import annotations

import torch

from lorakit.adapters.plan import ModulePlan


def delta(plan: ModulePlan, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """ΔW in fp32 (float64 stays float64), shape (out_features, in_features).

    Args:
        plan: gives the scale.
        a: (rank, in_features).
        b: (out_features, rank).
    """
    wide = torch.promote_types(a.dtype, torch.float32)
    return plan.scale * (b.to(wide) @ a.to(wide))


def add_low_rank(y: torch.Tensor, xa: torch.Tensor, b: torch.Tensor, scale: float) -> torch.Tensor:
    """y + scale·xa·Bᵀ in one fused product: y (tokens, out), xa (tokens, r), b (out, r)."""
    return torch.addmm(y, xa.to(y.dtype), b.to(y.dtype).t(), alpha=scale)
