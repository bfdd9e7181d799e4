"""The verbs as a user types them, on a small model."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time

import pytest

from lorakit.training.events import read_events


@pytest.fixture(scope="module")
def run(small_model, rows_file, tmp_path_factory):
    """One finished run, with test data, made by the real command in its own process."""
    folder = tmp_path_factory.mktemp("runs") / "first"
    recipe = folder.parent / "recipe.yaml"
    recipe.write_text(
        f"base_model: {small_model}\ndata: {rows_file}\ntest_data: {rows_file}\noutput_dir: {folder}\n"
        "lora_r: 4\nbatch_size: 8\nsteps: 30\nval_size: 8\nlr: 1.0e-3\n"
    )
    result = subprocess.run(
        [sys.executable, "-m", "lorakit.cli.main", "train", str(recipe), "learning_rate=2e-2"],
        capture_output=True, text=True, timeout=300, env={**os.environ, "COLUMNS": "80"},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    return folder, result


def test_train_shows_the_way_from_data_to_the_next_command(run) -> None:
    folder, result = run
    out = result.stdout
    for part in (
        "base_model → model", "learning_rate → lr", "Plan", "prompt ← prompt", "trained parameters", "Chosen for you",
        "underlined: trained", "<|assistant|>", "tok/s", "left", "Before and after", "reference", "BLEU (all references)",
        "Next", f"lorakit generate {folder}",
    ):  # fmt: skip
        assert part in out, part
    assert max(len(line) for line in out.split("Before and after")[0].splitlines()) <= 80
    assert result.stderr == ""


def test_the_summary_has_what_was_promised(run) -> None:
    summary = json.loads((run[0] / "summary.json").read_text())
    assert summary["base"].keys() >= {"bleu", "loss"}
    assert summary["adapter"].keys() >= {"bleu", "loss", "bytes", "parameters"}
    assert summary.keys() >= {"seconds", "tokens_per_second", "peak_memory_bytes"}
    assert summary["adapter"]["loss"] < summary["base"]["loss"]
    size = (run[0] / "adapter/adapter_model.safetensors").stat().st_size
    assert summary["adapter"]["bytes"] == size
    assert size >= 4 * summary["adapter"]["parameters"]


def test_the_adapter_folder_tells_where_it_is_from(run) -> None:
    record = json.loads((run[0] / "adapter/lorakit.json").read_text())
    assert record["base"]["fingerprint"]
    assert record["data_fingerprint"]
    assert record["template"]["sha256"]
    assert (run[0] / "adapter/chat_template.jinja").exists()
    assert 6 in record["stop_token_ids"]
    assert set(record["scales"].values()) == {8.0}  # alpha 32 / rank 4


def test_eval_repeats_the_scores_of_the_run(run, run_cli, rows_file, tmp_path) -> None:
    out = tmp_path / "scores.json"
    code, shown, err = run_cli("eval", run[0], "--data", rows_file, "--out", out, "--max-new-tokens", 32)
    assert code == 0, err
    assert "adapter" in shown
    scores, summary = json.loads(out.read_text()), json.loads((run[0] / "summary.json").read_text())
    for side in ("base", "adapter"):
        assert scores[side]["loss"] == pytest.approx(summary[side]["loss"], abs=1e-4)
    assert len(scores["adapter"]["answers"]) == len({a["prompt"] for a in scores["adapter"]["answers"]})


def test_generate(run, run_cli, monkeypatch) -> None:
    code, one, _ = run_cli("generate", run[0], "--prompt", "name[Zizzi]", "--max-new-tokens", 5)
    assert code == 0
    monkeypatch.setattr(sys, "stdin", io.StringIO("name[Zizzi]\nname[Alimentum]\n"))
    code, two, _ = run_cli("generate", run[0], "--max-new-tokens", 5)
    assert code == 0
    assert two.splitlines()[0] == one.splitlines()[0]
    code, both, _ = run_cli(
        "generate", run[0] / "adapter", "--prompt", "name[Zizzi]", "--max-new-tokens", 5, "--compare"
    )
    assert one.strip() in both
    assert "base:" in both


def test_sampling_repeats_with_a_seed(run, run_cli) -> None:
    words = ("generate", run[0], "--prompt", "name[Zizzi]", "--max-new-tokens", 12, "--temperature", 1.0)
    first, second, third = (run_cli(*words, "--seed", seed)[1] for seed in (1, 1, 2))
    assert first == second != third


def test_chat_streams_and_switches_the_adapter(run, run_cli, monkeypatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("hello\n/base\nhello\n/reset\n/nonsense\n/quit\n"))
    code, out, err = run_cli("chat", run[0], "--max-new-tokens", 4, "--temperature", 0)
    assert code == 0, err
    assert out.count("model ›") == 2
    assert "adapter off" in out
    assert "a new conversation" in out


def test_dry_run_trains_nothing(run_cli, small_model, rows_file, tmp_path) -> None:
    code, out, _ = run_cli(
        "train", "--dry-run", "--model", small_model, "--data", rows_file, "--output_dir", tmp_path / "dry"
    )
    assert code == 0
    assert "Nothing was trained" in out
    assert "rank" in out
    assert not (tmp_path / "dry").exists()


def test_ctrl_c_leaves_a_run_that_resume_finishes(small_model, rows_file, run_cli, tmp_path) -> None:
    folder = tmp_path / "run"
    command = [
        sys.executable, "-m", "lorakit.cli.main", "train", "--model", str(small_model), "--data", str(rows_file),
        "--output_dir", str(folder), "--steps", "400", "--batch_size", "4", "--rank", "2", "--lr", "1e-3", "--val_size", "0",
    ]  # fmt: skip
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    log = folder / "events.jsonl"
    while process.poll() is None and (not log.exists() or log.read_text().count("\n") < 5):
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert f"lorakit resume {folder}" in out
    assert "Traceback" not in err
    code, out, err = run_cli("resume", folder)
    assert code == 0, err
    assert [e["step"] for e in read_events(log) if e["event"] == "step"] == list(range(1, 401))


def test_data_check(run_cli, rows_file, jsonl) -> None:
    code, out, _ = run_cli("data", "check", rows_file, "--max-length", 64)
    assert code == 0
    for part in (
        "prompt-completion",
        "48",
        "of them trained",
        "median",
        "rows are longer than 64",
        "█",
        "lorakit train",
    ):
        assert part in out, part
    spoiled = jsonl({"prompt": "what is <|end|>?", "completion": "a token"})
    assert "spell one of the tokenizer's special tokens" in run_cli("data", "check", spoiled)[1]


def test_doctor_and_help(run_cli) -> None:
    code, out, _ = run_cli("doctor")
    assert code == 0
    for part in ("torch", "auto means", "wandb", "fingerprint"):
        assert part in out
    assert run_cli("--version")[1].startswith("lorakit 0.")
    assert "learning rate" in run_cli("train", "--keys")[1]
    assert json.loads(run_cli("train", "--schema")[1])["title"] == "Recipe"


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; sys.argv = ['lorakit', '--help']\n"
        "from lorakit.cli.main import main\n"
        "try: main()\nexcept SystemExit: pass\n"
        "heavy = {'torch', 'transformers', 'pydantic', 'matplotlib', 'datasets'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
