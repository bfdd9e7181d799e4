"""Initialisers: pure functions; ΔW is zero at the start and the base is never touched."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from peft import PeftModel

import lorakit
from lorakit.adapters.initial import INITS, gaussian, initial, olora, pissa, uniform
from lorakit.errors import LorakitError
from tests.models import ids, make, output, randomise, targets


@pytest.mark.parametrize("init", INITS)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_nothing_is_changed_at_the_start(family: str, init: str) -> None:
    base = make(family)
    weights = {name: p.clone() for name, p in base.named_parameters()}
    model = lorakit.attach(copy.deepcopy(base), lorakit.LoRA(rank=4, targets=targets(family), init=init))
    with torch.no_grad():
        torch.testing.assert_close(output(model, ids()), output(base, ids()), atol=1e-5, rtol=1e-5)
        with model.using(None):
            assert torch.equal(output(model, ids()), output(base, ids()))
    for name, weight in weights.items():
        assert torch.equal(model.get_parameter(name), weight), f"{init} changed {name}"
    plan = model.adapter().plan
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == plan.trainable_parameters


def test_distributions() -> None:
    plan = lorakit.LoRA(rank=8, targets=["down_proj"]).plan(make("llama")).modules[0]
    a, b = uniform(plan, 0)
    assert a.abs().max() <= 1 / math.sqrt(plan.in_features)
    a, b = gaussian(plan, 0)
    assert a.std() == pytest.approx(1 / 8, rel=0.15)
    assert not b.any()


def test_pissa_takes_the_best_low_rank_part() -> None:
    model = make("llama")
    plan = lorakit.LoRA(rank=5, alpha=7, targets=["up_proj"]).plan(model).modules[0]
    weight = model.get_submodule(plan.path).weight.detach()
    a, b = pissa(plan, weight)
    s = torch.linalg.svdvals(weight.double())
    error = (weight.double() - plan.scale * b.double() @ a.double()).norm()
    assert float(error) == pytest.approx(float(s[5:].norm()), rel=1e-5)  # Eckart and Young
    balanced = (a @ a.T).diagonal(), (b.T @ b).diagonal()
    torch.testing.assert_close(*balanced, atol=1e-4, rtol=1e-4)


def test_olora_takes_an_orthonormal_basis() -> None:
    model = make("llama")
    plan = lorakit.LoRA(rank=5, targets=["up_proj"]).plan(model).modules[0]
    weight = model.get_submodule(plan.path).weight.detach()
    a, b = olora(plan, weight)
    torch.testing.assert_close(b.T @ b, torch.eye(5), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(b @ a, b @ b.T @ weight, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_saved_as_a_plain_lora_of_twice_the_rank(init: str, rslora: bool, tmp_path) -> None:
    """Loaded by us and by PEFT onto the untouched base: the same logits, no residual to recompute."""
    base = make("llama")
    model = lorakit.attach(
        copy.deepcopy(base),
        lorakit.LoRA(rank=3, alpha=6, init=init, use_rslora=rslora, rank_pattern={r"layers\.1\..*q_proj": 2}),
    )
    randomise(model)
    model.save(tmp_path / "adapter")
    with torch.no_grad():
        expected = output(model, ids())
        assert (expected - output(base, ids())).abs().max() > 1e-2
        ours = lorakit.load_adapter(copy.deepcopy(base), tmp_path / "adapter")
        torch.testing.assert_close(output(ours, ids()), expected, atol=2e-5, rtol=1e-5)
        peft = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "adapter")
        torch.testing.assert_close(output(peft, ids()), expected, atol=2e-5, rtol=1e-5)
    path = "model.layers.0.mlp.up_proj"
    assert ours.adapter().plan.modules[0].rank == 6
    torch.testing.assert_close(ours.adapter().delta(path), model.adapter().delta(path), atol=1e-5, rtol=1e-4)


def test_mistakes() -> None:
    with pytest.raises(LorakitError, match="'pisa' is none of"):
        lorakit.LoRA(init="pisa")
    plan = lorakit.LoRA(rank=20, targets=["k_proj"]).plan(make("llama")).modules[0]
    with pytest.raises(LorakitError, match="only 16; lower the rank"):
        initial(plan, 0, "pissa", torch.randn(16, 32))
