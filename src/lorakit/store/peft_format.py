"""PEFT's checkpoint format, both ways: its config keys and its tensor names.

Pure translation between `Adapter` and (config, tensors); files are `adapters.py`'s business.
Checked against PEFT 0.21 itself in the tests.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import torch

from lorakit.adapters.methods.dora import DoRA
from lorakit.adapters.methods.lora import LoRA, as_plain
from lorakit.adapters.plan import Adapter, AdapterPlan, ModulePlan
from lorakit.adapters.targets import pattern_value
from lorakit.errors import LorakitError, did_you_mean

PREFIX = "base_model.model."

# Keys of PEFT's LoraConfig that change nothing when an adapter is used, whatever they say.
_HARMLESS = {
    "auto_mapping", "base_model_name_or_path", "bias", "ensure_weight_tying", "exclude_modules", "fan_in_fan_out",
    "inference_mode", "init_lora_weights", "layers_pattern", "layers_to_transform", "lora_dropout", "megatron_core",
    "peft_type", "peft_version", "qalora_group_size", "revision", "runtime_config", "target_modules", "task_type",
    "eva_config", "loftq_config", "corda_config", "lora_ga_config",
}  # fmt: skip
_USED = {"r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora"}
# Where one of these is set, the adapter means something that this version does not compute.
_REFUSED = {
    "lora_bias": "a bias on B", "modules_to_save": "whole trained modules",
    "trainable_token_indices": "trained token rows", "target_parameters": "expert parameters",
    "layer_replication": "replicated layers", "use_qalora": "QA-LoRA", "use_bdlora": "block-diagonal LoRA",
    "megatron_config": "Megatron layers", "arrow_config": "Arrow routing", "alora_invocation_tokens": "aLoRA",
    "kasa_config": "KaSA", "monteclora_config": "Monte-Carlo LoRA", "velora_config": "VeLoRA",
}  # fmt: skip
# These initial values are kept by changing the base, which PEFT redoes on loading.
_BASE_CHANGING = {"pissa", "olora", "corda", "loftq", "lora_ga"}

# Our tensor names → PEFT's, for layers that multiply and for embeddings.
_MULTIPLIED = {"lora_A": "lora_A.weight", "lora_B": "lora_B.weight", "magnitude": "lora_magnitude_vector"}
_LOOKED_UP = {"lora_A": "lora_embedding_A", "lora_B": "lora_embedding_B", "magnitude": "lora_magnitude_vector"}
_SUFFIXES = {suffix: ours for table in (_MULTIPLIED, _LOOKED_UP) for ours, suffix in table.items()}


def check_config(config: Mapping[str, Any], where: str) -> None:
    """Refuse what changes the maths and is not understood.

    Raises:
        LorakitError: another PEFT method, a variant of LoRA not known here, or a key not known here.
    """
    kind = config.get("peft_type")
    if kind != "LORA":
        raise LorakitError(f"{where}: peft_type is {kind!r}; this version reads LORA")
    for key, value in config.items():
        if key in _HARMLESS or key in _USED or not value:
            continue
        if key in _REFUSED:
            raise LorakitError(
                f"{where}: {key} is set, so the adapter uses {_REFUSED[key]}, which is not supported yet"
            )
        hint = did_you_mean(key, _USED | _HARMLESS | set(_REFUSED))
        raise LorakitError(f"{where}: unknown key {key!r} (value {value!r}) may change the maths. {hint}".rstrip())
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.split("_niter")[0].lower() in _BASE_CHANGING:
        raise LorakitError(
            f"{where}: init_lora_weights is {start!r}: PEFT changes the base itself for it. Save it with PEFT's "
            "path_initial_model_for_weight_conversion to get a plain LoRA"
        )
    if config.get("bias", "none") != "none":
        raise LorakitError(f"{where}: bias is {config['bias']!r}: trained biases of the base are not supported yet")


def _split(key: str, where: str) -> tuple[str, str]:
    """``base_model.model.<path>.<suffix>`` → (path, our tensor name)."""
    for suffix, name in _SUFFIXES.items():
        if key.startswith(PREFIX) and key.endswith("." + suffix):
            return key[len(PREFIX) : -len(suffix) - 1], name
    raise LorakitError(f"{where}: unknown tensor {key!r}; an adapter's tensors end in {', '.join(_SUFFIXES)}")


def from_peft(
    config: Mapping[str, Any], tensors: Mapping[str, torch.Tensor], where: str
) -> tuple[Adapter, dict[str, torch.Tensor]]:
    """An `Adapter`, and whole base weights that PEFT put beside it (embeddings), by module path.

    The tensors decide which modules there are and their rank; the config decides alpha.

    Raises:
        LorakitError: see `check_config`; also half a pair, wrong shapes, values that are not finite.
    """
    check_config(config, f"{where}/adapter_config.json")
    for field in ("rank_pattern", "alpha_pattern"):
        for key in config.get(field) or {}:
            try:
                re.compile(key)
            except re.error as error:
                raise LorakitError(
                    f"{where}/adapter_config.json: {field}: {key!r} is no regular expression: {error}"
                ) from None
    family = DoRA if config.get("use_dora") else LoRA
    method = family(
        rank=config.get("r", 8),
        alpha=config.get("lora_alpha", 8),
        targets=_targets(config.get("target_modules")),
        dropout=config.get("lora_dropout") or 0.0,
        use_rslora=bool(config.get("use_rslora")),
        rank_pattern=config.get("rank_pattern") or {},
        alpha_pattern=config.get("alpha_pattern") or {},
    )
    pairs: dict[str, dict[str, torch.Tensor]] = defaultdict(dict)
    embeddings: set[str] = set()
    whole: dict[str, torch.Tensor] = {}
    for key, tensor in tensors.items():
        base_weight = re.fullmatch(re.escape(PREFIX) + r"(.+?)(?:\.base_layer)?\.weight", key)
        if base_weight and ".lora_" not in key:
            whole[base_weight[1]] = tensor
            continue
        path, name = _split(key, where)
        pairs[path][name] = tensor
        if "lora_embedding" in key:
            embeddings.add(path)
        if not torch.isfinite(tensor).all():
            raise LorakitError(f"{where}: {key} has values that are not finite; the adapter is damaged or diverged")
    if not pairs:
        raise LorakitError(f"{where}: no LoRA tensors in adapter_model.safetensors")

    modules = []
    for path, pair in pairs.items():
        needed = {"lora_A", "lora_B"} | ({"magnitude"} if family is DoRA else set())
        if set(pair) != needed:
            raise LorakitError(f"{where}: {path} has {', '.join(pair)}; needed are {', '.join(sorted(needed))}")
        a, b = pair["lora_A"], pair["lora_B"]
        if a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1]:
            raise LorakitError(
                f"{where}: {path} has A {tuple(a.shape)} and B {tuple(b.shape)}; expected (r, in) and (out, r)"
            )
        rank = a.shape[0]
        expected = pattern_value(method.rank_pattern, path) or method.rank
        if rank != expected:
            raise LorakitError(
                f"{where}: {path} has rank {rank} in the tensors and {expected} in the config; the scale would be a guess"
            )
        alpha = float(pattern_value(method.alpha_pattern, path) or method.alpha)
        kind = "embedding" if path in embeddings else "linear"
        modules.append(
            ModulePlan(path, kind, a.shape[1], b.shape[0], rank, alpha, method.scale(rank, alpha), method.dropout)
        )
    return Adapter(AdapterPlan(method, tuple(modules)), dict(pairs), {}), whole


def _targets(value: Any) -> str | list[str]:
    if isinstance(value, str):
        return value if value == "all-linear" else f"re:{value}"
    return sorted(value) if value else "all-linear"


def to_peft(
    adapter: Adapter,
    all_paths: list[str],
    base_name: str | None,
    task_type: str | None,
    base_class: tuple[str, str] | None,
) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """(config, tensors) as PEFT 0.21 would have written them.

    Args:
        adapter: of the LoRA family. One that begins inside W (PiSSA, OLoRA) is written as a plain LoRA of
            twice the rank, so that the base it is loaded on need not be changed.
        all_paths: every module path of the base, to shorten the list of targets safely.
        base_name: for `base_model_name_or_path`.
        task_type: ``"CAUSAL_LM"``, or None for a bare model; then
        base_class: is its (class, module), which PEFT needs to load it by itself.
    """
    if not isinstance(adapter.plan.method, LoRA):
        raise LorakitError(f"PEFT's LoRA format cannot hold the method {adapter.plan.method.name!r}")
    adapter = as_plain(adapter)
    method = adapter.plan.method
    assert isinstance(method, LoRA)
    modules = adapter.plan.modules
    # Exact, anchored keys: PEFT sorts the patterns when it saves them, so overlapping ones of the
    # user's would come back in another order and change the scale.
    ranks = {_anchored(m.path): m.rank for m in modules if m.rank != method.rank}
    alphas = {_anchored(m.path): _plain(m.alpha) for m in modules if m.alpha != method.alpha}
    config = {
        "alpha_pattern": alphas,
        "auto_mapping": None
        if task_type or base_class is None
        else {"base_model_class": base_class[0], "parent_library": base_class[1]},
        "base_model_name_or_path": base_name,
        "bias": "none",
        "fan_in_fan_out": any(m.kind == "conv1d" for m in modules),
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": _plain(method.alpha),
        "lora_dropout": method.dropout,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": method.rank,
        "rank_pattern": ranks,
        "target_modules": short_targets([m.path for m in modules], all_paths),
        "task_type": task_type,
        "use_dora": isinstance(method, DoRA),
        "use_rslora": method.use_rslora,
    }
    tensors = {}
    for module in modules:
        suffixes = _LOOKED_UP if module.kind == "embedding" else _MULTIPLIED
        for name, tensor in adapter.tensors[module.path].items():
            tensors[f"{PREFIX}{module.path}.{suffixes[name]}"] = tensor.detach().cpu().contiguous()
    return config, tensors


def _anchored(path: str) -> str:
    return "^" + re.escape(path)


def _plain(alpha: float) -> float | int:
    return int(alpha) if float(alpha).is_integer() else alpha


def short_targets(paths: list[str], all_paths: list[str]) -> list[str]:
    """The shortest list of names that PEFT's suffix rule expands to exactly these paths."""
    wanted = set(paths)
    names = []
    for leaf in dict.fromkeys(path.rsplit(".", 1)[-1] for path in paths):
        same = {p for p in all_paths if p == leaf or p.endswith("." + leaf)}
        names += [leaf] if same <= wanted else [p for p in paths if p.rsplit(".", 1)[-1] == leaf]
    return sorted(names)
