"""Which rows make up which step: a pure function of (row lengths, seed, epoch).

So the position in the data is one integer, and a resumed run meets the same rows.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence

import torch


def epoch_order(lengths: Sequence[int], seed: int, epoch: int, grouped: int = 0) -> list[int]:
    """The order of rows in one epoch.

    Args:
        grouped: rows of similar length are brought together in runs of this many (for padded
            batches); 0 shuffles freely (packed rows need no grouping).
    """
    digest = hashlib.sha256(f"order:{seed}:{epoch}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    order = torch.randperm(len(lengths), generator=generator).tolist()
    if grouped > 1:
        window = grouped * 16
        chunks = [sorted(order[i : i + window], key=lambda r: lengths[r]) for i in range(0, len(order), window)]
        runs = [chunk[i : i + grouped] for chunk in chunks for i in range(0, len(chunk), grouped)]
        shuffle = torch.randperm(len(runs), generator=generator).tolist()
        order = [row for run in shuffle for row in runs[run]]
    return order


class BatchPlan:
    """The rows of every step of a run.

    Args:
        lengths: of all rows, in tokens.
        batch_size: rows a step.
        seed: of the order.
        grouped: see `epoch_order`.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int, grouped: bool = False):
        self.lengths = lengths
        self.batch_size = min(batch_size, len(lengths))
        self.seed = seed
        self.grouped = grouped
        self._epoch: int | None = None
        self._order: list[int] = []

    @property
    def steps_per_epoch(self) -> int:
        return -(-len(self.lengths) // self.batch_size)

    def step(self, index: int) -> list[int]:
        """The rows of step `index`, counted from 0 over all epochs. The last of an epoch may be short."""
        epoch, place = divmod(index, self.steps_per_epoch)
        if epoch != self._epoch:
            self._order = epoch_order(self.lengths, self.seed, epoch, self.batch_size if self.grouped else 0)
            self._epoch = epoch
        return self._order[place * self.batch_size : (place + 1) * self.batch_size]


def micro_batches(
    rows: Sequence[int], cost: Callable[[Sequence[int]], int], limit: int, parts: int = 1
) -> list[list[int]]:
    """Cut a step's rows into forward passes of at most `limit` token positions, and at least `parts`.

    The gradient does not depend on the cut: every part is divided by the whole step's loss tokens.
    """
    size = -(-len(rows) // max(1, parts))
    result: list[list[int]] = []
    for start in range(0, len(rows), size):
        current: list[int] = []
        for row in rows[start : start + size]:
            if current and cost([*current, row]) > limit:
                result.append(current)
                current = []
            current.append(row)
        result.append(current)
    return result
