"""Attention of packed rows: each document by itself, through transformers' public interfaces.

`AttentionMaskInterface` hands us the model's own mask rule (causal, sliding, chunked); we keep the
rule instead of a dense (T, T) mask and evaluate it over each document's own square. Anything this
does not understand raises `UnsupportedAttention`; it never answers approximately.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

NAME = "lorakit_packed"

# Keyword arguments of transformers' attention functions that do not change the result here.
_HARMLESS = {"position_ids", "use_cache", "output_attentions", "cache_position", "sliding_window", "return_dict"}


class UnsupportedAttention(Exception):
    """The model asks its attention for something the packed form does not offer."""


class DocumentMask:
    """A mask rule f(batch, head, query, key) → bool, evaluated per document at its own positions."""

    def __init__(self, rule: Callable[..., torch.Tensor], device: torch.device):
        self._rule = rule
        self._device = device
        self._blocks: dict[int, torch.Tensor | None] = {}

    def block(self, length: int) -> torch.Tensor | None:
        """(length, length) bool, or None when it is the plain causal triangle."""
        if length not in self._blocks:
            index = torch.arange(length, device=self._device)
            zero = index.new_zeros(())
            allowed = self._rule(zero, zero, index[:, None], index[None, :]).expand(length, length)
            causal = torch.ones_like(allowed).tril()
            self._blocks[length] = None if torch.equal(allowed, causal) else allowed
        return self._blocks[length]


def _mask(
    *args: Any,
    mask_function: Callable[..., torch.Tensor] | None = None,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    **kwargs: Any,
) -> DocumentMask:
    if use_vmap or mask_function is None:
        raise UnsupportedAttention("a mask that is not a function of positions")
    return DocumentMask(mask_function, torch.device(device))


def _attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Any,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    document_lengths: tuple[int, ...] | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """query (1, heads, T, d), key and value (1, kv heads, T, d) → (1, T, heads, d)."""
    unknown = [k for k, v in kwargs.items() if k not in _HARMLESS and v is not None]
    if unknown:
        raise UnsupportedAttention(f"attention arguments {', '.join(unknown)}")
    if not isinstance(attention_mask, DocumentMask) or document_lengths is None:
        raise UnsupportedAttention("the model does not pass keyword arguments on to its attention")
    if is_causal is False or sum(document_lengths) != query.shape[2] or key.shape[2] != query.shape[2]:
        raise UnsupportedAttention("attention that is not causal self-attention over the packed row")
    pieces = []
    grouped = key.shape[1] != query.shape[1]
    for q, k, v in zip(*(t.split(document_lengths, dim=2) for t in (query, key, value)), strict=True):
        block = attention_mask.block(q.shape[2])
        pieces.append(
            F.scaled_dot_product_attention(
                q, k, v, attn_mask=block, is_causal=block is None, dropout_p=dropout, scale=scaling, enable_gqa=grouped
            )
        )
    return torch.cat(pieces, dim=2).transpose(1, 2), None


def register() -> None:
    """Make the packed attention known to transformers (public registries; nothing is patched)."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, _attention)
    AttentionMaskInterface.register(NAME, _mask)


@contextlib.contextmanager
def packed_attention(model: Any) -> Iterator[None]:
    """The model attends per document inside the block, and as before after it."""
    register()
    before = model.config._attn_implementation
    model.set_attn_implementation(NAME)
    try:
        yield
    finally:
        model.set_attn_implementation(before)
