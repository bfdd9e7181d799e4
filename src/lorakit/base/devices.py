"""Which device and precision a machine offers, and why one was chosen."""

from __future__ import annotations

import resource
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

from lorakit.errors import LorakitError, did_you_mean

DEVICES = ("auto", "cpu", "cuda", "mps")


@dataclass(frozen=True)
class Choice:
    """A value and the reason for it, in one line."""

    value: str
    reason: str


def choose_device(name: str = "auto") -> Choice:
    """``auto`` → cuda, then mps, then cpu. A device that is asked for and missing is an error."""
    base, _, index = name.partition(":")
    if base not in DEVICES or (index and not index.isdigit()):
        raise LorakitError(f"device: {name!r} is none of {', '.join(DEVICES)}. {did_you_mean(name, DEVICES)}")
    cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    if base == "cuda" and not cuda:
        raise LorakitError("device: cuda was asked for, but torch sees no CUDA device (see: lorakit doctor)")
    if base == "mps" and not mps:
        raise LorakitError("device: mps was asked for, but torch sees no Metal device (see: lorakit doctor)")
    if base != "auto":
        return Choice(name, "asked for")
    if cuda:
        return Choice("cuda", torch.cuda.get_device_name(0))
    if mps:
        return Choice("mps", "Apple Metal")
    return Choice("cpu", f"no GPU found; {torch.get_num_threads()} threads")


@cache
def cpu_flags() -> frozenset[str]:
    """The processor's feature flags, where the system tells them."""
    path = Path("/proc/cpuinfo")
    if not path.exists():
        return frozenset()
    line = next((line for line in path.read_text().splitlines() if line.startswith("flags")), "")
    return frozenset(line.split())


def fast_bf16(device: str) -> bool:
    """Whether bf16 matrix products are faster than fp32 ones there: detected, never assumed."""
    if device.startswith("cuda"):
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device == "cpu" and bool({"amx_bf16", "avx512_bf16"} & cpu_flags())


def peak_memory_bytes(device: str = "cpu") -> int:
    """Peak so far: of CUDA's allocator on a GPU, else of this process's resident memory."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
