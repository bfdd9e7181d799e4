"""Packed rows give the logits of the rows apart, for every architecture, or are not used."""

from __future__ import annotations

import copy

import pytest
import torch

import lorakit
from lorakit.base.attention import packed_attention
from lorakit.base.batch import TokenRow, pack, pad
from lorakit.base.forward import Scorer, hidden_states, probe_layout
from tests.models import VOCABULARY, make, randomise, targets

LENGTHS = (9, 3, 14, 6)  # longer than the sliding windows of the test models


def rows() -> list[TokenRow]:
    generator = torch.Generator().manual_seed(5)
    made = []
    for n in LENGTHS:
        mask = torch.zeros(n, dtype=torch.bool)
        mask[n // 2 :] = True
        made.append(TokenRow(torch.randint(3, VOCABULARY, (n,), generator=generator), mask))
    return made


def logits_apart(model: torch.nn.Module) -> torch.Tensor:
    return torch.cat([model(input_ids=row.input_ids[None]).logits[0] for row in rows()])


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "gemma3", "gpt2"])
def test_packed_logits_equal_the_logits_apart(family: str) -> None:
    model = make(family)
    with torch.no_grad(), packed_attention(model):
        packed = model.get_output_embeddings()(hidden_states(model, pack(rows()), packed=True))
    with torch.no_grad():
        torch.testing.assert_close(packed, logits_apart(model), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "gemma3", "gpt2"])
def test_the_probe_finds_the_fast_way(family: str) -> None:
    layout = probe_layout(make(family))
    assert layout.packed
    assert layout.own_head
    assert layout.notes == ()


def test_soft_capped_attention_is_not_packed_but_right() -> None:
    """Gemma 2 caps its attention scores and its logits: packing it would be silently wrong."""
    model = make("gemma2")
    layout = probe_layout(model)
    assert not layout.packed
    assert layout.notes
    scorer = Scorer(model, layout)
    with torch.no_grad(), scorer.active():
        check_loss(model, scorer)


def test_soft_capped_attention_is_refused_where_the_head_is_plain() -> None:
    """On short documents capped scores barely differ: trying alone would not find it, the argument does."""
    model = make("gemma2")
    model.config.final_logit_softcapping = None
    layout = probe_layout(model)
    assert layout.own_head
    assert not layout.packed
    assert "softcap" in layout.notes[0]
    scorer = Scorer(model, layout)
    with torch.no_grad(), scorer.active():
        check_loss(model, scorer)


def check_loss(model: torch.nn.Module, scorer: Scorer) -> None:
    expected = torch.zeros(())
    for row in rows():
        logits = model(input_ids=row.input_ids[None]).logits[0]
        targets_ = row.input_ids[1:][row.loss_mask[1:]]
        expected += torch.nn.functional.cross_entropy(logits[:-1][row.loss_mask[1:]], targets_, reduction="sum")
    torch.testing.assert_close(scorer.loss_sum(rows()), expected, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3"])
def test_loss_and_gradients_equal_the_plain_computation(family: str) -> None:
    """Packed, on loss tokens only, in chunks: the same gradients as the textbook way, adapters and head."""
    plain = lorakit.attach(make(family), lorakit.LoRA(rank=4, targets=targets(family)))
    randomise(plain)
    fast = copy.deepcopy(plain)
    plain.get_output_embeddings().weight.requires_grad_(True)
    fast.get_output_embeddings().weight.requires_grad_(True)

    loss = torch.zeros(())
    for row in rows():
        logits = plain(input_ids=row.input_ids[None]).logits[0]
        loss = loss + torch.nn.functional.cross_entropy(
            logits[:-1][row.loss_mask[1:]], row.input_ids[1:][row.loss_mask[1:]], reduction="sum"
        )
    (loss / 7).backward()

    scorer = Scorer(fast)
    assert scorer.layout.packed
    with scorer.active():
        (scorer.loss_sum(rows()) / 7).backward()
    compared = 0
    for (name, a), (_, b) in zip(plain.named_parameters(), fast.named_parameters(), strict=True):
        if a.requires_grad:
            torch.testing.assert_close(b.grad, a.grad, atol=1e-5, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")
            compared += 1
    assert compared > 8


def test_padded_and_packed_losses_agree() -> None:
    model = make("llama")
    scorer = Scorer(model)
    with torch.no_grad(), scorer.active():
        packed = scorer.loss_sum(rows())
    layout = type(scorer.layout)(packed=False, own_head=True)
    with torch.no_grad():
        torch.testing.assert_close(Scorer(model, layout).loss_sum(rows()), packed, atol=1e-4, rtol=1e-5)
    assert pad(rows()).tokens == pack(rows()).tokens == sum(LENGTHS)


def test_the_models_own_attention_comes_back() -> None:
    model = make("llama")
    before = model.config._attn_implementation
    with packed_attention(model):
        assert model.config._attn_implementation != before
    assert model.config._attn_implementation == before
