from __future__ import annotations

import json
import math
import os
import signal

import pytest
import torch

import lorakit
from lorakit.errors import LorakitError
from lorakit.recipes.schema import Recipe
from lorakit.training.console import SilentWatcher
from lorakit.training.events import read_events
from lorakit.training.loop import Interrupted, Loop
from lorakit.training.optim import lr_factor
from lorakit.training.prepare import prepare
from lorakit.training.run import execute, stored_recipe

FAST = {"rank": 4, "batch_size": 4, "lr": 5e-3, "val_size": 8, "eval_steps": 3, "save_steps": 4, "precision": "fp32"}


def recipe(model, data, **settings) -> Recipe:
    given = {**FAST, "steps": 12, **settings}
    if given.get("method") == "full":
        del given["rank"]
    return Recipe(model=str(model), data=str(data), **given)


def tensors(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


class Stopper(SilentWatcher):
    """Asks for a stop, as Ctrl-C does, at a step."""

    def __init__(self, at: int):
        self.at = at
        self.notes: list[str] = []

    def step(self, total, progress, loss, tokens_per_second) -> None:
        if progress.step == self.at:
            os.kill(os.getpid(), signal.SIGINT)

    def note(self, text: str) -> None:
        self.notes.append(text)


class Notes(Stopper):
    def __init__(self) -> None:
        super().__init__(-1)


@pytest.mark.parametrize("method", ["lora", "full", "dora", "pissa", "lora+"])
def test_a_resumed_run_is_the_same_run_bit_for_bit(small_model, rows_file, tmp_path, method: str) -> None:
    """12 steps = 5 + 7 with dropout, evaluations and checkpoints in between; Ctrl-C at the fifth."""
    settings = {
        "lora": {"dropout": 0.1, "keep_best": False},
        "full": {"method": "full", "lr": 1e-3},
        "dora": {"method": "dora"},
        "pissa": {"init": "pissa"},
        "lora+": {"lr_b_ratio": 8.0},
    }[method]
    given = recipe(small_model, rows_file, **settings)
    whole = execute(prepare(given), tmp_path / "whole", SilentWatcher())
    with pytest.raises(Interrupted) as stopped:
        execute(prepare(given), tmp_path / "parts", Stopper(at=5))
    assert stopped.value.step == 5
    torch.manual_seed(1234)  # whatever state the new process is in
    again = execute(prepare(stored_recipe(tmp_path / "parts")), tmp_path / "parts", SilentWatcher(), resume=True)
    a, b = tensors(whole.model), tensors(again.model)
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)
    logs = [read_events(tmp_path / side / "events.jsonl") for side in ("whole", "parts")]
    losses = [[(e["event"], e["step"], e.get("loss")) for e in log] for log in logs]
    assert losses[0] == losses[1]
    for key in ("steps", "tokens", "eval_loss", "best_step"):
        assert whole.summary[key] == again.summary[key]


def test_accumulation_gives_the_same_gradients(small_model, rows_file, tmp_path) -> None:
    """1, 2 and 4 forward passes a step, and passes cut by tokens: one gradient."""
    results = []
    for settings in ({}, {"grad_accum": 2}, {"grad_accum": 4}, {"micro_tokens": 200}):
        prepared = prepare(recipe(small_model, rows_file, batch_size=8, **settings))
        with torch.no_grad():  # B = 0 would hide A's gradient
            for name, p in prepared.model.named_parameters():
                if "lora_B" in name:
                    p.fill_(0.01)
        loop = Loop(
            prepared.model, prepared.scorer, prepared.data.rows, (), prepared.recipe, tmp_path, SilentWatcher()
        )  # fmt: skip
        with prepared.scorer.active():
            loss = loop._backward(loop.plan.step(0))
        results.append((loss, {n: p.grad for n, p in prepared.model.named_parameters() if p.requires_grad}))
    for loss, gradients in results[1:]:
        assert loss == pytest.approx(results[0][0], rel=1e-6)
        for name, gradient in gradients.items():
            torch.testing.assert_close(gradient, results[0][1][name], atol=1e-7, rtol=1e-4, msg=name)
            assert gradient.abs().max() > 0


@pytest.mark.parametrize("method", ["lora", "rslora", "dora", "full"])
def test_it_learns(small_model, rows_file, tmp_path, method: str) -> None:
    rate = 1e-2 if method == "full" else 2e-2
    given = recipe(
        small_model, rows_file, method=method, steps=40, lr=rate, eval_steps=20, checkpointing=method == "lora"
    )
    run = execute(prepare(given), tmp_path / "run", SilentWatcher())
    events = read_events(run.folder / "events.jsonl")
    evals = [e["loss"] for e in events if e["event"] == "eval"]
    assert evals[-1] < evals[0] - 0.5
    assert (run.folder / "loss.png").stat().st_size > 5000
    summary = json.loads((run.folder / "summary.json").read_text())
    assert summary["tokens"] == sum(e["tokens"] for e in events if e["event"] == "step")
    assert summary["bytes"] > 0
    manifest = json.loads((run.folder / "manifest.json").read_text())
    assert manifest["versions"]["torch"] == torch.__version__
    assert manifest["base"]["fingerprint"] is not None


def test_full_fine_tuning_leaves_a_model_that_loads(small_model, rows_file, tmp_path) -> None:
    run = execute(prepare(recipe(small_model, rows_file, method="full", steps=4)), tmp_path / "run", SilentWatcher())
    loaded = lorakit.load_base(str(run.result), precision="fp32")
    for (name, a), (_, b) in zip(run.model.named_parameters(), loaded.named_parameters(), strict=True):
        assert torch.equal(a, b), name


def test_pretraining_from_a_config_alone(small_model, rows_file, tmp_path) -> None:
    folder = tmp_path / "config"
    folder.mkdir()
    for path in small_model.iterdir():
        if path.suffix != ".safetensors":
            (folder / path.name).write_bytes(path.read_bytes())
    for optimizer in ("adamw", "muon"):
        given = recipe(
            folder, rows_file, method="full", weights="random", steps=20, lr=1e-2, optimizer=optimizer,
            columns={"text": "completion"}, format="text", eval_steps=20,
        )  # fmt: skip
        run = execute(prepare(given), tmp_path / optimizer, SilentWatcher())
        assert run.summary["eval_loss"] < math.log(4096) - 0.3


def test_the_best_weights_are_kept_and_training_stops_early(small_model, rows_file, tmp_path) -> None:
    """A rate far too high: soon nothing improves, and three evaluations without gain end the run."""
    given = recipe(small_model, rows_file, steps=40, lr=0.5, eval_steps=2, patience=3, clip=0)
    prepared = prepare(given)
    watcher = Notes()
    run = execute(prepared, tmp_path / "run", watcher)
    evals = [e for e in read_events(run.folder / "events.jsonl") if e["event"] == "eval"]
    best = min(evals, key=lambda e: e["loss"])
    assert run.summary["stopped_early"]
    assert run.summary["steps"] == best["step"] + 2 * 3
    assert run.summary["eval_loss"] == best["loss"] < evals[-1]["loss"]
    assert any("stopped early" in note for note in watcher.notes)
    loop = Loop(
        prepared.model, prepared.scorer, prepared.data.rows, prepared.held_out.rows, prepared.recipe, tmp_path, watcher
    )
    with prepared.scorer.active():
        assert loop.evaluate() == pytest.approx(best["loss"], abs=1e-6)


def test_an_alarm_when_the_loss_does_not_fall(small_model, rows_file, tmp_path) -> None:
    watcher = Notes()
    execute(prepare(recipe(small_model, rows_file, steps=20, lr=1e-9)), tmp_path / "run", watcher)
    assert sum("the loss has not fallen" in note for note in watcher.notes) == 1
    assert any(e["event"] == "alarm" for e in read_events(tmp_path / "run" / "events.jsonl"))


def test_a_loss_that_is_not_finite_stops_the_run(small_model, rows_file, tmp_path) -> None:
    prepared = prepare(recipe(small_model, rows_file))
    with torch.no_grad():
        next(p for n, p in prepared.model.named_parameters() if "lora_B" in n).fill_(float("nan"))
    with pytest.raises(LorakitError, match="the loss is nan.*lower lr"):
        execute(prepared, tmp_path / "run", SilentWatcher())


def test_a_damaged_checkpoint_is_passed_over(small_model, rows_file, tmp_path) -> None:
    given = recipe(small_model, rows_file)
    whole = execute(prepare(given), tmp_path / "whole", SilentWatcher())
    with pytest.raises(Interrupted):
        execute(prepare(given), tmp_path / "run", Stopper(at=9))
    newest = tmp_path / "run/checkpoints/step-0000009/trained.safetensors"
    data = bytearray(newest.read_bytes())
    data[-5] ^= 0xFF
    newest.write_bytes(data)
    watcher = Notes()
    again = execute(prepare(stored_recipe(tmp_path / "run")), tmp_path / "run", watcher, resume=True)
    assert any("step-0000009 is damaged" in note for note in watcher.notes)
    assert all(
        torch.equal(a, b) for a, b in zip(tensors(whole.model).values(), tensors(again.model).values(), strict=True)
    )


def test_an_older_damaged_checkpoint_does_not_stop_a_run(small_model, rows_file, tmp_path) -> None:
    given = recipe(small_model, rows_file)
    with pytest.raises(Interrupted):
        execute(prepare(given), tmp_path / "run", Stopper(at=9))
    (tmp_path / "run/checkpoints/step-0000008/state.json").write_text("")
    run = execute(prepare(stored_recipe(tmp_path / "run")), tmp_path / "run", SilentWatcher(), resume=True)
    assert run.summary["steps"] == 12


def test_resuming_with_other_data_is_refused(small_model, rows_file, tmp_path) -> None:
    data = tmp_path / "rows.jsonl"
    data.write_bytes(rows_file.read_bytes())
    with pytest.raises(Interrupted):
        execute(prepare(recipe(small_model, data)), tmp_path / "run", Stopper(at=5))
    data.write_text(data.read_text().replace("restaurant", "pub"))
    with pytest.raises(LorakitError, match="the data has changed since the run began"):
        execute(prepare(stored_recipe(tmp_path / "run")), tmp_path / "run", SilentWatcher(), resume=True)


def test_checkpoints_hold_the_adapter_and_its_state_alone(small_model, rows_file, tmp_path) -> None:
    prepared = prepare(recipe(small_model, rows_file))
    execute(prepared, tmp_path / "run", SilentWatcher())
    sizes = sum(p.stat().st_size for p in (tmp_path / "run/checkpoints/step-0000012").iterdir())
    assert sizes < 4 * 3.5 * prepared.trainable + 40_000  # weights and two moments, and some kilobytes
    assert len(list((tmp_path / "run/checkpoints").glob("step-*"))) == 2


def test_one_process_a_folder(small_model, rows_file, tmp_path) -> None:
    import fcntl

    (tmp_path / "run").mkdir()
    with (tmp_path / "run/.lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(LorakitError, match="another process"):
            execute(prepare(recipe(small_model, rows_file)), tmp_path / "run", SilentWatcher())


def test_lora_plus_gives_b_its_own_rate(small_model, rows_file, tmp_path) -> None:
    """AdamW's first step has the size of the rate: B moves `lr_b_ratio` times as far as A would."""
    moved = {}
    for ratio in (1.0, 16.0):
        given = recipe(small_model, rows_file, steps=1, lr=1e-4, lr_b_ratio=ratio, keep_best=False, warmup_ratio=0)
        run = execute(prepare(given), tmp_path / f"{ratio}", SilentWatcher())
        tensors_ = run.model.adapter().tensors["model.layers.0.mlp.up_proj"]
        moved[ratio] = float(tensors_["lora_B"].abs().max())
    assert moved[1.0] == pytest.approx(1e-4, rel=0.05)
    assert moved[16.0] == pytest.approx(16e-4, rel=0.05)


def test_the_schedule() -> None:
    linear = [lr_factor(s, 100, "linear", 0.1) for s in range(100)]
    assert linear[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert linear[10] == 1.0
    assert linear[55] == pytest.approx(0.5)
    cosine = [lr_factor(s, 100, "cosine", 0.0, floor=0.1) for s in range(101)]
    assert cosine[0] == 1.0
    assert cosine[50] == pytest.approx(0.55)
    assert cosine[100] == pytest.approx(0.1)
    assert {lr_factor(s, 100, "constant", 0.0) for s in range(100)} == {1.0}


def test_events_go_to_tensorboard_too(small_model, rows_file, tmp_path) -> None:
    pytest.importorskip("tensorboard")
    execute(
        prepare(recipe(small_model, rows_file, steps=3, report_to=["tensorboard"])), tmp_path / "run", SilentWatcher()
    )
    assert list((tmp_path / "run/tensorboard").glob("events.out.*"))
