"""Where A and B begin: pure functions of the plan, the seed and (for some) the weight.

Whatever they are, ΔW is zero at the start and the base is not touched. PiSSA and OLoRA begin at a part
of W itself; that part is kept beside the pair, frozen, and subtracted: ΔW = s·(B·A − B₀·A₀).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable

import torch

from lorakit.adapters.plan import ModulePlan
from lorakit.errors import LorakitError, did_you_mean

Pair = tuple[torch.Tensor, torch.Tensor]


def _generator(module: ModulePlan, seed: int) -> torch.Generator:
    """Randomness from (seed, path) alone, so that it is the same whatever else is targeted."""
    digest = hashlib.sha256(f"{seed}:{module.path}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def uniform(module: ModulePlan, seed: int) -> Pair:
    """A uniform in ±1/√d_in, B zero ("LoRA Without Regret"; PEFT's default)."""
    bound = 1 / math.sqrt(module.in_features)
    a = (torch.rand(module.rank, module.in_features, generator=_generator(module, seed)) * 2 - 1) * bound
    return a, torch.zeros(module.out_features, module.rank)


def gaussian(module: ModulePlan, seed: int) -> Pair:
    """A normal with deviation 1/r, B zero (as PEFT's "gaussian")."""
    a = torch.randn(module.rank, module.in_features, generator=_generator(module, seed)) / module.rank
    return a, torch.zeros(module.out_features, module.rank)


def lookup(module: ModulePlan, seed: int) -> Pair:
    """For an embedding, whose A is looked up by row: A zero, B normal (as PEFT and loralib)."""
    b = torch.randn(module.out_features, module.rank, generator=_generator(module, seed))
    return torch.zeros(module.rank, module.in_features), b


def pissa(module: ModulePlan, weight: torch.Tensor) -> Pair:
    """s·B·A is the best rank-r part of W (Meng et al. 2024, arXiv 2404.02948).

    Args:
        weight: (out, in), fp32.
    """
    u, s, vh = torch.linalg.svd(weight, full_matrices=False)
    root = (s[: module.rank] / module.scale).sqrt()
    return root[:, None] * vh[: module.rank], u[:, : module.rank] * root


def olora(module: ModulePlan, weight: torch.Tensor) -> Pair:
    """B and A are the first columns and rows of W = Q·R (Büyükakyüz 2024, arXiv 2406.01775)."""
    q, r = torch.linalg.qr(weight)
    return r[: module.rank].contiguous(), q[:, : module.rank].contiguous()


_RANDOM: dict[str, Callable[[ModulePlan, int], Pair]] = {"uniform": uniform, "gaussian": gaussian}
_FROM_WEIGHT: dict[str, Callable[[ModulePlan, torch.Tensor], Pair]] = {"pissa": pissa, "olora": olora}
INITS = (*_RANDOM, *_FROM_WEIGHT)


def check_init(name: str) -> None:
    """Refuse an initialiser that does not exist, naming the nearest."""
    if name not in INITS:
        raise LorakitError(f"init: {name!r} is none of {', '.join(INITS)}. {did_you_mean(name, INITS)}")


def initial(module: ModulePlan, seed: int, name: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """The tensors of a fresh pair; with ``start_A`` and ``start_B`` where it begins inside W.

    Args:
        weight: of the target, (out, in).
    """
    if name in _FROM_WEIGHT:
        if module.rank > min(weight.shape):
            raise LorakitError(
                f"init: {name} takes the first {module.rank} directions of {module.path}, which has only "
                f"{min(weight.shape)}; lower the rank there"
            )
        a, b = _FROM_WEIGHT[name](module, weight.detach().float())
        return {"lora_A": a, "lora_B": b, "start_A": a.clone(), "start_B": b.clone()}
    a, b = lookup(module, seed) if module.kind == "embedding" else _RANDOM[name](module, seed)
    return {"lora_A": a, "lora_B": b}
