"""Optimisers and the learning-rate schedule."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from lorakit.errors import LorakitError
from lorakit.recipes.schema import Recipe


def lr_factor(step: int, total: int, schedule: str, warmup_ratio: float, floor: float = 0.0) -> float:
    """The share of the peak rate at a step (counted from 0): a pure function, so nothing is resumed.

    Linear warm-up over the first ``warmup_ratio·total`` steps, then down to `floor` at the end.
    """
    warmup = round(warmup_ratio * total)
    if step < warmup:
        return (step + 1) / warmup
    if schedule == "constant":
        return 1.0
    progress = (step - warmup) / max(1, total - warmup)
    falling = 1 - progress if schedule == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
    return floor + (1 - floor) * falling


def _adamw(parameters: list[nn.Parameter], recipe: Recipe) -> torch.optim.Optimizer:
    options: dict[str, Any] = {
        "lr": recipe.lr, "betas": recipe.betas, "eps": recipe.eps, "weight_decay": recipe.weight_decay,
    }  # fmt: skip
    try:
        return torch.optim.AdamW(parameters, fused=True, **options)
    except RuntimeError:  # a device without the fused kernel
        return torch.optim.AdamW(parameters, **options)


def build_optimizers(named: Iterable[tuple[str, nn.Parameter]], recipe: Recipe) -> list[torch.optim.Optimizer]:
    """AdamW; or Muon for the body's matrices and AdamW for everything else.

    Muon: Jordan et al. 2024 (momentum orthogonalised by Newton-Schulz), as in torch; its rate is
    scaled to AdamW's update size, so that one `lr` serves both.
    """
    parameters = [(name, p) for name, p in named if p.requires_grad]
    if recipe.optimizer == "adamw":
        if recipe.lr_b_ratio == 1:
            return [_adamw([p for _, p in parameters], recipe)]
        # LoRA+ (Hayou et al. 2024, arXiv 2402.12354): B learns faster than A.
        sides: dict[float, list[nn.Parameter]] = {1.0: [], recipe.lr_b_ratio: []}
        for name, p in parameters:
            sides[recipe.lr_b_ratio if name.endswith("lora_B") else 1.0].append(p)
        made = [_adamw(side, recipe) for side in sides.values() if side]
        for optimizer, ratio in zip(made, (r for r, side in sides.items() if side), strict=True):
            optimizer.param_groups[0]["ratio"] = ratio
        return made
    if recipe.method != "full":
        raise LorakitError("optimizer: muon is for method full; adapters are trained with adamw")

    def is_matrix(name: str, parameter: nn.Parameter) -> bool:
        return parameter.ndim == 2 and not any(word in name for word in ("embed", "lm_head", "wte", "wpe"))

    matrices = [p for name, p in parameters if is_matrix(name, p)]
    others = [p for name, p in parameters if not is_matrix(name, p)]
    assert recipe.lr is not None
    muon = torch.optim.Muon(
        matrices, lr=recipe.lr, weight_decay=recipe.weight_decay, momentum=0.95, adjust_lr_fn="match_rms_adamw"
    )
    return [muon, _adamw(others, recipe)]
