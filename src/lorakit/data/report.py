"""What `data check` shows: counts, lengths, the share of trained tokens, one row in colour."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lorakit.base.batch import TokenRow
from lorakit.data.dataset import TokenData, prompt_key


@dataclass(frozen=True)
class DataSummary:
    """Figures of a data set."""

    rows: int
    prompts: int
    tokens: int
    loss_tokens: int
    shortest: int
    median: int
    longest: int
    histogram: tuple[tuple[int, int, int], ...]  # (from, to, rows)

    @property
    def loss_share(self) -> float:
        return self.loss_tokens / self.tokens


def summarise(data: TokenData, bins: int = 10) -> DataSummary:
    """Counts and a length histogram of equal steps."""
    lengths = sorted(data.lengths)
    low, high = lengths[0], lengths[-1]
    step = max(1, -(-(high - low + 1) // bins))
    counts: dict[int, int] = {}
    for length in lengths:
        counts[(length - low) // step] = counts.get((length - low) // step, 0) + 1
    histogram = tuple((low + b * step, low + (b + 1) * step - 1, counts.get(b, 0)) for b in range(max(counts) + 1))
    return DataSummary(
        rows=len(data.rows),
        prompts=len({prompt_key(example) for example in data.examples}),
        tokens=data.tokens,
        loss_tokens=data.loss_tokens,
        shortest=low,
        median=lengths[len(lengths) // 2],
        longest=high,
        histogram=histogram,
    )


def special_strings_inside(data: TokenData, tokenizer: Any, limit: int = 2000) -> tuple[int, str | None]:
    """How many of the first rows contain a special token's spelling in their own text, and where first."""
    added = [str(token) for token in getattr(tokenizer, "added_tokens_decoder", {}).values()]
    specials = {s for s in (*tokenizer.all_special_tokens, *added) if len(s) > 2}
    count, first = 0, None
    for example in data.examples[:limit]:
        texts = [example.text, example.prompt, example.completion, *(m["content"] for m in example.messages or ())]
        if any(s in text for text in texts if text for s in specials):
            count += 1
            first = first or example.where
    return count, first


def token_pieces(row: TokenRow, tokenizer: Any) -> list[tuple[str, bool]]:
    """The row's text in runs of trained and untrained tokens: [(text, trained), …]."""
    runs: list[tuple[list[int], bool]] = []
    trained: Sequence[bool] = [False, *row.loss_mask.tolist()[1:]]
    for token, flag in zip(row.input_ids.tolist(), trained, strict=True):
        if runs and runs[-1][1] == flag:
            runs[-1][0].append(token)
        else:
            runs.append(([token], flag))
    return [(tokenizer.decode(tokens), flag) for tokens, flag in runs]
