"""LoRA and rsLoRA: y + s·x·Aᵀ·Bᵀ (arXiv 2106.09685; s = α/√r in arXiv 2312.03732)."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from lorakit.adapters.delta import add_low_rank, delta
from lorakit.adapters.kinds import KINDS, kind_of
from lorakit.adapters.methods.base import Method, ModuleState
from lorakit.adapters.plan import AdapterPlan, ModulePlan, Shape
from lorakit.adapters.targets import ALL_LINEAR, Targets, check_patterns, pattern_value, resolve_targets
from lorakit.errors import LorakitError


class LoraState(ModuleState):
    """A (r, in) and B (out, r) of one module, with the scale fixed by the plan."""

    def __init__(self, plan: ModulePlan, a: torch.Tensor, b: torch.Tensor):
        super().__init__()
        self.plan = plan
        self.lora_A = nn.Parameter(a)
        self.lora_B = nn.Parameter(b)
        self._project = KINDS[plan.kind].project
        self._factor = plan.scale * plan.gain

    def forward(self, x: torch.Tensor, y: torch.Tensor, weight: float) -> torch.Tensor:
        if self.plan.dropout and self.training and x.is_floating_point():
            x = F.dropout(x, self.plan.dropout)
        return add_low_rank(y, self._project(x, self.lora_A), self.lora_B, weight * self._factor)


@dataclass(frozen=True)
class LoRA(Method):
    """Low-rank adaptation: W + s·B·A with W frozen.

    Args:
        rank: r, the inner width of the pair.
        alpha: numerator of the scale. 32 with s = α/r is what "LoRA Without Regret" found good at
            every rank.
        targets: see `resolve_targets`.
        exclude: names taken out of the targets.
        dropout: on the adapter's input. Off by default: it costs a copy of the input per target.
        use_rslora: s = α/√r instead of α/r.
        rank_pattern, alpha_pattern: values for the modules whose path ends in a match of the key
            (a regular expression); the first key that matches counts, as in PEFT.
    """

    name: ClassVar[str] = "lora"

    rank: int = 16
    alpha: float = 32.0
    targets: Targets = ALL_LINEAR
    exclude: Sequence[str] = ()
    dropout: float = 0.0
    use_rslora: bool = False
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for label, value in [("rank", self.rank), *((f"rank_pattern[{k!r}]", v) for k, v in self.rank_pattern.items())]:
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise LorakitError(f"{label}: must be a whole number of at least 1, not {value!r}")
        for label, alpha in [
            ("alpha", self.alpha),
            *((f"alpha_pattern[{k!r}]", v) for k, v in self.alpha_pattern.items()),
        ]:
            if not math.isfinite(alpha) or alpha <= 0:
                raise LorakitError(f"{label}: must be a positive number, not {alpha!r}")
        if not 0 <= self.dropout < 1:
            raise LorakitError(f"dropout: must be in [0, 1), not {self.dropout!r}")

    def scale(self, rank: int, alpha: float) -> float:
        return alpha / math.sqrt(rank) if self.use_rslora else alpha / rank

    def plan(self, model: nn.Module) -> AdapterPlan:
        paths = resolve_targets(model, self.targets, self.exclude)
        check_patterns("rank_pattern", self.rank_pattern, paths)
        check_patterns("alpha_pattern", self.alpha_pattern, paths)
        return AdapterPlan(self, tuple(self.plan_module(path, model.get_submodule(path)) for path in paths))

    def plan_module(self, path: str, module: nn.Module, rank: int | None = None) -> ModulePlan:
        """The plan of one target; `rank` overrides what the patterns say (used on loading)."""
        kind = kind_of(module)
        assert kind is not None, path
        fan_in, fan_out = kind.features(module)
        rank = rank or pattern_value(self.rank_pattern, path) or self.rank
        if rank > max(fan_in, fan_out):
            raise LorakitError(
                f"rank: {rank} is larger than {path} itself ({fan_out}x{fan_in}); "
                f"a low-rank adapter there has rank below {min(fan_in, fan_out)}"
            )
        alpha = float(pattern_value(self.alpha_pattern, path) or self.alpha)
        return ModulePlan(
            path, kind.name, fan_in, fan_out, rank, alpha, self.scale(rank, alpha), self.dropout, kind.gain(module)
        )

    def shapes(self, module: ModulePlan) -> dict[str, Shape]:
        return {"lora_A": (module.rank, module.in_features), "lora_B": (module.out_features, module.rank)}

    def build(
        self, module: ModulePlan, target: nn.Module, tensors: Mapping[str, torch.Tensor] | None, seed: int
    ) -> LoraState:
        device = next(target.parameters()).device
        if tensors is None:
            tensors = initial(module, seed)
        # fp32 masters whatever the base's precision; the copy keeps the caller's tensors apart.
        a, b = (tensors[name].detach().to(device, torch.float32, copy=True) for name in ("lora_A", "lora_B"))
        return LoraState(module, a, b)

    def delta(self, module: ModulePlan, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
        return delta(module, tensors["lora_A"], tensors["lora_B"])


def initial(module: ModulePlan, seed: int) -> dict[str, torch.Tensor]:
    """Initial A and B, with ΔW = 0.

    A uniform in ±1/√d_in and B zero; for an embedding, whose A is looked up by row, A zero and
    B normal (as PEFT and loralib have it). The values depend on (seed, path) alone, so that they
    are the same whatever else is targeted.
    """
    digest = hashlib.sha256(f"{seed}:{module.path}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    shape_a, shape_b = (module.rank, module.in_features), (module.out_features, module.rank)
    if module.kind == "embedding":
        return {"lora_A": torch.zeros(shape_a), "lora_B": torch.randn(shape_b, generator=generator)}
    bound = 1 / math.sqrt(module.in_features)
    uniform = (torch.rand(shape_a, generator=generator) * 2 - 1) * bound
    return {"lora_A": uniform, "lora_B": torch.zeros(shape_b)}
