"""From token rows to a summed loss, by the fastest way that is exact for this very model.

What a model allows is not looked up but tried: two short documents are run packed and apart, and
the head on chosen positions against the model's own logits. A model that fails a trial takes the
slower way, and the reason is kept to be printed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lorakit.base.attention import packed_attention
from lorakit.base.batch import Batch, TokenRow, pack, pad
from lorakit.base.loss import loss_sum


@dataclass(frozen=True)
class Layout:
    """How a model's batches are laid out; `notes` says why something slower was chosen."""

    packed: bool
    own_head: bool
    notes: tuple[str, ...] = ()


def hidden_states(model: Any, batch: Batch, packed: bool) -> torch.Tensor:
    """The last hidden states, flattened over the batch: (T, d)."""
    extra = {"document_lengths": batch.lengths} if packed else {}
    output = model.base_model(
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask,
        position_ids=batch.position_ids,
        use_cache=False,
        **extra,
    )
    return output.last_hidden_state.flatten(0, 1)


def probe_layout(model: Any) -> Layout:
    """Try the fast ways on two short documents and keep those that give the model's own logits."""
    device = next(model.parameters()).device
    vocabulary = model.config.get_text_config().vocab_size
    generator = torch.Generator().manual_seed(0)
    rows = [
        TokenRow(torch.randint(0, vocabulary, (n,), generator=generator), torch.ones(n, dtype=torch.bool))
        for n in (7, 5, 6)
    ]
    training = model.training
    model.eval()
    notes: list[str] = []
    packed, own_head = True, True
    with torch.no_grad():
        apart = [model(input_ids=row.input_ids[None].to(device), use_cache=False).logits[0].float() for row in rows]
        expected = torch.cat([logits[:-1] for logits in apart])
        bound = (1e-3 if next(model.parameters()).dtype == torch.float32 else 6e-2) * (1 + float(expected.std()))
        head = model.get_output_embeddings()
        try:
            batch = pad(rows, device)
            logits = head(hidden_states(model, batch, packed=False)[batch.sources]).float()
            own_head = float((logits - expected).abs().max()) <= bound
        except Exception:  # any failure of the trial means: not this way
            own_head = False
        if not own_head:
            notes.append("the model does more than its head to make logits: its own forward is used, all positions")
            packed = False
        else:
            try:
                batch = pack(rows, device)
                with packed_attention(model):
                    logits = head(hidden_states(model, batch, packed=True)[batch.sources]).float()
                error = float((logits - expected).abs().max())
                if not error <= bound:
                    packed = False
                    notes.append(f"packed rows leak here (logits differ by {error:.1g}): padded batches are used")
            except Exception as error:
                packed = False
                notes.append(f"rows cannot be packed ({str(error).splitlines()[0][:80]}): padded batches are used")
    model.train(training)
    return Layout(packed, own_head, tuple(notes))


class Scorer:
    """Summed loss of rows under a model, packed where the model allows it.

    Use it inside ``with scorer.active():``, which sets the packed attention and puts the model's
    own back afterwards.
    """

    def __init__(self, model: Any, layout: Layout | None = None):
        self.model = model
        self.layout = layout or probe_layout(model)
        self.device = next(model.parameters()).device

    def active(self) -> contextlib.AbstractContextManager[None]:
        return packed_attention(self.model) if self.layout.packed else contextlib.nullcontext()

    def batch(self, rows: Sequence[TokenRow]) -> Batch:
        return pack(rows, self.device) if self.layout.packed else pad(rows, self.device)

    def loss_sum(self, rows: Sequence[TokenRow]) -> torch.Tensor:
        """Σ −log p over the loss tokens of the rows, in nats: a scalar with gradients."""
        batch = self.batch(rows)
        if not self.layout.own_head:
            logits = self.model(
                input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False
            ).logits.flatten(0, 1)
            return nn.functional.cross_entropy(logits[batch.sources].float(), batch.labels, reduction="sum")
        hidden = hidden_states(self.model, batch, self.layout.packed)
        return loss_sum(self.model.get_output_embeddings(), hidden[batch.sources], batch.labels)

    def cost(self, rows: Sequence[TokenRow]) -> int:
        """Token positions a batch of these rows computes, padding included."""
        lengths = [len(row) for row in rows]
        return sum(lengths) if self.layout.packed else max(lengths) * len(lengths)
