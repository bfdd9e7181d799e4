"""The same results on a CUDA device. `make test-gpu`."""

from __future__ import annotations

import pytest
import torch

import lorakit
from lorakit.base.forward import Scorer
from lorakit.training.console import SilentWatcher
from lorakit.training.prepare import prepare
from lorakit.training.run import execute
from tests.base.test_packing import rows
from tests.models import make
from tests.training.test_loop import recipe

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def test_the_loss_is_the_cpus() -> None:
    losses = []
    for device in ("cpu", "cuda"):
        scorer = Scorer(lorakit.attach(make("llama").to(device), lorakit.LoRA(rank=4)))
        assert scorer.layout.packed
        with torch.no_grad(), scorer.active():
            losses.append(float(scorer.loss_sum(rows())))
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_it_learns(small_model, rows_file, tmp_path, precision: str, checkpointing: bool) -> None:
    given = recipe(
        small_model, rows_file, steps=40, lr=2e-2, device="cuda", precision=precision, checkpointing=checkpointing
    )  # fmt: skip
    run = execute(prepare(given), tmp_path / "run", SilentWatcher())
    assert run.summary["eval_loss"] < 8
