"""Adapters written by PEFT work here, adapters written here work in PEFT: logits to 1e-5.

Both are also held against a hand-written W + s·B·A, since two programs can share a mistake.
"""

from __future__ import annotations

import copy
import json
import math

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file

import lorakit
from tests.models import embedding, ids, make, output, randomise, targets

FAMILIES = ["llama", "gpt2", "qwen2", "gemma3", "bert"]
LAYER = {"gpt2": r"h\.1\.attn\.c_attn", "bert": r"layer\.1\.attention\.self\.query"}

VARIANTS = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "patterns": {"rank_pattern": 2, "alpha_pattern": 24},
    "embedding": {"embedding": True},
    "dora": {"use_dora": True},
    "dora embedding": {"use_dora": True, "embedding": True, "use_rslora": True},
}


def arguments(family: str, variant: str) -> dict:
    options = dict(VARIANTS[variant])
    names = targets(family)
    if options.pop("embedding", False):
        names = [*names, embedding(family)]
    if "rank_pattern" in options:
        key = LAYER.get(family, r"layers\.1\.self_attn\.q_proj")
        options["rank_pattern"] = {key: options["rank_pattern"]}
        options["alpha_pattern"] = {key: options["alpha_pattern"]}
    return {"names": names, **options}


def by_hand(base: torch.nn.Module, folder, tokens: torch.Tensor) -> torch.Tensor:
    """The formula itself, read from the files with nothing of ours or PEFT's."""
    import re

    model = copy.deepcopy(base)
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = load_file(folder / "adapter_model.safetensors")
    for key, a in tensors.items():
        if not re.search(r"lora_(embedding_)?A", key):
            continue
        path = re.sub(r"^base_model\.model\.|\.lora_.*$", "", key)
        b = tensors[key.replace("_A", "_B")]
        rank, alpha = config["r"], config["lora_alpha"]
        for pattern, value in config.get("rank_pattern", {}).items():
            rank = value if re.match(rf"(.*\.)?({pattern})$", path) else rank
        for pattern, value in config.get("alpha_pattern", {}).items():
            alpha = value if re.match(rf"(.*\.)?({pattern})$", path) else alpha
        assert a.shape[0] == rank
        scale = alpha / math.sqrt(rank) if config["use_rslora"] else alpha / rank
        update = scale * b.double() @ a.double()
        module = model.get_submodule(path)
        transposed = "embedding" in key or type(module).__name__ == "Conv1D"
        weight = module.weight.detach().double()
        weight = (weight.T if transposed else weight) + update
        if config["use_dora"]:
            magnitude = tensors[f"base_model.model.{path}.lora_magnitude_vector"].double()
            weight = (magnitude / weight.norm(dim=1))[:, None] * weight
        weight = (weight.T if transposed else weight).float().contiguous()
        module.weight = torch.nn.Parameter(weight)  # untied from the head on purpose
    return output(model, tokens)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_peft_to_lorakit(family: str, variant: str, tmp_path) -> None:
    options = arguments(family, variant)
    base = make(family)
    tokens = ids()
    peft = get_peft_model(
        copy.deepcopy(base), LoraConfig(r=4, lora_alpha=8, target_modules=options.pop("names"), **options)
    )
    randomise(peft)
    peft.save_pretrained(tmp_path)
    with torch.no_grad():
        expected, plain = output(peft, tokens), output(base, tokens)
        ours = lorakit.load_adapter(copy.deepcopy(base), tmp_path)
        torch.testing.assert_close(output(ours, tokens), expected, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(output(ours, tokens), by_hand(base, tmp_path, tokens), atol=2e-5, rtol=1e-5)
        assert (expected - plain).abs().max() > 1e-2
        with ours.using(None):
            assert torch.equal(output(ours, tokens), plain)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_lorakit_to_peft(family: str, variant: str, tmp_path) -> None:
    options = arguments(family, variant)
    base = make(family)
    tokens = ids()
    method = lorakit.DoRA if options.pop("use_dora", False) else lorakit.LoRA
    ours = lorakit.attach(copy.deepcopy(base), method(rank=4, alpha=8, targets=options.pop("names"), **options))
    randomise(ours)
    ours.save(tmp_path / "adapter")
    with torch.no_grad():
        expected = output(ours, tokens)
        peft = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "adapter")
        torch.testing.assert_close(output(peft, tokens), expected, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(by_hand(base, tmp_path / "adapter", tokens), expected, atol=2e-5, rtol=1e-5)
        again = lorakit.load_adapter(copy.deepcopy(base), tmp_path / "adapter")
        assert torch.equal(output(again, tokens), expected)
        assert (expected - output(base, tokens)).abs().max() > 1e-2


def test_the_same_keys_as_peft(tmp_path) -> None:
    names = ["q_proj", "down_proj"]
    ours = lorakit.attach(make("llama"), lorakit.LoRA(rank=4, targets=names))
    ours.save(tmp_path / "ours")
    get_peft_model(make("llama"), LoraConfig(r=4, target_modules=names)).save_pretrained(tmp_path / "peft")
    a, b = (load_file(tmp_path / side / "adapter_model.safetensors") for side in ("ours", "peft"))
    assert {k: v.shape for k, v in a.items()} == {k: v.shape for k, v in b.items()}


def test_overlapping_patterns_survive_pefts_sorting(tmp_path) -> None:
    """PEFT sorts pattern keys when it saves; ours are exact, so the order cannot matter."""
    base = make("llama")
    patterns = {r"layers\.1\.self_attn\.k_proj": 2, "k_proj": 8}
    ours = lorakit.attach(
        copy.deepcopy(base), lorakit.LoRA(rank=4, targets=["q_proj", "k_proj"], rank_pattern=patterns)
    )
    randomise(ours)
    ours.save(tmp_path / "a")
    peft = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "a")
    peft.save_pretrained(tmp_path / "b")
    with torch.no_grad():
        back = lorakit.load_adapter(copy.deepcopy(base), tmp_path / "b")
        torch.testing.assert_close(output(back, ids()), output(ours, ids()), atol=1e-5, rtol=1e-5)
