"""The README's first command, at its full length. `make test-slow`."""

from __future__ import annotations

import json

import pytest

from tests.conftest import ROOT


@pytest.mark.slow
def test_quickstart_teaches_the_built_in_base(run_cli, monkeypatch, tmp_path) -> None:
    monkeypatch.chdir(ROOT)
    code, _, err = run_cli("train", "examples/e2e/quickstart.yaml", "--output_dir", tmp_path / "run")
    assert code == 0, err
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert summary["adapter"]["loss"] < summary["base"]["loss"] - 2
    assert summary["adapter"]["bleu"] > summary["base"]["bleu"] + 20
