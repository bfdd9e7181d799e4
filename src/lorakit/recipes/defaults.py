"""From a data set and a model to hyperparameters, each with its reason in one line.

Sources: "LoRA Without Regret" (Thinking Machines Lab, 2025) for rank by capacity, the rate of ten
times full fine-tuning's and targets everywhere; thinking-machines-lab/tinker-cookbook for the rate
by width. The learning-rate rule is a fit over models of a billion parameters and more.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from lorakit.recipes.schema import Recipe

#: Exponent of (2000 / hidden size) by model family; 0.5 where none was measured.
_WIDTH_EXPONENT = {"llama": 0.781, "qwen2": 0.0775, "qwen3": 0.0775}


@dataclass(frozen=True)
class RunFacts:
    """What the defaults are computed from.

    `parameters_per_rank` is Σ (d_in + d_out) over the targets; `narrowest` the smallest of those
    dimensions; `bits_per_token` the base's mean loss on the data in bits, None if not measured.
    """

    rows: int
    loss_tokens: int
    hidden_size: int
    family: str
    parameters_per_rank: int
    narrowest: int
    bits_per_token: float | None
    held_out_rows: int


@dataclass(frozen=True)
class Default:
    """A value that was chosen, and why."""

    key: str
    value: object
    reason: str


def _power_of_two_near(x: float) -> int:
    return 2 ** round(math.log2(max(1.0, x)))


def _power_of_two_above(x: float) -> int:
    return 2 ** math.ceil(math.log2(max(1.0, x)))


def capacity_sentence(facts: RunFacts, rank: int) -> str:
    """The data's bits against the adapter's, in words. Bounds memorising, not generalising."""
    per_token = facts.bits_per_token if facts.bits_per_token is not None else 1.0
    bits = facts.loss_tokens * per_token
    parameters = rank * facts.parameters_per_rank
    verdict = "ample" if bits <= parameters else "tight" if bits <= 2 * parameters else "past capacity"
    text = (
        f"{_short(facts.loss_tokens)} loss tokens x {per_token:.1f} bits = at most {_short(bits)}bit to memorise; "
        f"rank {rank} is {_short(parameters)} parameters, about {_short(2 * parameters)}bit: {verdict}"
    )
    if verdict == "past capacity":
        need = _power_of_two_above(bits / 2 / facts.parameters_per_rank)
        text += f" (slower learning; rank {need} or full fine-tuning would hold it)"
    return text


def _short(number: float) -> str:
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.1f} {letter}"
    return f"{number:.0f} "


def choose_defaults(recipe: Recipe, facts: RunFacts) -> tuple[Recipe, list[Default]]:
    """The recipe with every open value filled in, and the reasons."""
    chosen: list[Default] = []

    def pick(key: str, value: object, reason: str) -> None:
        chosen.append(Default(key, value, reason))

    if recipe.method != "full" and recipe.rank is None:
        need = facts.loss_tokens * (facts.bits_per_token or 1.0) / facts.parameters_per_rank
        rank = max(1, min(max(16, _power_of_two_above(need)), 256, facts.narrowest // 2))
        pick("rank", rank, capacity_sentence(facts, rank))

    epochs, steps, batch = recipe.epochs, recipe.steps, recipe.batch_size
    if batch is None:
        top = 128 if facts.rows > 100_000 else 32
        batch = max(8, min(top, _power_of_two_near(facts.rows * (epochs or 1) / 1000)))
        pick("batch_size", batch, "a power of two near rows x epochs / 1000; LoRA prefers small batches")
    per_epoch = math.ceil(facts.rows / min(batch, facts.rows))
    if epochs is None and steps is None:
        epochs = 1.0 if per_epoch >= 1000 else 3.0
        pick("epochs", epochs, f"one pass is {per_epoch} steps" + ("" if epochs == 1 else ", fewer than 1000"))
    if steps is None:
        steps = max(1, round((epochs or 1) * per_epoch))
        pick("steps", steps, f"{per_epoch} a pass")
    if recipe.patience is None and facts.held_out_rows and steps > 1.5 * per_epoch:
        pick("patience", 3, "more than one pass: stop when the held-out loss has stopped falling")

    if recipe.lr is None:
        exponent = _WIDTH_EXPONENT.get(facts.family, 0.5)
        lr = min(1e-3, max(1e-4, 5e-4 * (2000 / facts.hidden_size) ** exponent))
        reason = f"5e-4 x (2000/{facts.hidden_size})^{exponent}, within 1e-4 .. 1e-3"
        if steps < 1000:
            boost = 1.5 if steps <= 100 else 1 + 0.5 * (1000 - steps) / 900
            lr, reason = lr * boost, f"{reason}; x{boost:.2f} for a short run"
        if recipe.method == "full":
            lr, reason = lr / 10, f"a tenth of LoRA's: {reason}"
        pick("lr", float(f"{lr:.3g}"), reason)
    if recipe.eval_steps is None and facts.held_out_rows:
        # A row costs a third in evaluation of what it costs in training.
        affordable = 0.1 * 3 * steps * batch / facts.held_out_rows
        times = int(min(10, max(2, affordable)))
        pick("eval_steps", max(1, steps // times), f"{times} evaluations, about a tenth of the time")
    if recipe.save_steps is None:
        pick("save_steps", max(1, steps // 10), "ten checkpoints, the last two kept")
    return recipe.model_copy(update={d.key: d.value for d in chosen}), chosen
