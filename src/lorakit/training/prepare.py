"""From a recipe to everything a run needs, resolved and checked, before a step is made."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch

from lorakit.adapters.methods import DoRA, Full, LoRA, Method
from lorakit.adapters.plan import AdapterPlan
from lorakit.base.batch import TokenRow
from lorakit.base.devices import fast_bf16
from lorakit.base.forward import Scorer
from lorakit.base.load import context_length, load_base
from lorakit.base.precision import choose_precision
from lorakit.data.dataset import TokenData, encode, end_tokens, hold_out, read_examples
from lorakit.data.formats import Example
from lorakit.data.template import Template
from lorakit.errors import LorakitError
from lorakit.recipes.defaults import Default, RunFacts, choose_defaults
from lorakit.recipes.schema import Recipe
from lorakit.store.attached import attach
from lorakit.training.loop import mean_loss

ExampleProgress = Callable[[Iterable[Example]], Iterable[Example]]


@dataclass(frozen=True)
class Prepared:
    """A run that could start now.

    Attributes:
        recipe: resolved; writing it down and reading it again gives the same run.
        defaults: what was chosen, and why.
        plan: of the adapter; empty for full fine-tuning.
        held_out: None when nothing is held out.
        trainable: exact number of trained parameters.
        notes: what the user should know before the start.
    """

    recipe: Recipe
    model: Any
    template: Template
    data: TokenData
    held_out: TokenData | None
    scorer: Scorer
    plan: AdapterPlan
    defaults: tuple[Default, ...]
    trainable: int
    notes: tuple[str, ...]


def method_of(recipe: Recipe) -> Method:
    """The method a recipe describes (with rank 1 where the rank is still open)."""
    if recipe.method == "full":
        return Full()
    family = DoRA if recipe.method == "dora" else LoRA
    return family(
        rank=recipe.rank or 1,
        alpha=recipe.alpha,
        targets=recipe.targets,
        exclude=recipe.exclude,
        dropout=recipe.dropout,
        use_rslora=recipe.method == "rslora",
        init=recipe.init,
        rank_pattern=recipe.rank_pattern,
        alpha_pattern=recipe.alpha_pattern,
    )


def prepare(recipe: Recipe, model: Any = None, progress: ExampleProgress = iter) -> Prepared:
    """Load the base and the data, resolve the recipe, and attach the adapter.

    Args:
        recipe: may have open values.
        model: an already loaded base with `.tokenizer` (attached or not); else `recipe.model` is loaded.
        progress: wraps the iteration over examples while they are encoded.

    Raises:
        LorakitError: anything in the recipe, the data or the base that would go wrong later.
    """
    notes: list[str] = []
    if recipe.method == "full":
        _refuse_adapter_keys(recipe)
    examples, form = read_examples(recipe.data, recipe.format, recipe.columns, recipe.max_rows)
    if model is None:
        # Full fine-tuning keeps fp32 masters; bf16 is then the arithmetic, not the storage.
        precision = "fp32" if recipe.method == "full" else recipe.precision
        model = load_base(
            recipe.model,
            precision=precision,
            device=recipe.device,
            revision=recipe.revision,
            weights=recipe.weights,
            seed=recipe.seed,
        )
    info = getattr(model, "base_info", None)
    if info is not None:
        precision = info.precision
        if recipe.method == "full":
            precision = choose_precision(recipe.precision, info.device.partition(":")[0]).value
            if precision == "bf16" and not fast_bf16(info.device):
                notes.append("this device has no fast bf16: the arithmetic is fp32, the result is saved in bf16")
        recipe = recipe.model_copy(update={"precision": precision, "device": info.device})
    template = Template(model.tokenizer, recipe.template)
    context = context_length(model)
    if recipe.max_length and recipe.max_length > context:
        raise LorakitError(
            f"max_length: {recipe.max_length} is more than the {context} positions that {recipe.model} has"
        )
    max_length = recipe.max_length or context
    data = encode(
        examples, form, template, max_length=max_length, loss=recipe.loss, overlong=recipe.overlong, progress=progress
    )
    notes += data.notes
    largest, known = max(int(row.input_ids.max()) for row in data.rows), model.get_input_embeddings().num_embeddings
    if largest >= known:
        raise LorakitError(
            f"model: its tokenizer makes token {largest}, but the model has embeddings for {known} tokens only; "
            "the two do not belong together"
        )
    if not end_tokens(data, model.tokenizer):
        notes.append("no row ends with a special token, so a trained model may not know where to stop")
    data, held_out = _split(recipe, data, template, max_length, notes)

    attached = getattr(model, "mounted", ())
    plan = model.adapter().plan if attached else method_of(recipe).plan(model)
    scorer = Scorer(model)
    notes += scorer.layout.notes
    recipe, defaults = choose_defaults(
        recipe.model_copy(update={"max_length": max_length}), _facts(model, plan, data, held_out, scorer)
    )
    if not attached:
        method = method_of(recipe)
        plan = method.plan(model)
        model = attach(model, method, seed=recipe.seed)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert attached or recipe.method == "full" or trainable == plan.trainable_parameters
    return Prepared(
        recipe, model, template, data, held_out, scorer, plan, tuple(defaults), trainable, tuple(notes)
    )  # fmt: skip


def _refuse_adapter_keys(recipe: Recipe) -> None:
    """Settings of an adapter mean nothing where there is none."""
    for key in ("rank", "targets", "exclude", "dropout", "init", "rank_pattern", "alpha_pattern", "lr_b_ratio"):
        if getattr(recipe, key) != Recipe.model_fields[key].default:
            raise LorakitError(f"recipe: {key} is for adapters; with method: full every weight is trained")


def _split(
    recipe: Recipe, data: TokenData, template: Template, max_length: int, notes: list[str]
) -> tuple[TokenData, TokenData | None]:
    if recipe.val_data:
        if recipe.val_size:
            raise LorakitError("recipe: val_data and val_size are both set; keep one")
        examples, form = read_examples(recipe.val_data, recipe.format, recipe.columns)
        held = encode(
            examples, form, template, max_length=max_length, loss=recipe.loss, overlong=recipe.overlong
        )  # fmt: skip
        return data, held
    if recipe.val_size == 0:
        return data, None
    if recipe.val_size is None and len(data.rows) < 40:
        notes.append(
            f"only {len(data.rows)} rows: none are held out, so there is no evaluation; give val_data or val_size"
        )
        return data, None
    return hold_out(data, recipe.val_size or min(0.05, 256 / len(data.rows)), recipe.seed)


def _facts(model: Any, plan: AdapterPlan, data: TokenData, held_out: TokenData | None, scorer: Scorer) -> RunFacts:
    """What the defaults need, the base's own loss on a few held-out rows included."""
    sample: list[TokenRow] = list((held_out or data).rows[:32])
    with scorer.active():
        nats = mean_loss(scorer, sample)
    if not math.isfinite(nats):
        raise LorakitError("model: the base's own loss on this data is not finite; its weights are damaged")
    dims = [(m.in_features, m.out_features) for m in plan.modules] or [(32, 32)]
    config = model.config.get_text_config()
    return RunFacts(
        rows=len(data.rows),
        loss_tokens=data.loss_tokens,
        hidden_size=int(getattr(config, "hidden_size", 0) or 1024),
        family=str(config.model_type),
        parameters_per_rank=sum(a + b for a, b in dims),
        narrowest=min(min(pair) for pair in dims),
        bits_per_token=nats / math.log(2),
        held_out_rows=len(held_out.rows) if held_out else 0,
    )


def versions() -> dict[str, str]:
    """What the run was made with."""
    import platform

    import safetensors
    import tokenizers
    import transformers

    import lorakit

    return {
        "lorakit": lorakit.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "tokenizers": tokenizers.__version__,
        "safetensors": safetensors.__version__,
    }
