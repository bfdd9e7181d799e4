from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import lorakit
from lorakit.adapters.methods.dora import row_norms
from lorakit.errors import LorakitError
from tests.models import ids, make, output, randomise, targets


def test_norms_without_making_the_sum() -> None:
    weight, a, b = torch.randn(7, 5, dtype=torch.float64), torch.randn(3, 5).double(), torch.randn(7, 3).double()
    torch.testing.assert_close(row_norms(weight, a, b, 0.7), (weight + 0.7 * b @ a).norm(dim=1))


def test_the_formula_and_its_gradients_with_the_norm_held() -> None:
    """float64, by hand: forward and the gradients of A, B, the magnitude and x."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(5, 7)).double()
    model = lorakit.attach(base, lorakit.DoRA(rank=3, alpha=6))
    state = model[0].adapter_states["default"].double()
    randomise(model)
    a, b, m = (p.detach().clone().requires_grad_() for p in (state.lora_A, state.lora_B, state.magnitude))
    x = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    twin = x.detach().clone().requires_grad_()
    moved = base[0].weight.detach() + 2.0 * b @ a
    by_hand = twin @ ((m / moved.norm(dim=1).detach())[:, None] * moved).T + base[0].bias.detach()
    result = model(x)
    torch.testing.assert_close(result, by_hand, atol=1e-7, rtol=1e-6)
    upstream = torch.randn_like(result)
    result.backward(upstream)
    by_hand.backward(upstream)
    for got, want in ((state.lora_A, a), (state.lora_B, b), (state.magnitude, m), (x, twin)):
        torch.testing.assert_close(got.grad, want.grad, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3"])
def test_it_begins_at_the_base_and_off_is_the_base(family: str) -> None:
    base = make(family)
    model = lorakit.attach(copy.deepcopy(base), lorakit.DoRA(rank=3, targets=targets(family)))
    plan = model.adapter().plan
    assert plan.trainable_parameters == sum(3 * (m.in_features + m.out_features) + m.out_features for m in plan.modules)
    assert plan.trainable_parameters == sum(p.numel() for p in model.parameters() if p.requires_grad)
    with torch.no_grad():
        torch.testing.assert_close(output(model, ids()), output(base, ids()), atol=1e-5, rtol=1e-5)
        randomise(model)
        with model.using(None):
            assert torch.equal(output(model, ids()), output(base, ids()))
    assert set(dict(model.named_modules())) >= set(dict(base.named_modules())), (
        "the target is no submodule of its state"
    )


def test_delta_is_the_forwards_and_needs_the_weight() -> None:
    model = lorakit.attach(make("llama"), lorakit.DoRA(rank=3))
    randomise(model)
    path = "model.layers.0.mlp.up_proj"
    layer, adapter = model.get_submodule(path), model.adapter()
    x = torch.randn(4, 32)
    with torch.no_grad():
        moved = layer(x)
        with model.using(None):
            plain = layer(x)
    torch.testing.assert_close(moved - plain, x @ adapter.delta(path, layer.weight).T, atol=1e-5, rtol=1e-4)
    with pytest.raises(LorakitError, match="depends on the base's weight"):
        adapter.delta(path)


def test_in_a_mix_it_starts_from_the_base() -> None:
    """Half LoRA, half DoRA: y + ½(y_lora − y) + ½(y_dora − y), whatever the order."""
    model = lorakit.attach(make("llama"), lorakit.LoRA(rank=3, targets=["q_proj"]), name="a")
    lorakit.attach(model, lorakit.DoRA(rank=3, targets=["q_proj"]), name="b")
    randomise(model)
    layer, x = model.model.layers[0].self_attn.q_proj, torch.randn(4, 32)
    outputs = {}
    with torch.no_grad():
        for choice in (None, "a", "b"):
            with model.using(choice):
                outputs[choice] = layer(x)
        expected = outputs["a"] / 2 + outputs["b"] / 2
        for order in ("ab", "ba"):
            with model.using(dict.fromkeys(order, 0.5)):
                torch.testing.assert_close(layer(x), expected, atol=1e-5, rtol=1e-5)


def test_initialisers_that_move_its_reference_are_refused() -> None:
    with pytest.raises(LorakitError, match="use uniform or gaussian"):
        lorakit.DoRA(init="pissa")
