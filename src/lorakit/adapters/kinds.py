"""Layer kinds: how a low-rank update sits on each sort of module.

A kind says three things: the features of the map, how the update is applied to an activation,
and how ΔW, always (out, in), is viewed in the layout of the stored weight. The maths of ΔW itself
is in `delta.py`. Floors above register further kinds (quantised linears) with `register_kind`.
"""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear


class Kind(Protocol):
    """How a low-rank pair A (r, in), B (out, r) is used on one sort of module."""

    name: str

    def matches(self, module: nn.Module) -> bool: ...

    def features(self, module: nn.Module) -> tuple[int, int]:
        """(in_features, out_features) of the map."""
        ...

    def project(self, x: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
        """x·Aᵀ: a flat input of the module (tokens, …) → (tokens, r), in x's precision."""
        ...

    def gain(self, module: nn.Module) -> float:
        """What the module multiplies W·x with by itself; ΔW·x has to be multiplied alike."""
        ...

    def as_weight(self, delta: torch.Tensor) -> torch.Tensor:
        """ΔW (out, in) → the layout of the module's own weight."""
        ...


class LinearKind:
    """`nn.Linear`: weight (out, in).

    Not the output projection inside `nn.MultiheadAttention`, whose weight is read without its forward.
    """

    name = "linear"

    def matches(self, module: nn.Module) -> bool:
        return isinstance(module, nn.Linear) and not isinstance(module, NonDynamicallyQuantizableLinear)

    def features(self, module: nn.Module) -> tuple[int, int]:
        assert isinstance(module, nn.Linear)
        return module.in_features, module.out_features

    def project(self, x: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
        return x @ a.to(x.dtype).t()

    def gain(self, module: nn.Module) -> float:
        return 1.0

    def as_weight(self, delta: torch.Tensor) -> torch.Tensor:
        return delta


class Conv1DKind(LinearKind):
    """`transformers.pytorch_utils.Conv1D` (GPT-2): a linear layer whose weight is (in, out).

    Recognised by its shape and not by its class, so that this floor needs torch alone.
    """

    name = "conv1d"

    def matches(self, module: nn.Module) -> bool:
        return (
            any(cls.__name__ == "Conv1D" for cls in type(module).__mro__)
            and hasattr(module, "nf")
            and getattr(module, "weight", torch.empty(0)).ndim == 2
        )

    def features(self, module: nn.Module) -> tuple[int, int]:
        weight = module.weight
        assert isinstance(weight, torch.Tensor)
        return weight.shape[0], weight.shape[1]

    def as_weight(self, delta: torch.Tensor) -> torch.Tensor:
        return delta.t()


class EmbeddingKind:
    """`nn.Embedding`: weight (vocabulary, width); the map is vocabulary → width.

    A subclass with a forward of its own may look up something else than its input (OPT's positions
    add an offset); only scaled embeddings (Gemma, BART), which say so in `embed_scale`, are known.
    """

    name = "embedding"

    def matches(self, module: nn.Module) -> bool:
        if not isinstance(module, nn.Embedding):
            return False
        mro = type(module).__mro__
        own = [
            c
            for c in mro[: mro.index(nn.Embedding)]
            if "forward" in vars(c) and c.__module__ != "lorakit.adapters.sites"
        ]
        return not own or hasattr(module, "embed_scale")

    def features(self, module: nn.Module) -> tuple[int, int]:
        assert isinstance(module, nn.Embedding)
        return module.num_embeddings, module.embedding_dim

    def project(self, x: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
        return F.embedding(x, a.t())

    def gain(self, module: nn.Module) -> float:
        return float(getattr(module, "embed_scale", 1.0))

    def as_weight(self, delta: torch.Tensor) -> torch.Tensor:
        return delta.t()


KINDS: dict[str, Kind] = {}


def register_kind(kind: Kind) -> None:
    """Add a kind; the latest registered is asked first, so that a subclass can be more exact."""
    KINDS[kind.name] = kind


for _kind in (LinearKind(), Conv1DKind(), EmbeddingKind()):
    register_kind(_kind)


def kind_of(module: nn.Module) -> Kind | None:
    """The kind of a module, or None when no adapter can sit on it."""
    return next((kind for kind in reversed(KINDS.values()) if kind.matches(module)), None)
