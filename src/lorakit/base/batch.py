"""Rows of tokens and how several of them become one forward pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class TokenRow:
    """One document: `input_ids` (n,) int64 and `loss_mask` (n,) bool, True on trained tokens.

    The first token is never trained: nothing comes before it to predict it from.
    """

    input_ids: torch.Tensor
    loss_mask: torch.Tensor

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def loss_tokens(self) -> int:
        return int(self.loss_mask[1:].sum())


@dataclass(frozen=True)
class Batch:
    """Tensors of one forward pass.

    Attributes:
        input_ids: (1, T) when packed, (B, S) when padded.
        position_ids: same shape; restarts at 0 with every document.
        attention_mask: same shape, 1 on real tokens.
        lengths: of the documents, in order.
        sources: (L,) flattened positions whose output predicts a trained token.
        labels: (L,) those trained tokens.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    attention_mask: torch.Tensor
    lengths: tuple[int, ...]
    sources: torch.Tensor
    labels: torch.Tensor

    @property
    def tokens(self) -> int:
        """Real tokens, without padding."""
        return sum(self.lengths)


def pack(rows: Sequence[TokenRow], device: torch.device | str = "cpu") -> Batch:
    """All rows one after another in a single row of tokens: no padding at all."""
    lengths = tuple(len(row) for row in rows)
    ids = torch.cat([row.input_ids for row in rows])
    mask = torch.cat([torch.cat([row.loss_mask.new_zeros(1), row.loss_mask[1:]]) for row in rows])
    targets = mask.nonzero().squeeze(1)
    positions = torch.cat([torch.arange(n) for n in lengths])
    return Batch(
        input_ids=ids[None].to(device),
        position_ids=positions[None].to(device),
        attention_mask=torch.ones_like(ids)[None].to(device),
        lengths=lengths,
        sources=(targets - 1).to(device),
        labels=ids[targets].to(device),
    )


def pad(rows: Sequence[TokenRow], device: torch.device | str = "cpu") -> Batch:
    """One row each, filled up on the right; for models whose attention cannot be packed."""
    lengths = tuple(len(row) for row in rows)
    width = max(lengths)
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    attention = torch.zeros(len(rows), width, dtype=torch.long)
    mask = torch.zeros(len(rows), width, dtype=torch.bool)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = row.input_ids
        attention[i, : len(row)] = 1
        mask[i, 1 : len(row)] = row.loss_mask[1:]
    targets = mask.flatten().nonzero().squeeze(1)
    return Batch(
        input_ids=ids.to(device),
        position_ids=torch.arange(width).expand(len(rows), width).to(device),
        attention_mask=attention.to(device),
        lengths=lengths,
        sources=(targets - 1).to(device),
        labels=ids.flatten()[targets].to(device),
    )
