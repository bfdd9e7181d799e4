"""Other people's loops and loaders: HF Trainer, plain PEFT, and our own Python interface."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

import lorakit
from tests.conftest import TINY
from tests.models import ids, randomise


class Rows(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 16

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        tokens = ids(rows=1, length=12, seed=index)[0]
        return {"input_ids": tokens, "labels": tokens}


def test_hf_trainer_trains_it_and_saves_the_adapter_alone(small_model, tmp_path) -> None:
    model = lorakit.attach(lorakit.load_base(str(small_model), precision="fp32"), lorakit.LoRA(rank=4))
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=6, save_steps=3, per_device_train_batch_size=4, learning_rate=1e-2,
        report_to=[], use_cpu=True, logging_steps=1, gradient_checkpointing=True, disable_tqdm=True,
    )  # fmt: skip
    trainer = Trainer(model=model, args=arguments, train_dataset=Rows())
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]) != ("lora_" in name), name
    for step in (3, 6):
        folder = tmp_path / f"checkpoint-{step}"
        assert {p.name for p in folder.glob("*.safetensors")} == {"adapter_model.safetensors"}
    again = lorakit.load_adapter(lorakit.load_base(str(small_model), precision="fp32"), tmp_path / "checkpoint-6")
    tokens = ids(2, 9)
    model.eval()
    with torch.no_grad():
        assert torch.equal(again(tokens).logits, model(tokens).logits)


def test_the_readmes_python_and_plain_peft(rows_file, tmp_path) -> None:
    """As the README has it: train from Python, then load the folder with PEFT and nothing of ours."""
    base = lorakit.load_base("tiny", precision="fp32")
    model = lorakit.attach(base, lorakit.LoRA(rank=8))
    assert model is base
    run = lorakit.train(
        model, data=str(rows_file), steps=3, batch_size=4, lr=1e-3, output_dir=str(tmp_path / "run"), quiet=True
    )
    model.save(tmp_path / "adapter")
    peft = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32), run.result)
    tokens = ids(2, 9)
    with torch.no_grad():
        torch.testing.assert_close(peft(tokens).logits, model(tokens).logits, atol=1e-5, rtol=1e-5)
        peft = PeftModel.from_pretrained(
            AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32), tmp_path / "adapter"
        )
        torch.testing.assert_close(peft(tokens).logits, model(tokens).logits, atol=1e-5, rtol=1e-5)
        with model.using(None):
            plain = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32)(tokens).logits
            assert torch.equal(model(tokens).logits, plain)


def test_training_from_python_by_name(small_model, rows_file, tmp_path) -> None:
    run = lorakit.train(
        str(small_model), str(rows_file), lora_r=2, learning_rate=1e-3, steps=2, batch_size=2,
        output_dir=str(tmp_path / "run"), quiet=True,
    )  # fmt: skip
    assert run.model.adapter().plan.modules[0].rank == 2
    assert run.summary["steps"] == 2


def test_a_run_from_python_remembers_its_method(small_model, rows_file, tmp_path) -> None:
    """The recipe that is written describes the attached adapter, so that resuming trains the same one."""
    from lorakit.recipes.load import read_yaml

    base = lorakit.load_base(str(small_model), precision="fp32")
    method = lorakit.LoRA(rank=4, alpha=8, use_rslora=True, dropout=0.1, targets=["q_proj"], init="gaussian")
    run = lorakit.train(
        lorakit.attach(base, method),
        str(rows_file),
        steps=2,
        batch_size=2,
        output_dir=str(tmp_path / "run"),
        quiet=True,
    )
    stored = read_yaml(run.folder / "recipe.yaml")
    described = {key: stored[key] for key in ("method", "rank", "alpha", "dropout", "targets", "init")}
    assert described == {
        "method": "rslora", "rank": 4, "alpha": 8.0, "dropout": 0.1, "targets": ["q_proj"], "init": "gaussian"
    }  # fmt: skip


def test_what_python_runs_have_to_say_is_said(small_model, rows_file, tmp_path) -> None:
    from lorakit.training.console import SilentWatcher

    class Listener(SilentWatcher):
        def __init__(self) -> None:
            self.notes: list[str] = []

        def note(self, text: str) -> None:
            self.notes.append(text)

    listener = Listener()
    plain = AutoModelForCausalLM.from_pretrained(small_model)
    tokenizer = lorakit.load_base(str(small_model)).tokenizer
    run = lorakit.train(
        plain, str(rows_file), tokenizer=tokenizer, watcher=listener, max_length=80, overlong="drop", lora_r=2, steps=2,
        output_dir=str(tmp_path / "run"),
    )  # fmt: skip
    told = " ".join(listener.notes)
    for part in ("longer than max_length 80", "lora_r → rank", "batch_size: 8"):
        assert part in told
    assert run.result.name == "adapter", "a plain model gets an adapter; full fine-tuning has to be asked for"


def test_a_full_model_keeps_its_template(small_model, rows_file, tmp_path) -> None:
    from lorakit.cli.target import open_target

    template = tmp_path / "t.jinja"
    template.write_text(
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}<|end|>{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    run = lorakit.train(
        str(small_model), str(rows_file), method="full", template=str(template), steps=1, quiet=True,
        output_dir=str(tmp_path / "run"),
    )  # fmt: skip
    opened = open_target(str(run.folder))
    assert opened.template.chat == template.read_text()
    assert 6 in opened.stop
    assert "lm_head.weight" not in load_file(run.result / "model.safetensors"), "tied weights are written once"


def test_an_encoder_layer_of_torch_does_not_pass_the_adapter_by() -> None:
    torch.manual_seed(0)
    layer = torch.nn.TransformerEncoderLayer(16, 2, 32, batch_first=True).eval()
    with pytest.warns(UserWarning, match="leaves out self_attn"):
        model = lorakit.attach(layer, lorakit.LoRA(rank=2))
    randomise(model)
    with torch.no_grad():
        x = torch.randn(1, 5, 16)
        adapted = model(x)
        with model.using(None):
            assert not torch.allclose(adapted, model(x))
