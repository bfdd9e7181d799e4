"""Cross-entropy in chunks: no (tokens × vocabulary) tensor ever lives whole."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

#: Elements of one chunk's logits: 16 M is 64 MB in fp32.
CHUNK_ELEMENTS = 1 << 24


class _ChunkedLoss(torch.autograd.Function):
    """Σ −log p(label), with the gradients taken chunk by chunk during the forward.

    The head runs once per chunk: its gradient is asked for at once, while the chunk's logits still
    exist, and only scaled in the backward. Works for any head (plain, adapted, quantised), since
    autograd itself differentiates it.
    """

    @staticmethod
    def forward(
        ctx: Any,
        head: Callable[[torch.Tensor], torch.Tensor],
        rows: int,
        training: bool,
        hidden: torch.Tensor,
        labels: torch.Tensor,
        *parameters: torch.Tensor,
    ) -> torch.Tensor:
        # Autograd is off in here, so the caller says whether gradients are wanted at all.
        wants = [training and p.requires_grad for p in parameters]
        wanted = [p for p, want in zip(parameters, wants, strict=True) if want]
        sums: list[torch.Tensor | None] = [None] * len(wanted)
        hidden_grad = torch.empty_like(hidden) if training and hidden.requires_grad else None
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        with torch.enable_grad():
            for start in range(0, len(hidden), rows):
                piece = hidden[start : start + rows].detach().requires_grad_(hidden_grad is not None)
                loss = F.cross_entropy(head(piece).float(), labels[start : start + rows], reduction="sum")
                total += loss.detach()
                inputs = ([piece] if hidden_grad is not None else []) + wanted
                if not inputs:
                    continue
                grads = list(torch.autograd.grad(loss, inputs, allow_unused=True))
                if hidden_grad is not None:
                    hidden_grad[start : start + rows] = grads.pop(0)
                for i, grad in enumerate(grads):
                    if grad is not None:
                        before = sums[i]
                        sums[i] = grad if before is None else before + grad
        ctx.save_for_backward(hidden_grad, *sums)
        ctx.wants = wants
        return total

    @staticmethod
    def backward(ctx: Any, *upstream: torch.Tensor) -> tuple[Any, ...]:
        (scale,) = upstream
        hidden_grad, *sums = ctx.saved_tensors
        rest = iter(sums)
        parameter_grads = []
        for want in ctx.wants:
            grad = next(rest) if want else None
            parameter_grads.append(None if grad is None else grad * scale.to(grad.dtype))
        scaled = None if hidden_grad is None else hidden_grad * scale.to(hidden_grad.dtype)
        return None, None, None, scaled, None, *parameter_grads


def loss_sum(head: nn.Module, hidden: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Σ −log p(label) over the loss tokens, in nats, as a scalar with gradients.

    Args:
        head: hidden (n, d) → logits (n, vocabulary).
        hidden: (L, d), the positions that predict a trained token.
        labels: (L,).
    """
    vocabulary = getattr(head, "out_features", None) or head(hidden[:1].detach()).shape[-1]
    rows = max(1, CHUNK_ELEMENTS // vocabulary)
    result = _ChunkedLoss.apply(head, rows, torch.is_grad_enabled(), hidden, labels, *head.parameters())
    assert isinstance(result, torch.Tensor)
    return result
