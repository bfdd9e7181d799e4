"""The precisions a base can be held in: the seam for quantised ones.

A precision says how transformers' own loader is to be called; everything above only sees modules
with y = x·Wᵀ and its gradient. Adding int8, fp8 or NF4 is an entry here (a `quantization_config`
of a registered quantiser among its loader arguments) and a kind, if the linear is of a new class.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from lorakit.base.devices import Choice, fast_bf16
from lorakit.errors import LorakitError, did_you_mean


@dataclass(frozen=True)
class Precision:
    """How to load a base: the dtype of its weights, and further loader arguments."""

    name: str
    dtype: torch.dtype
    loader: Mapping[str, Any] = field(default_factory=dict)


PRECISIONS: dict[str, Precision] = {
    p.name: p for p in (Precision("fp32", torch.float32), Precision("bf16", torch.bfloat16))
}


def choose_precision(name: str, device: str) -> Choice:
    """``auto`` → bf16 where the hardware is fast at it, else fp32."""
    if name == "auto":
        if fast_bf16(device):
            return Choice("bf16", f"{device} multiplies bf16 natively")
        return Choice("fp32", f"{device} has no fast bf16")
    if name not in PRECISIONS:
        raise LorakitError(
            f"precision: {name!r} is none of auto, {', '.join(PRECISIONS)}. {did_you_mean(name, PRECISIONS)}"
        )
    return Choice(name, "asked for")
