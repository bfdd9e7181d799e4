"""Loading a base: any Hugging Face causal language model, frozen, with its tokenizer."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lorakit.base.devices import choose_device
from lorakit.base.files import find_model, fingerprint, weight_files
from lorakit.base.precision import PRECISIONS, choose_precision
from lorakit.errors import LorakitError


def context_length(model: Any) -> int:
    """The longest sequence the model has positions for; 2048 where it does not say."""
    config = model.config.get_text_config()
    length = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None) or 2048
    return int(length)


@dataclass(frozen=True)
class BaseInfo:
    """What is known of a loaded base, besides the model itself.

    `fingerprint` is None for a model that was made in memory.
    """

    name: str
    revision: str | None
    path: Path | None
    precision: str
    device: str
    fingerprint: str | None


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of a model folder.

    Raises:
        LorakitError: none there, or one that transformers cannot read.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder)
    except Exception as error:
        reason = str(error).splitlines()[0][:160] if str(error) else type(error).__name__
        raise LorakitError(f"model: the tokenizer in {folder} cannot be read: {reason}") from None


def load_base(
    name: str,
    *,
    precision: str = "auto",
    device: str = "auto",
    revision: str | None = None,
    weights: str = "pretrained",
    seed: int = 0,
) -> Any:
    """Load a base and freeze it. The model itself comes back, with `.tokenizer` and `.base_info`.

    Args:
        name: ``"tiny"``, a folder, or a hub id.
        precision: ``auto``, ``fp32`` or ``bf16``.
        device: ``auto``, ``cpu``, ``cuda``, ``mps``.
        revision: branch, tag or commit on the hub.
        weights: ``"pretrained"``, or ``"random"`` to start from the config alone (pretraining).
        seed: of the random weights.

    Raises:
        LorakitError: see `find_model`; also an unknown architecture or weights that do not fit.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    folder = find_model(name, revision)
    device_choice = choose_device(device).value
    chosen = PRECISIONS[choose_precision(precision, device_choice.partition(":")[0]).value]
    try:
        config = AutoConfig.from_pretrained(folder)
    except Exception as error:  # transformers raises many sorts; all mean that the file is no good
        raise LorakitError(f"model: the config of {name} cannot be read: {_first_line(error)}") from None

    if weights == "random":
        torch.manual_seed(seed)
        try:
            model = AutoModelForCausalLM.from_config(config, dtype=chosen.dtype)
        except Exception as error:
            raise LorakitError(
                f"model: no language model can be made from the config of {name}: {_first_line(error)}"
            ) from None
        mark = None
    else:
        weight_files(folder)
        mark = fingerprint(folder)  # also finds files that are cut short, before the loader does
        model = _pretrained(AutoModelForCausalLM, folder, name, {"dtype": chosen.dtype, **chosen.loader})
    model.to(device_choice)
    model.eval()
    model.requires_grad_(False)
    model.tokenizer = load_tokenizer(folder)
    model.base_info = BaseInfo(name, revision, folder, chosen.name, device_choice, mark)
    return model


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """transformers draws a bar and logs a report while it loads; what matters is read from the report."""
    from transformers.utils import logging as hf_logging

    level, bars = hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        hf_logging.set_verbosity(level)
        if bars:
            hf_logging.enable_progress_bar()


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return (lines[0] if lines else type(error).__name__)[:200]


def _pretrained(loader: Any, folder: Path, name: str, options: dict[str, Any]) -> Any:
    try:
        with _quiet():
            model, report = loader.from_pretrained(folder, use_safetensors=True, output_loading_info=True, **options)
    except Exception as error:
        raise LorakitError(f"model: {name} cannot be loaded: {_first_line(error)}") from None
    missing = sorted(report.get("missing_keys") or ())
    if missing:
        raise LorakitError(
            f"model: {name} lacks weights that a causal language model needs "
            f"({', '.join(missing[:3])}{', …' if len(missing) > 3 else ''}); it would run on random numbers"
        )
    mismatched = report.get("mismatched_keys") or ()
    if mismatched:
        raise LorakitError(f"model: {name} has weights of another shape than its config says: {sorted(mismatched)[0]}")
    return model
