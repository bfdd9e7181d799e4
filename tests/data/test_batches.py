from __future__ import annotations

from collections import Counter

import pytest

from lorakit.data.batches import BatchPlan, epoch_order, micro_batches

LENGTHS = [(7 * i) % 50 + 3 for i in range(101)]


@pytest.mark.parametrize("grouped", [False, True])
def test_every_row_once_an_epoch(grouped: bool) -> None:
    plan = BatchPlan(LENGTHS, 8, seed=3, grouped=grouped)
    assert plan.steps_per_epoch == 13
    for epoch in (0, 1):
        rows = Counter(r for i in range(13) for r in plan.step(epoch * 13 + i))
        assert rows == Counter(range(101))


def test_the_plan_is_a_function_of_its_arguments_alone() -> None:
    forwards = [BatchPlan(LENGTHS, 8, seed=3).step(i) for i in range(30)]
    plan = BatchPlan(LENGTHS, 8, seed=3)
    assert [plan.step(i) for i in reversed(range(30))] == forwards[::-1]
    assert epoch_order(LENGTHS, 3, 0) != epoch_order(LENGTHS, 3, 1) != epoch_order(LENGTHS, 4, 1)


def test_grouping_puts_like_lengths_together() -> None:
    def waste(grouped: bool) -> int:
        plan = BatchPlan(LENGTHS, 8, seed=3, grouped=grouped)
        batches = [plan.step(i) for i in range(13)]
        return sum(max(LENGTHS[r] for r in b) * len(b) - sum(LENGTHS[r] for r in b) for b in batches)

    assert waste(True) < 0.4 * waste(False)


def test_micro_batches_keep_rows_and_limits() -> None:
    def cost(rows) -> int:
        return sum(LENGTHS[r] for r in rows)

    rows = list(range(40))
    for parts in (1, 2, 4):
        made = micro_batches(rows, cost, limit=100, parts=parts)
        assert [r for batch in made for r in batch] == rows
        assert len(made) >= parts
        assert all(cost(batch) <= 100 or len(batch) == 1 for batch in made)
