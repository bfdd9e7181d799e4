"""Mixed batches, exact mixes, and the route under activation checkpointing."""

from __future__ import annotations

import threading

import pytest
import torch

import lorakit
from lorakit.errors import LorakitError
from tests.models import ids, make, output, randomise, targets


def two_adapters(family: str = "llama") -> torch.nn.Module:
    model = lorakit.attach(make(family), lorakit.LoRA(rank=4, targets=targets(family)), name="a")
    randomise(model, seed=1)
    with torch.no_grad():
        kept = {n: p.clone() for n, p in model.named_parameters() if p.requires_grad}
    lorakit.attach(model, lorakit.LoRA(rank=2, alpha=6, targets=targets(family)[:2]), name="b")
    randomise(model, seed=2)
    with torch.no_grad():
        for name, value in kept.items():
            model.get_parameter(name).copy_(value)
    return model


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_mixed_batch_equals_each_row_alone(family: str) -> None:
    model = two_adapters(family)
    tokens = ids(rows=4)
    choices = ["a", None, "b", {"a": 0.3, "b": 0.7}]
    with torch.no_grad():
        expected = []
        for row, choice in zip(tokens, choices, strict=True):
            with model.using(choice):
                expected.append(output(model, row[None]))
        with model.route(lorakit.Route.rows(choices, tokens.shape[1])):
            mixed = output(model, tokens)
    torch.testing.assert_close(mixed, torch.cat(expected), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(mixed[0], mixed[1])


def test_segments_over_flattened_tokens() -> None:
    model = two_adapters()
    tokens = ids(rows=3, length=5)
    route = lorakit.Route([(10, 15, {"b": 1.0}), (0, 5, "a")], tokens=15)
    with torch.no_grad():
        with model.route(route):
            mixed = output(model, tokens)
        for row, choice in ((0, "a"), (1, None), (2, "b")):
            with model.using(choice):
                torch.testing.assert_close(mixed[row], output(model, tokens[row : row + 1])[0], atol=1e-5, rtol=1e-5)


def test_a_mix_is_the_weighted_sum_of_updates() -> None:
    """One layer by hand, in float64: y = x(W + 0.25·ΔWa − 0.5·ΔWb)ᵀ."""
    model = two_adapters()
    layer = model.model.layers[0].self_attn.q_proj
    path = "model.layers.0.self_attn.q_proj"
    x = torch.randn(6, 32)
    weight = (
        layer.weight.double()
        + 0.25 * model.adapter("a").delta(path).double()
        - 0.5 * model.adapter("b").delta(path).double()
    )
    with torch.no_grad(), model.using({"a": 0.25, "b": -0.5}):
        torch.testing.assert_close(layer(x).double(), x.double() @ weight.T, atol=1e-5, rtol=1e-5)


def test_poolers_follow_the_rows() -> None:
    model = two_adapters("bert")
    tokens = ids(rows=2)
    model.pooler.dense  # noqa: B018  (a target that sees one vector a row)
    with torch.no_grad():
        with model.route(lorakit.Route.rows(["a", None], tokens.shape[1])):
            mixed = model(input_ids=tokens).pooler_output
        with model.using("a"):
            torch.testing.assert_close(mixed[0], model(input_ids=tokens[:1]).pooler_output[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "segments",
    [[(0, 4, "a"), (3, 6, "b")], [(2, 2, "a")], [(-1, 2, "a")]],
    ids=["overlap", "empty", "negative"],
)
def test_impossible_segments(segments: list) -> None:
    with pytest.raises(LorakitError):
        lorakit.Route(segments)


def test_a_route_for_another_batch_is_an_error_not_a_guess() -> None:
    model = two_adapters()
    with pytest.raises(LorakitError, match="made for 10 tokens"), model.route(lorakit.Route([(0, 5, "a")], tokens=10)):
        output(model, ids(rows=2, length=7))
    with pytest.raises(LorakitError, match="ends at 99"), model.route(lorakit.Route([(0, 99, "a")])):
        output(model, ids())
    with pytest.raises(LorakitError, match="no adapter named 'c'"), model.route(lorakit.Route([(0, 5, "c")])):
        pass


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_when_backward_runs_outside_the_block(checkpointing: bool) -> None:
    """Recomputed activations must see the route of the forward, not that of the backward's place."""
    reference = two_adapters()
    with reference.using("b"):
        output(reference, ids()).square().mean().backward()
    model = two_adapters()
    if checkpointing:
        model.activation_checkpointing_enable()
    model.train()
    with model.using("b"):
        loss = output(model, ids()).square().mean()
    model.switch(None)
    loss.backward()
    compared = 0
    for (name, want), (_, got) in zip(reference.named_parameters(), model.named_parameters(), strict=True):
        if ".b." in name and want.grad is not None:
            torch.testing.assert_close(got.grad, want.grad, atol=1e-6, rtol=1e-5)
            compared += int(want.grad.abs().max() > 0)
        elif ".a." in name:
            assert got.grad is None
    assert compared >= 8


def test_the_old_name_of_checkpointing_is_covered_too() -> None:
    reference, model = two_adapters(), two_adapters()
    model.gradient_checkpointing_enable()
    for m in (reference, model):
        m.train()
        with m.using("a"):
            loss = output(m, ids()).square().mean()
        loss.backward()
    for (name, want), (_, got) in zip(reference.named_parameters(), model.named_parameters(), strict=True):
        if want.grad is not None:
            torch.testing.assert_close(got.grad, want.grad, atol=1e-6, rtol=1e-5, msg=name)


def test_threads_do_not_see_each_others_blocks() -> None:
    model = two_adapters()
    model.switch(None)
    inside, checked = threading.Event(), threading.Event()
    seen = {}

    def other() -> None:
        inside.wait(10)
        with torch.no_grad():
            seen["other"] = output(model, ids())
        checked.set()

    thread = threading.Thread(target=other)
    thread.start()
    with torch.no_grad():
        base = output(model, ids())
        with model.using("a"):
            inside.set()
            checked.wait(10)
    thread.join()
    assert torch.equal(seen["other"], base)


def test_torchs_own_checkpoint_takes_the_context() -> None:
    """A bare module with `torch.utils.checkpoint`: the documented way to keep the route."""
    torch.manual_seed(0)
    model = lorakit.attach(torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 2)), lorakit.LoRA(rank=2))
    randomise(model)
    x = torch.randn(3, 4)
    model(x).square().sum().backward()
    expected = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    y = torch.utils.checkpoint.checkpoint(
        model, x, use_reentrant=False, context_fn=model.adapter_switch.checkpoint_contexts
    )
    model.switch(None)
    y.square().sum().backward()
    assert all(
        torch.allclose(a, b)
        for a, b in zip(expected, [p.grad for p in model.parameters() if p.grad is not None], strict=True)
    )
    with pytest.raises(LorakitError, match="context_fn="):
        model.activation_checkpointing_enable()


def test_compiled_models_follow_the_route() -> None:
    model = two_adapters()
    compiled = torch.compile(model, backend="eager")
    tokens = ids()
    with torch.no_grad():
        for choice in ("a", "b", None, {"a": 0.5, "b": 0.5}):
            with model.using(choice):
                torch.testing.assert_close(compiled(tokens).logits, output(model, tokens), atol=1e-5, rtol=1e-5)
