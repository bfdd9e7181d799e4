"""A file of examples as token rows: encoded, checked for length, fingerprinted, split."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from lorakit.base.batch import TokenRow
from lorakit.data.formats import Example, Format, recognise, to_example
from lorakit.data.read import read_records
from lorakit.data.template import Template, as_messages
from lorakit.errors import LorakitError, did_you_mean

OVERLONG = ("error", "drop", "split", "truncate")

_PASSAGE = 16  # windows


@dataclass(frozen=True)
class TokenData:
    """Token rows and where they come from.

    Attributes:
        rows: in the order of the file.
        examples: the example each row was made from.
        form: the recognised format.
        notes: what was dropped, cut or changed, one line each.
    """

    rows: tuple[TokenRow, ...]
    examples: tuple[Example, ...]
    form: Format
    notes: tuple[str, ...] = field(default=())

    @property
    def tokens(self) -> int:
        return sum(len(row) for row in self.rows)

    @property
    def loss_tokens(self) -> int:
        return sum(row.loss_tokens for row in self.rows)

    @property
    def lengths(self) -> list[int]:
        return [len(row) for row in self.rows]

    def fingerprint(self) -> str:
        """SHA-256 over all tokens and masks, in order."""
        digest = hashlib.sha256()
        for row in self.rows:
            digest.update(row.input_ids.numpy().tobytes())
            digest.update(row.loss_mask.numpy().tobytes())
        return digest.hexdigest()

    def subset(self, indices: Sequence[int]) -> TokenData:
        return TokenData(tuple(self.rows[i] for i in indices), tuple(self.examples[i] for i in indices), self.form)


def read_examples(
    source: str, format_name: str = "auto", columns: Mapping[str, str] | None = None, limit: int | None = None
) -> tuple[list[Example], Format]:
    """The examples of a file and its recognised format."""
    records = read_records(source)
    form = recognise(records, format_name, columns)
    return [to_example(record, form) for record in records[:limit]], form


def encode(
    examples: Sequence[Example],
    form: Format,
    template: Template,
    *,
    max_length: int,
    loss: str = "auto",
    overlong: str = "error",
    progress: Callable[[Iterable[Example]], Iterable[Example]] = iter,
) -> TokenData:
    """Token rows of at most `max_length` tokens.

    Args:
        overlong: what to do with longer rows. ``error`` names the first and counts them; ``drop``
            leaves them out; ``split`` cuts plain text into windows; ``truncate`` cuts the end but
            keeps the end-of-turn token.

    Raises:
        LorakitError: a row with nothing to train, or rows too long under ``error``.
    """
    if overlong not in OVERLONG:
        raise LorakitError(
            f"overlong: {overlong!r} is none of {', '.join(OVERLONG)}. {did_you_mean(overlong, OVERLONG)}"
        )
    template.adopt(examples)
    rows: list[TokenRow] = []
    kept: list[Example] = []
    long: list[tuple[str, int]] = []
    for example in progress(examples):
        row = template.encode(example, loss)
        if len(row) <= max_length:
            rows.append(row)
            kept.append(example)
            continue
        long.append((example.where, len(row)))
        if overlong == "split":
            if example.text is None and loss != "all":
                raise LorakitError(
                    f"data: {example.where} has {len(row)} tokens, more than max_length {max_length}; split would part "
                    "its answer from its prompt. Use overlong: drop or truncate, or a larger max_length"
                )
            for start in range(0, len(row) - 1, max_length - 1):  # windows share a token, so none goes unlearnt
                piece = TokenRow(row.input_ids[start : start + max_length], row.loss_mask[start : start + max_length])
                if piece.loss_tokens:
                    rows.append(piece)
                    kept.append(example)
        elif overlong == "truncate":
            rows.append(_truncate(row, max_length, example.where))
            kept.append(example)
    notes = []
    if long:
        where, length = max(long, key=lambda item: item[1])
        told = f"{len(long)} of {len(examples)} rows are longer than max_length {max_length} (longest: {where}, {length} tokens)"
        if overlong == "error":
            raise LorakitError(f"data: {told}. Raise max_length, or say overlong: drop, split or truncate")
        done = {"drop": "left out", "split": "split into windows", "truncate": "cut, their end-of-turn token kept"}
        notes.append(f"{told}: {done[overlong]}")
    if not rows:
        raise LorakitError("data: no rows are left")
    return TokenData(tuple(rows), tuple(kept), form, tuple(notes))


def _truncate(row: TokenRow, max_length: int, where: str) -> TokenRow:
    """The first tokens and the last one: the end of the turn is never cut."""
    cut = TokenRow(
        torch.cat([row.input_ids[: max_length - 1], row.input_ids[-1:]]),
        torch.cat([row.loss_mask[: max_length - 1], row.loss_mask[-1:]]),
    )
    if cut.loss_tokens <= 1 and row.loss_tokens > 1:
        raise LorakitError(
            f"data: {where}: its prompt alone fills max_length {max_length}, so truncating would leave no answer to "
            "learn. Raise max_length or use overlong: drop"
        )
    return cut


def hold_out(data: TokenData, share: float | int, seed: int) -> tuple[TokenData, TokenData]:
    """(training, validation), with rows of one prompt always on the same side.

    Args:
        share: below 1 a share of the rows, else a number of rows (reached to within one prompt).
    """
    groups: dict[str, list[int]] = {}
    windows: Counter[str] = Counter()
    for i, example in enumerate(data.examples):
        key = prompt_key(example)
        if example.text is not None:  # a long document is held out in passages, not as a whole
            windows[key] += 1
            key = f"{key}, passage {windows[key] // _PASSAGE}"
        groups.setdefault(key, []).append(i)
    wanted = share * len(data.rows) if share < 1 else share
    if wanted >= len(data.rows) or len(groups) < 2:
        raise LorakitError(
            f"val_size: {share} leaves nothing to train on: the data has {len(data.rows)} rows and {len(groups)} "
            "different prompts"
        )
    generator = torch.Generator().manual_seed(seed)
    held: list[int] = []
    order = list(groups.values())
    for g in torch.randperm(len(order), generator=generator).tolist():
        if len(held) >= max(1, wanted):
            break
        if len(held) + len(order[g]) <= max(2, 1.5 * wanted):  # a prompt with very many rows stays in training
            held += order[g]
    if not held:
        raise LorakitError(
            f"val_size: no prompt has few enough rows to hold out {share} of them; give val_data, or another val_size"
        )
    chosen = set(held)
    return data.subset([i for i in range(len(data.rows)) if i not in chosen]), data.subset(sorted(held))


def prompt_key(example: Example) -> str:
    """What is asked, as a string: rows that share it are references of one another."""
    if example.text is not None:
        return example.where  # windows of one document stay together
    return repr(prompt_of(example))


def prompt_of(example: Example) -> list[dict[str, Any]]:
    """The messages before the last answer."""
    messages = list(as_messages(example))
    last = max(i for i, m in enumerate(messages) if m["role"] == "assistant")
    return messages[:last]


def answer_of(example: Example) -> str:
    """The last answer."""
    return next(m["content"] for m in reversed(as_messages(example)) if m["role"] == "assistant")


def end_tokens(data: TokenData, tokenizer: Any) -> set[int]:
    """The special tokens that rows end with: a template's end of turn."""
    special = {*tokenizer.all_special_ids, *getattr(tokenizer, "added_tokens_decoder", {})}
    return {int(row.input_ids[-1]) for row in data.rows} & special


def stop_tokens(model: Any, data: TokenData | None = None) -> list[int]:
    """The tokens that end generation: the model's own, and those its training rows end with."""
    config = getattr(model, "generation_config", None)
    own = getattr(config, "eos_token_id", None)
    ends = [own] if isinstance(own, int) else list(own or [])
    if data is not None:
        ends += [token for token in sorted(end_tokens(data, model.tokenizer)) if token not in ends]
    if not ends and model.tokenizer.eos_token_id is not None:
        ends = [model.tokenizer.eos_token_id]
    return ends
