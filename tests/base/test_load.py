from __future__ import annotations

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import lorakit
from lorakit.base.files import fingerprint
from lorakit.base.precision import choose_precision
from lorakit.errors import LorakitError
from tests.conftest import HUB_CACHE, TINY
from tests.models import ids


def test_the_built_in_base_comes_with_its_tokenizer() -> None:
    model = lorakit.load_base("tiny", precision="fp32")
    assert model.tokenizer.chat_template
    assert model.base_info.fingerprint == fingerprint(TINY)
    assert not any(p.requires_grad for p in model.parameters())
    assert not model.training


def test_a_folder_and_a_hub_id_are_the_same_model(small_model) -> None:
    """The hub's own cache layout, offline: what `snapshot_download` finds there is loaded."""
    cached = HUB_CACHE / "models--someone--small"
    shutil.copytree(small_model, cached / "snapshots" / "0123abc")
    (cached / "refs").mkdir()
    (cached / "refs/main").write_text("0123abc")
    one, two = lorakit.load_base(str(small_model)), lorakit.load_base("someone/small", revision="main")
    assert one.base_info.fingerprint == two.base_info.fingerprint
    assert torch.equal(one(ids()).logits, two(ids()).logits)
    with pytest.raises(LorakitError, match="could not be reached"):
        lorakit.load_base("someone/small", revision="v2")


def test_the_fingerprint_is_of_the_weights_whatever_the_precision(small_model, tmp_path) -> None:
    marks = {lorakit.load_base(str(small_model), precision=p).base_info.fingerprint for p in ("fp32", "bf16")}
    assert len(marks) == 1
    other = tmp_path / "other"
    shutil.copytree(small_model, other)
    tensors = load_file(other / "model.safetensors")
    tensors["model.norm.weight"][0] += 1
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    assert fingerprint(other) not in marks
    sharded = tmp_path / "sharded"
    sharded.mkdir()
    names = sorted(load_file(small_model / "model.safetensors"))
    whole = load_file(small_model / "model.safetensors")
    save_file({n: whole[n] for n in names[::2]}, sharded / "b.safetensors")
    save_file({n: whole[n] for n in names[1::2]}, sharded / "a.safetensors")
    assert fingerprint(sharded) in marks, "the same tensors in other files"


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_precisions_and_an_adapter_over_each(small_model, precision: str, tmp_path) -> None:
    base = lorakit.load_base(str(small_model), precision=precision)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    assert {p.dtype for p in base.parameters()} == {dtype}
    model = lorakit.attach(base, lorakit.LoRA(rank=2))
    model.save(tmp_path / "adapter")
    assert {t.dtype for t in load_file(tmp_path / "adapter/adapter_model.safetensors").values()} == {torch.float32}


def test_auto_is_explained() -> None:
    choice = choose_precision("auto", "cpu")
    assert choice.value in ("fp32", "bf16")
    assert "bf16" in choice.reason


def test_an_in_memory_model_says_that_its_base_is_not_checked(small_model, tmp_path) -> None:
    lorakit.attach(lorakit.load_base(str(small_model)), lorakit.LoRA(rank=2)).save(tmp_path / "adapter")
    from transformers import AutoModelForCausalLM

    bare = AutoModelForCausalLM.from_pretrained(small_model)
    with pytest.warns(UserWarning, match="made in memory and has no fingerprint"):
        lorakit.load_adapter(bare, tmp_path / "adapter")


def test_mounting_several_from_disk(small_model, tmp_path) -> None:
    base = lorakit.load_base(str(small_model))
    model = lorakit.attach(base, lorakit.LoRA(rank=2), name="a")
    model.save(tmp_path / "one")
    assert model.mount(tmp_path / "one", name="other") == "other"
    assert model.mount(tmp_path / "one") == "one"
    assert model.mounted == ("a", "other", "one")
    assert model.active == {"a": 1.0}
    adapter = lorakit.read_adapter(tmp_path / "one")[0]
    assert model.mount(adapter, name="memory") == "memory"
    with pytest.raises(LorakitError, match="already mounted"):
        model.mount(tmp_path / "one")
