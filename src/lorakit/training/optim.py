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


def _adamw(parameters: Any, recipe: Recipe) -> torch.optim.Optimizer:
    """AdamW over parameters, or over groups of them; fused where the device has it."""
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
        # LoRA+ (Hayou et al. 2024, arXiv 2402.12354): B learns `ratio` times as fast as the rest.
        sides = (
            {"params": [p for name, p in parameters if name.endswith("lora_B") == is_b], "ratio": ratio}
            for is_b, ratio in ((False, 1.0), (True, recipe.lr_b_ratio))
        )
        return [_adamw([side for side in sides if side["params"]], recipe)]
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
