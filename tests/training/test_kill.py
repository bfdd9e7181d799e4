"""kill −9 at random moments: the run goes on from its last checkpoint and ends the same."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time

from safetensors.torch import load_file

COMMAND = [sys.executable, "-m", "lorakit.cli.main", "train"]


def arguments(small_model, rows_file, folder) -> list[str]:
    return [
        *COMMAND, "--model", str(small_model), "--data", str(rows_file), "--output_dir", str(folder), "--rank", "4",
        "--steps", "300", "--batch_size", "2", "--lr", "3e-3", "--val_size", "8", "--eval_steps", "50",
        "--save_steps", "7", "--precision", "fp32", "--dropout", "0.1", "--resume", "auto",
    ]  # fmt: skip


def test_killed_three_times_and_still_the_same(small_model, rows_file, tmp_path) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    whole = arguments(small_model, rows_file, tmp_path / "whole")
    subprocess.run(whole, check=True, capture_output=True, env=environment, timeout=300)

    chance = random.Random(os.environ.get("LORAKIT_TEST_SEED", "kill"))
    folder = tmp_path / "killed"
    kills = 0
    for _ in range(3):
        process = subprocess.Popen(
            arguments(small_model, rows_file, folder),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env=environment,
        )
        log = folder / "events.jsonl"
        seen = log.read_text().count("\n") if log.exists() else 0
        while process.poll() is None and (not log.exists() or abs(log.read_text().count("\n") - seen) < 3):
            time.sleep(0.01)  # until it is at work again
        time.sleep(chance.uniform(0, 1.0))
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            kills += 1
        process.wait()
    finished = subprocess.run(
        arguments(small_model, rows_file, folder), capture_output=True, env=environment, timeout=300, text=True
    )
    assert finished.returncode == 0, finished.stderr
    assert kills >= 1
    a, b = (load_file(side / "adapter/adapter_model.safetensors") for side in (tmp_path / "whole", folder))
    assert a.keys() == b.keys()
    assert all((a[k] == b[k]).all() for k in a)
