"""The recipe: every setting of a run, strictly checked.

An unknown key is an error that names the nearest one; familiar spellings of other tools are
accepted, and what each became is said.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from lorakit.errors import LorakitError, did_you_mean


def parse_columns(text: str) -> dict[str, str]:
    """``"prompt=question,completion=answer"`` → a mapping of part to column."""
    parts = [part.split("=", 1) for part in text.split(",") if part]
    if any(len(part) != 2 for part in parts):
        raise LorakitError(f"columns: write part=column,part=column (prompt=question,completion=answer), not {text!r}")
    return {part.strip(): column.strip() for part, column in parts}


class Recipe(BaseModel):
    """All settings of one training run. ``None`` means: chosen from the data, and said why."""

    model_config = ConfigDict(extra="forbid", validate_default=False, allow_inf_nan=False)

    # what
    model: str = Field(description="the base: tiny, a folder, or a hub id")
    data: str = Field(description="training examples: a file, a folder, or a hub id")
    revision: str | None = Field(None, description="branch, tag or commit of a hub model")
    weights: Literal["pretrained", "random"] = Field("pretrained", description="random starts from the config alone")
    val_data: str | None = Field(None, description="held-out examples for the evaluation loss")
    val_size: float | None = Field(None, ge=0, description="held out of data: a share below 1, or a number of rows")
    test_data: str | None = Field(None, description="scored with the base and with the result: loss, BLEU, exact match")
    output_dir: str | None = Field(None, description="the run's folder; runs/<model>-<data> by default")

    # data
    format: str = Field("auto", description="auto, chat, sharegpt, alpaca, prompt-completion, classification, text")
    columns: dict[str, str] = Field({}, description="part: column, for files with other column names")
    template: str = Field("auto", description="auto (the tokenizer's), none, or a Jinja file")
    loss: Literal["auto", "completion", "last", "all"] = Field("auto", description="which tokens are trained")
    max_length: int | None = Field(None, ge=8, description="tokens a row may have")
    overlong: Literal["error", "drop", "split", "truncate"] = Field("error", description="what happens to longer rows")
    max_rows: int | None = Field(None, ge=1, description="use only the first rows of the file")

    # method
    method: Literal["lora", "rslora", "dora", "full"] = Field(
        "lora", description="lora, rslora, dora, or full fine-tuning"
    )
    rank: int | None = Field(None, ge=1, description="inner width of the adapter")
    alpha: float = Field(32.0, gt=0, description="scale is alpha/rank (rslora: alpha/sqrt(rank))")
    dropout: float = Field(0.0, ge=0, lt=1, description="on the adapter's input")
    init: Literal["uniform", "gaussian", "pissa", "olora"] = Field("uniform", description="where A and B begin")
    targets: str | list[str] = Field("all-linear", description="modules that get an adapter")
    exclude: list[str] = Field([], description="modules taken out of the targets")
    rank_pattern: dict[str, int] = Field({}, description="rank by pattern of module path")
    alpha_pattern: dict[str, float] = Field({}, description="alpha by pattern of module path")

    # optimisation
    epochs: float | None = Field(None, gt=0, description="passes over the data")
    steps: int | None = Field(None, ge=1, description="optimiser steps; overrides epochs")
    batch_size: int | None = Field(None, ge=1, description="rows a step, all forward passes together")
    grad_accum: int = Field(1, ge=1, description="forward passes a step is cut into; gradients stay the same")
    micro_tokens: int = Field(16384, ge=64, description="tokens of one forward pass at most")
    lr: float | None = Field(None, gt=0, description="peak learning rate")
    lr_b_ratio: float = Field(1.0, gt=0, description="the rate of B over that of A (LoRA+: about 16)")
    schedule: Literal["linear", "cosine", "constant"] = Field("linear", description="after the warm-up")
    warmup_ratio: float = Field(0.03, ge=0, lt=1, description="share of the steps")
    min_lr_ratio: float = Field(0.0, ge=0, le=1, description="where linear and cosine end, as a share of lr")
    optimizer: Literal["adamw", "muon"] = Field("adamw", description="muon: for matrices, with method full")
    weight_decay: float = Field(0.0, ge=0, description="decoupled")
    betas: tuple[float, float] = Field((0.9, 0.999), description="of AdamW")
    eps: float = Field(1e-8, gt=0, description="of AdamW")
    clip: float = Field(1.0, ge=0, description="gradient norm; 0 is off")

    # machine
    precision: str = Field("auto", description="of the base: auto, fp32, bf16")
    device: str = Field("auto", description="auto, cpu, cuda, mps")
    checkpointing: bool = Field(False, description="recompute activations: less memory, a third slower")

    # watching
    eval_steps: int | None = Field(None, ge=1, description="steps between evaluations; ten in a run by default")
    save_steps: int | None = Field(None, ge=1, description="steps between checkpoints; ten in a run by default")
    keep: int = Field(2, ge=1, description="checkpoints kept")
    keep_best: bool = Field(True, description="end with the weights of the best evaluation")
    patience: int | None = Field(None, ge=1, description="evaluations without gain before stopping early")
    report_to: list[Literal["tensorboard", "wandb"]] = Field([], description="further places for the log")
    seed: int = Field(0, ge=0, lt=2**63, description="of everything random")

    @field_validator("targets", "exclude", mode="before")
    @classmethod
    def _comma(cls, value: Any) -> Any:
        if isinstance(value, str) and "," in value and re.fullmatch(r"[\w.\-, ]+", value):
            return [part.strip() for part in value.split(",") if part.strip()]
        return value

    @field_validator("exclude", "report_to", mode="before")
    @classmethod
    def _listed(cls, value: Any) -> Any:
        if isinstance(value, str):
            return [] if value in ("", "none") else [part.strip() for part in value.split(",")]
        return value

    @field_validator("columns", mode="before")
    @classmethod
    def _pairs(cls, value: Any) -> Any:
        return parse_columns(value) if isinstance(value, str) else value


# Spellings of other tools → ours. A function gets the value and returns (key, value).
ALIASES: dict[str, str] = {
    "r": "rank", "lora_r": "rank", "lora_rank": "rank", "lora_alpha": "alpha", "lora_dropout": "dropout",
    "lora_target_modules": "targets", "target_modules": "targets", "lora_target": "targets",
    "exclude_modules": "exclude",
    "base_model": "model", "model_name_or_path": "model", "model_id": "model", "model_name": "model",
    "dataset": "data", "datasets": "data", "train_file": "data", "train_data": "data", "dataset_name": "data",
    "validation_file": "val_data", "eval_data": "val_data", "eval_dataset": "val_data",
    "val_set_size": "val_size", "validation_split": "val_size",
    "cutoff_len": "max_length", "sequence_len": "max_length", "max_seq_length": "max_length", "max_seq_len": "max_length",
    "learning_rate": "lr", "num_train_epochs": "epochs", "num_epochs": "epochs", "max_steps": "steps", "iters": "steps",
    "per_device_train_batch_size": "batch_size", "micro_batch_size": "batch_size",
    "gradient_accumulation_steps": "grad_accum", "lr_scheduler_type": "schedule", "lr_scheduler": "schedule",
    "max_grad_norm": "clip", "gradient_checkpointing": "checkpointing", "grad_checkpoint": "checkpointing",
    "finetuning_type": "method", "save_total_limit": "keep", "early_stopping_patience": "patience",
    "chat_template": "template", "out": "output_dir", "output": "output_dir", "optim": "optimizer",
    "adapter": "method", "max_samples": "max_rows", "torch_dtype": "precision", "dtype": "precision",
    "loraplus_lr_ratio": "lr_b_ratio",
}  # fmt: skip

_VALUES: dict[str, dict[str, str]] = {
    "precision": {"bfloat16": "bf16", "float32": "fp32"},
    "optimizer": {"adamw_torch": "adamw", "adamw_torch_fused": "adamw"},
    "schedule": {"constant_with_warmup": "constant"},
    "method": {"none": "full"},
}


def _special(key: str, value: Any) -> tuple[str | None, Any, str] | None:
    """Other tools' switches that mean something else here: (key or None, value, what is said)."""
    truth = value if isinstance(value, bool) else str(value).lower() in ("1", "true", "yes")
    if key in ("sample_packing", "packing"):
        return None, None, "dropped: rows are always laid end to end without padding, each attending to itself alone"
    if key == "train_on_inputs":
        return "loss", "all" if truth else "auto", f"loss: {'all' if truth else 'auto'}"
    if key in ("completion_only_loss", "assistant_only_loss"):
        return "loss", "auto" if truth else "all", f"loss: {'auto' if truth else 'all'}"
    if key == "use_dora":
        return ("method", "dora", "method: dora") if truth else (None, None, "dropped: it is off by default")
    if key == "use_rslora":
        return ("method", "rslora", "method: rslora") if truth else (None, None, "dropped: it is off by default")
    if key in ("bf16", "fp16"):
        if not truth:
            return None, None, "dropped: it is off by default"
        return "precision", "bf16" if key == "bf16" else "auto", f"precision: {'bf16' if key == 'bf16' else 'auto'}"
    if key == "warmup_steps":
        raise LorakitError("recipe: warmup_steps is not known here; give warmup_ratio, a share of the steps")
    return None


def apply_aliases(settings: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Settings under our names, and one line for every spelling that was changed.

    Raises:
        LorakitError: the same setting under two names.
    """
    result: dict[str, Any] = {}
    said: list[str] = []

    def put(key: str, value: Any, given: str) -> None:
        if key in result and result[key] != value:
            raise LorakitError(f"recipe: {given} and another spelling both set {key}; keep one")
        result[key] = value

    settings = dict(settings)
    rows = next((k for k in settings if k in ("per_device_train_batch_size", "micro_batch_size")), None)
    passes = "gradient_accumulation_steps"
    if rows and isinstance(settings[rows], int) and isinstance(settings.get(passes), int):
        # Elsewhere a step is rows x passes; here batch_size is the whole step.
        whole = settings[rows] * settings[passes]
        said.append(
            f"{rows} {settings[rows]} x {passes} {settings[passes]} → batch_size {whole} (all passes of a step)"
        )
        settings[rows] = whole

    for key, value in settings.items():
        key_ = key.replace("-", "_")
        if key_ in Recipe.model_fields:
            new = _VALUES.get(key_, {}).get(value, value) if isinstance(value, str) else value
            if new != value:
                said.append(f"{key}: {value} → {new}")
            put(key_, new, key)
        elif key_ in ALIASES:
            name = ALIASES[key_]
            value = _VALUES.get(name, {}).get(value, value) if isinstance(value, str) else value
            said.append(f"{key} → {name}")
            put(name, value, key)
        elif (special := _special(key_, value)) is not None:
            name_, value_, note = special
            said.append(f"{key} → {note}")
            if name_:
                put(name_, value_, key)
        else:
            put(key, value, key)
    return result, said


def build_recipe(settings: dict[str, Any], where: str = "recipe") -> Recipe:
    """A checked recipe.

    Raises:
        LorakitError: an unknown key (with the nearest), a missing one, a value of the wrong kind.
    """
    try:
        return Recipe(**settings)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        if first["type"] == "extra_forbidden":
            hint = did_you_mean(key, [*Recipe.model_fields, *ALIASES])
            raise LorakitError(f"{where}: unknown key {key!r}. {hint or 'See: lorakit train --help'}") from None
        if first["type"] == "missing":
            raise LorakitError(f"{where}: {key} is missing; give --{key}, or {key}: in the recipe") from None
        message = first["msg"].removeprefix("Value error, ").removeprefix("Assertion failed, ")
        raise LorakitError(f"{where}: {key}: {message} (it is {first['input']!r})") from None


def json_schema() -> dict[str, Any]:
    """The recipe's JSON schema, for editors that complete and check YAML."""
    return Recipe.model_json_schema()


def default_output(recipe: Recipe) -> str:
    """``runs/<model>-<data>`` for a run that names no folder."""
    stem = Path(recipe.data.rstrip("/")).name.split(".")[0] or "data"
    return f"runs/{Path(recipe.model.rstrip('/')).name}-{stem}"
