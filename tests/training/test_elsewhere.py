"""Other people's loops and loaders: HF Trainer, plain PEFT, and our own Python interface."""

from __future__ import annotations

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

import lorakit
from tests.conftest import TINY
from tests.models import ids


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
