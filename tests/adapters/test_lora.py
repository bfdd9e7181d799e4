from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

import lorakit
from lorakit.adapters.initial import initial
from lorakit.errors import LorakitError
from tests.models import embedding, ids, make, output, randomise, targets

FAMILIES = ["llama", "gpt2", "bert", "gemma3"]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_adapted_weight_is_w_plus_delta(family: str) -> None:
    """Forward with the adapter = forward of a model whose weights are W + ΔW, in float64 arithmetic."""
    base = make(family)
    names = [*targets(family), embedding(family)]
    model = lorakit.attach(copy.deepcopy(base), lorakit.LoRA(rank=3, alpha=5, targets=names))
    randomise(model)
    adapter = model.adapter()
    merged = copy.deepcopy(base)
    for plan in adapter.plan.modules:
        module = merged.get_submodule(plan.path)
        delta = adapter.delta(plan.path).double()
        a, b = (adapter.tensors[plan.path][k].double() for k in ("lora_A", "lora_B"))
        torch.testing.assert_close(delta, 5 / 3 * b @ a, atol=1e-6, rtol=1e-6)
        transposed = plan.kind in ("conv1d", "embedding")
        module.weight = nn.Parameter((module.weight.double() + (delta.T if transposed else delta)).float())
    with torch.no_grad():
        torch.testing.assert_close(output(model, ids()), output(merged, ids()), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_off_is_the_base_bit_for_bit(family: str) -> None:
    base = make(family)
    model = lorakit.attach(copy.deepcopy(base), lorakit.LoRA(rank=3, targets=[*targets(family), embedding(family)]))
    with torch.no_grad():
        expected = output(base, ids())
        assert torch.equal(output(model, ids()), expected)  # B = 0: nothing is changed at the start
        randomise(model)
        assert not torch.equal(output(model, ids()), expected)
        with model.using(None):
            assert torch.equal(output(model, ids()), expected)
        model.switch(None)
        assert torch.equal(output(model, ids()), expected)
        kind = type(base)
        model.unmount("default")
        assert torch.equal(output(model, ids()), expected)
    assert isinstance(model, kind)
    assert {type(m) for m in model.modules() if m is not model} == {type(m) for m in base.modules() if m is not base}
    assert model.state_dict().keys() == base.state_dict().keys()


def test_scales() -> None:
    model = make("llama")
    plan = lorakit.LoRA(rank=16, alpha=32, targets=["q_proj"], use_rslora=True, rank_pattern={r"layers\.1.*": 4}).plan(
        model
    )
    assert [m.scale for m in plan.modules] == [32 / math.sqrt(16), 32 / math.sqrt(4)]
    plan = lorakit.LoRA(rank=16, alpha=32, targets=["q_proj"], alpha_pattern={r"layers\.0.*": 8}).plan(model)
    assert [m.scale for m in plan.modules] == [0.5, 2.0]


def test_initial_values_depend_on_seed_and_path_alone() -> None:
    few = lorakit.attach(make("llama"), lorakit.LoRA(rank=4, targets=["v_proj"]), seed=7).adapter()
    many = lorakit.attach(make("llama"), lorakit.LoRA(rank=4), seed=7).adapter()
    other = lorakit.attach(make("llama"), lorakit.LoRA(rank=4, targets=["v_proj"]), seed=8).adapter()
    path = "model.layers.1.self_attn.v_proj"
    assert torch.equal(few.tensors[path]["lora_A"], many.tensors[path]["lora_A"])
    assert not torch.equal(few.tensors[path]["lora_A"], other.tensors[path]["lora_A"])
    plan = next(m for m in many.plan.modules if m.path == path)
    a = initial(plan, 0, "uniform", torch.empty(plan.out_features, plan.in_features))["lora_A"]
    assert a.abs().max() <= 1 / math.sqrt(plan.in_features)
    assert a.std() == pytest.approx(1 / math.sqrt(3 * plan.in_features), rel=0.2)


def test_only_the_adapter_is_trained() -> None:
    model = lorakit.attach(make("llama"), lorakit.LoRA(rank=4))
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained == {n for n, _ in model.named_parameters() if "lora_" in n}
    assert sum(model.get_parameter(n).numel() for n in trained) == model.adapter().plan.trainable_parameters


def test_dropout_acts_in_training_alone() -> None:
    model = lorakit.attach(make("llama"), lorakit.LoRA(rank=4, dropout=0.5))
    randomise(model)
    with torch.no_grad():
        assert torch.equal(output(model, ids()), output(model, ids()))
        model.train()
        assert not torch.equal(output(model, ids()), output(model, ids()))


def test_a_bf16_base_keeps_fp32_adapters() -> None:
    model = lorakit.attach(make("llama").to(torch.bfloat16), lorakit.LoRA(rank=4))
    randomise(model)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    result = output(model, ids())
    assert result.dtype == torch.bfloat16
    result.float().square().mean().backward()
    assert all(p.grad.dtype == torch.float32 for p in model.parameters() if p.requires_grad)


def test_any_module_and_a_handwritten_loop(tmp_path) -> None:
    """No transformers anywhere: a bare module learns, is saved, and is loaded on a fresh copy."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4))
    x, y = torch.randn(64, 8), torch.randn(64, 4)
    model = lorakit.attach(copy.deepcopy(base), lorakit.LoRA(rank=4, alpha=4))
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)
    losses = []
    for _ in range(60):
        loss = nn.functional.mse_loss(model(x), y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    model.save(tmp_path / "adapter")
    again = lorakit.load_adapter(copy.deepcopy(base), tmp_path / "adapter")
    assert torch.equal(again(x), model(x))
    assert all(
        torch.equal(a, b)
        for a, b in zip(
            base.parameters(), (model[0].weight, model[0].bias, model[2].weight, model[2].bias), strict=True
        )
    )


def test_names_and_mounting_mistakes() -> None:
    model = lorakit.attach(make("llama"), lorakit.LoRA(rank=2, targets=["q_proj"]), name="first")
    for bad in ("a.b", "", "keys", "a b"):
        with pytest.raises(LorakitError, match="adapter name"):
            lorakit.attach(model, lorakit.LoRA(rank=2), name=bad)
    with pytest.raises(LorakitError, match="already mounted"):
        lorakit.attach(model, lorakit.LoRA(rank=2), name="first")
    with pytest.raises(LorakitError, match="'frist'.*'first'"):
        model.switch("frist")
    with pytest.raises(LorakitError, match="mounted: first"), model.using("second"):
        pass


def test_a_deep_copy_is_independent() -> None:
    model = lorakit.attach(make("llama"), lorakit.LoRA(rank=2))
    randomise(model)
    twin = copy.deepcopy(model)
    twin.switch(None)
    with torch.no_grad():
        assert not torch.equal(output(model, ids()), output(twin, ids()))
        with model.using(None):
            assert torch.equal(output(model, ids()), output(twin, ids()))
