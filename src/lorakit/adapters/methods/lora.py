"""LoRA and rsLoRA: y + s·x·Aᵀ·Bᵀ (arXiv 2106.09685; s = α/√r in arXiv 2312.03732)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from lorakit.adapters.delta import add_low_rank, delta
from lorakit.adapters.initial import check_init, initial
from lorakit.adapters.kinds import KINDS, kind_of
from lorakit.adapters.methods.base import Method, ModuleState
from lorakit.adapters.plan import Adapter, AdapterPlan, ModulePlan, Shape
from lorakit.adapters.targets import ALL_LINEAR, Targets, check_patterns, pattern_value, resolve_targets
from lorakit.errors import LorakitError


class LoraState(ModuleState):
    """A (r, in) and B (out, r) of one module, with the scale fixed by the plan.

    `start_A` and `start_B`, if given, are a frozen pair whose product is subtracted (PiSSA, OLoRA).
    """

    def __init__(self, plan: ModulePlan, tensors: Mapping[str, torch.Tensor]):
        super().__init__()
        self.plan = plan
        self.lora_A = nn.Parameter(tensors["lora_A"])
        self.lora_B = nn.Parameter(tensors["lora_B"])
        if "start_A" in tensors:
            self.start_A = nn.Parameter(tensors["start_A"], requires_grad=False)
            self.start_B = nn.Parameter(tensors["start_B"], requires_grad=False)
        self._moved = "start_A" in tensors
        self._project = KINDS[plan.kind].project
        self._factor = plan.scale * plan.gain

    def forward(self, x: torch.Tensor, base: torch.Tensor, y: torch.Tensor, weight: float) -> torch.Tensor:
        if self._moved:
            y = add_low_rank(y, self._project(x, self.start_A), self.start_B, -weight * self._factor)
        return self._add(x, y, weight * self._factor)

    def _add(self, x: torch.Tensor, y: torch.Tensor, factor: float) -> torch.Tensor:
        if self.plan.dropout and self.training and x.is_floating_point():
            x = F.dropout(x, self.plan.dropout)
        return add_low_rank(y, self._project(x, self.lora_A), self.lora_B, factor)


def weight_of(module: ModulePlan, target: nn.Module) -> torch.Tensor:
    """The target's weight as a map, (out, in)."""
    weight = target.weight
    assert isinstance(weight, torch.Tensor)
    return KINDS[module.kind].as_weight(weight)


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
        init: ``uniform``, ``gaussian``, ``pissa`` or ``olora``; see `initial.py`.
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
    init: str = "uniform"
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
        check_init(self.init)
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
        return LoraState(module, self.tensors_for(module, target, tensors, seed))

    def tensors_for(
        self, module: ModulePlan, target: nn.Module, tensors: Mapping[str, torch.Tensor] | None, seed: int
    ) -> dict[str, torch.Tensor]:
        """Given or initial tensors, as fp32 copies beside the target.

        fp32 masters whatever the base's precision; the copies keep the caller's tensors apart.
        """
        weight = weight_of(module, target)
        if tensors is None:
            tensors = initial(module, seed, self.init, weight)
        return {
            name: torch.empty(t.shape, device=weight.device).copy_(t.detach())  # contiguous, whatever t was
            for name, t in tensors.items()
        }

    def delta(
        self, module: ModulePlan, tensors: Mapping[str, torch.Tensor], weight: torch.Tensor | None = None
    ) -> torch.Tensor:
        update = delta(module, tensors["lora_A"], tensors["lora_B"])
        return update - delta(module, tensors["start_A"], tensors["start_B"]) if "start_A" in tensors else update


def as_plain(adapter: Adapter) -> Adapter:
    """An adapter that begins inside W as a plain LoRA of twice the rank, exactly.

    s·(B·A − B₀·A₀) = s·[B, B₀]·[A; −A₀]; alpha grows so that s stays what it was. Others are given back
    as they are.
    """
    if not any("start_A" in tensors for tensors in adapter.tensors.values()):
        return adapter
    method = adapter.plan.method
    assert isinstance(method, LoRA)
    growth = math.sqrt(2) if method.use_rslora else 2.0
    modules = tuple(replace(m, rank=2 * m.rank, alpha=growth * m.alpha) for m in adapter.plan.modules)
    tensors = {
        path: {
            "lora_A": torch.cat([pair["lora_A"], -pair["start_A"]]),
            "lora_B": torch.cat([pair["lora_B"], pair["start_B"]], dim=1),
        }
        for path, pair in adapter.tensors.items()
    }
    plain = replace(method, rank=2 * method.rank, alpha=growth * method.alpha, init="uniform")
    return Adapter(AdapterPlan(plain, modules), tensors, adapter.record)
