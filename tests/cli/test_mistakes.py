"""Every mistake of a user: one clear line on stderr, exit code 2, no traceback, nothing lost."""

from __future__ import annotations

import json
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import lorakit

ROW = {"prompt": "ask", "completion": "answer"}


@pytest.fixture
def train(run_cli, small_model, tmp_path, jsonl):
    """`lorakit train` with sound arguments, some replaced; None takes one away."""

    def run(*extra: object, **changes: object) -> tuple[int, str, str]:
        arguments: dict[str, object] = {
            "model": small_model, "data": None, "output_dir": tmp_path / "run", "steps": 2, "batch_size": 2, **changes
        }  # fmt: skip
        if arguments["data"] is None and "data" not in changes:
            arguments["data"] = jsonl(*[ROW] * 4)
        words = [w for key, value in arguments.items() if value is not None for w in (f"--{key}", value)]
        return run_cli("train", *extra, *words)

    return run


@pytest.fixture
def adapter(small_model, tmp_path) -> Path:
    model = lorakit.attach(lorakit.load_base(str(small_model)), lorakit.LoRA(rank=2))
    return model.save(tmp_path / "adapter")


def refused(result: tuple[int, str, str], *said: str) -> None:
    code, _, err = result
    assert code == 2, err
    assert err.startswith("error: ")
    assert err.count("\n") == 1, f"one line, please:\n{err}"
    assert "Traceback" not in err
    for part in said:
        assert part in err, f"{part!r} not in {err!r}"


class TestRecipe:
    def test_unknown_key(self, train) -> None:
        refused(train(learning_rat=1e-3), "unknown key 'learning_rat'", "learning_rate")

    def test_unknown_key_as_override(self, train) -> None:
        refused(train("rnak=4"), "unknown key 'rnak'", "'rank'")

    def test_wrong_kind_of_value(self, train) -> None:
        refused(train(rank="many"), "rank", "'many'")

    def test_missing_recipe_file(self, train) -> None:
        refused(train("nowhere.yaml"), "no file nowhere.yaml")

    def test_a_data_file_in_place_of_a_recipe(self, train) -> None:
        refused(train("train.jsonl"), "--data train.jsonl")

    def test_no_data(self, train) -> None:
        refused(train(data=None), "data is missing; give --data")

    def test_a_flag_without_value(self, train) -> None:
        refused(train("--checkpointing"), "--checkpointing")

    def test_unknown_device_and_precision(self, train) -> None:
        refused(train(device="cudda"), "'cudda'", "'cuda'")
        refused(train(precision="bf61"), "'bf61'", "'bf16'")
        if not torch.cuda.is_available():
            refused(train(device="cuda"), "no CUDA device")

    def test_uninstalled_reporter(self, train) -> None:
        try:
            import wandb  # noqa: F401
        except ImportError:
            refused(train(report_to="wandb"), "wandb is not installed", "pip install")


class TestData:
    def test_missing_file(self, train, jsonl) -> None:
        refused(train(data=jsonl(ROW).with_name("dta.jsonl")), "no file", "data.jsonl")

    def test_empty_file(self, train, jsonl) -> None:
        refused(train(data=jsonl()), "has no rows")

    def test_broken_line(self, train, jsonl) -> None:
        path = jsonl(ROW, ROW)
        path.write_text(path.read_text() + '{"prompt": "x"')
        refused(train(data=path), "line 3: not valid JSON")

    def test_row_without_completion(self, train, jsonl) -> None:
        refused(train(data=jsonl(ROW, {"prompt": "ask"})), "line 2: no 'completion'")

    def test_empty_completion(self, train, jsonl) -> None:
        refused(train(data=jsonl(ROW, {"prompt": "ask", "completion": ""})), "line 2: completion is empty")

    def test_row_with_nothing_to_train(self, train, jsonl) -> None:
        turns = [{"role": "user", "content": "u"}, {"role": "assistant", "content": "a", "weight": 0}]
        refused(train(data=jsonl({"messages": turns})), "line 1: no token of this row would be trained")

    def test_unknown_role(self, train, jsonl) -> None:
        refused(train(data=jsonl({"messages": [{"role": "asistant", "content": "a"}]})), "message 1", "'assistant'")

    def test_overlong_row(self, train, jsonl) -> None:
        path = jsonl(ROW, {"prompt": "ask " * 80, "completion": "answer"})
        refused(train(data=path, max_length=32), "1 of 2 rows are longer than max_length 32", "line 2")

    def test_more_than_the_model_has_positions_for(self, train) -> None:
        refused(train(max_length=100_000), "max_length: 100000 is more than the 512 positions")

    def test_wrong_columns(self, train, jsonl) -> None:
        refused(train(data=jsonl({"mr": "a", "ref": "b"})), "mr, ref", "--columns")
        refused(train(data=jsonl({"mr": "a", "ref": "b"}), columns="prompt=mr,completion=reff"), "'reff'", "'ref'")

    def test_template_that_is_not_there(self, train) -> None:
        refused(train(template="mine.jinja"), "template: 'mine.jinja'")

    def test_template_that_is_broken(self, train, tmp_path) -> None:
        (tmp_path / "t.jinja").write_text("{% for m in messages %}{{ m.content }}")
        refused(train(template=tmp_path / "t.jinja"), "the chat template refuses")

    def test_val_size_that_takes_everything(self, train) -> None:
        refused(train(val_size=4), "leaves nothing to train on")


class TestModel:
    def test_missing_folder(self, train) -> None:
        refused(train(model="./no/such/model"), "./no/such/model does not exist")

    def test_misspelt_built_in(self, train) -> None:
        refused(train(model="tinny"), "Did you mean 'tiny'")

    def test_hub_id_offline(self, train) -> None:
        refused(train(model="someone/some-model"), "could not be reached")

    def test_pickled_weights(self, train, small_model, tmp_path) -> None:
        folder = tmp_path / "pickled"
        shutil.copytree(small_model, folder)
        (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
        refused(train(model=folder), "pytorch_model.bin, a pickle")

    def test_corrupt_weights(self, train, small_model, tmp_path) -> None:
        folder = tmp_path / "cut"
        shutil.copytree(small_model, folder)
        data = (folder / "model.safetensors").read_bytes()
        (folder / "model.safetensors").write_bytes(data[:-100])
        refused(train(model=folder), "model.safetensors", "cut short")
        (folder / "model.safetensors").write_bytes(b"x" * 50)
        refused(train(model=folder), "not a safetensors file")

    def test_missing_weights(self, train, small_model, tmp_path) -> None:
        folder = tmp_path / "lacking"
        shutil.copytree(small_model, folder)
        tensors = load_file(folder / "model.safetensors")
        del tensors["model.layers.0.self_attn.q_proj.weight"]
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        refused(train(model=folder), "lacks weights", "q_proj")

    def test_unknown_architecture(self, train, small_model, tmp_path) -> None:
        folder = tmp_path / "strange"
        shutil.copytree(small_model, folder)
        (folder / "config.json").write_text(json.dumps({"model_type": "lama"}))
        refused(train(model=folder), "config", "lama")

    def test_target_that_matches_nothing(self, train) -> None:
        refused(train(targets="q_proj,v_prj"), "'v_prj' matches no module", "v_proj")

    def test_an_adapter_in_place_of_a_model(self, train, adapter) -> None:
        refused(train(model=adapter), "is an adapter, not a model")


class TestAdapter:
    def ask(self, run_cli, target, *extra) -> tuple[int, str, str]:
        return run_cli("generate", target, "--prompt", "x", "--max-new-tokens", 2, *extra)

    def test_a_sound_one_answers(self, run_cli, adapter) -> None:
        assert self.ask(run_cli, adapter)[0] == 0

    def test_missing(self, run_cli, adapter) -> None:
        refused(run_cli("eval", adapter.with_name("adaptor"), "--data", "x.jsonl"), "x.jsonl")
        refused(self.ask(run_cli, f"./{adapter.name}x"), "does not exist")

    def test_pickle(self, run_cli, adapter) -> None:
        (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
        refused(self.ask(run_cli, adapter), "adapter_model.bin, a pickle")

    def test_cut_short_and_bit_flipped(self, run_cli, adapter) -> None:
        weights = adapter / "adapter_model.safetensors"
        data = weights.read_bytes()
        weights.write_bytes(data[:-10])
        refused(self.ask(run_cli, adapter), "cut short")
        weights.write_bytes(data[:-3] + bytes([data[-3] ^ 1]) + data[-2:])
        refused(self.ask(run_cli, adapter), "checksum differs")

    def test_of_another_base(self, run_cli, adapter) -> None:
        refused(self.ask(run_cli, adapter, "--model", "tiny"), "trained on another base")

    def test_of_another_base_without_our_record(self, run_cli, adapter) -> None:
        (adapter / "lorakit.json").unlink()
        refused(self.ask(run_cli, adapter, "--model", "tiny"), "another base")

    def edit(self, adapter: Path, **changes: object) -> None:
        (adapter / "lorakit.json").unlink(missing_ok=True)
        path = adapter / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    @pytest.mark.parametrize(
        ("changes", "said"),
        [
            ({"use_dora": True}, "needed are lora_A, lora_B, magnitude"),
            ({"lora_bias": True}, "lora_bias is set"),
            ({"modules_to_save": ["lm_head"]}, "modules_to_save is set"),
            ({"init_lora_weights": "pissa"}, "PEFT changes the base itself"),
            ({"peft_type": "IA3"}, "peft_type is 'IA3'"),
            ({"use_dorra": True}, "unknown key 'use_dorra'"),
            ({"bias": "all"}, "bias is 'all'"),
            ({"r": 4}, "rank 2 in the tensors and 4 in the config"),
            ({"target_modules": ["q_proj", "embed_tokens"]}, "targets 'embed_tokens', but no tensor"),
        ],
    )
    def test_what_would_change_the_maths(self, run_cli, adapter, small_model, changes: dict, said: str) -> None:
        self.edit(adapter, **changes)
        refused(self.ask(run_cli, adapter, "--model", small_model), said)

    @pytest.mark.parametrize("damage", ["missing layer", "half a pair", "unknown key", "not finite", "shape"])
    def test_tensors_that_do_not_fit(self, run_cli, adapter, small_model, damage: str) -> None:
        self.edit(adapter)
        weights = adapter / "adapter_model.safetensors"
        tensors = load_file(weights)
        key = "base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"
        if damage == "missing layer":
            tensors = {k: v for k, v in tensors.items() if "layers.1.self_attn.q_proj" not in k}
        elif damage == "half a pair":
            del tensors[key]
        elif damage == "unknown key":
            tensors[key.replace("lora_A", "lora_C")] = tensors[key].clone()
        elif damage == "not finite":
            tensors[key][0, 0] = float("inf")
        else:
            tensors[key] = tensors[key][:, :-1].contiguous()
        save_file(tensors, weights, metadata={"format": "pt"})
        said = {
            "missing layer": "have no tensors", "half a pair": "has lora_B; needed are lora_A, lora_B", "unknown key": "unknown tensor",
            "not finite": "not finite", "shape": "another base",
        }[damage]  # fmt: skip
        refused(self.ask(run_cli, adapter, "--model", small_model), said)


class TestFolders:
    def test_a_run_is_not_written_over(self, train) -> None:
        assert train()[0] == 0
        refused(train(), "already holds a run", "--overwrite")

    def test_other_files_are_not_touched(self, train, tmp_path) -> None:
        (tmp_path / "run").mkdir()
        (tmp_path / "run/thesis.txt").write_text("years of work")
        refused(train(), "not a run folder")
        refused(train("--overwrite"), "not a run folder")
        assert (tmp_path / "run/thesis.txt").read_text() == "years of work"

    def test_resuming_what_is_not_there(self, run_cli, tmp_path) -> None:
        refused(run_cli("resume", tmp_path / "nowhere"), "is not a run folder")

    def test_resuming_what_is_finished(self, train, run_cli, tmp_path) -> None:
        assert train()[0] == 0
        refused(run_cli("resume", tmp_path / "run"), "is finished")

    def test_a_file_where_the_folder_should_be(self, train, tmp_path) -> None:
        (tmp_path / "run").write_text("")
        refused(train(), "is a file, not a folder")

    def test_no_disk_space(self, small_model, jsonl, tmp_path) -> None:
        """A process that may write 20 kB a file at most: the first checkpoint does not fit."""
        command = [
            sys.executable, "-m", "lorakit.cli.main", "train", "--model", str(small_model), "--steps", "2",
            "--data", str(jsonl(*[ROW] * 4)), "--output_dir", str(tmp_path / "run"), "--batch_size", "2",
        ]  # fmt: skip
        result = subprocess.run(
            command, capture_output=True, text=True, timeout=120,
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000)),
        )  # fmt: skip
        refused((result.returncode, result.stdout, result.stderr), "no space left to write it")
        assert not list((tmp_path / "run/checkpoints").glob("*/trained.safetensors"))


class TestQuestions:
    def test_unknown_metric(self, run_cli, small_model, jsonl) -> None:
        refused(run_cli("eval", small_model, "--data", jsonl(ROW), "--metrics", "blue"), "'blue'", "'bleu'")

    def test_empty_prompt(self, run_cli, small_model) -> None:
        refused(run_cli("generate", small_model, "--prompt", " "), "the prompt is empty")

    def test_text_has_no_answers_to_score(self, run_cli, small_model, jsonl) -> None:
        refused(run_cli("eval", small_model, "--data", jsonl({"text": "once upon a time"})), "--metrics loss")

    def test_a_row_that_is_not_there(self, run_cli, jsonl) -> None:
        refused(run_cli("data", "check", jsonl(ROW), "--row", 9), "no row 9")

    def test_unknown_verb(self, run_cli) -> None:
        code, _, err = run_cli("trian")
        assert code == 2
        assert "train" in err

    def test_a_prompt_longer_than_the_model(self, run_cli, small_model) -> None:
        refused(run_cli("generate", small_model, "--prompt", "word " * 600), "the model has positions for 512")


class TestNothingIsLost:
    """A user's files and earlier runs survive whatever is asked for."""

    def test_a_folder_with_a_recipe_and_other_things_is_not_a_run(self, train, tmp_path, jsonl) -> None:
        folder = tmp_path / "project"
        folder.mkdir()
        data = jsonl(*[ROW] * 4, name="project/mine.jsonl")
        (folder / "recipe.yaml").write_text(f"data: {data}\n")
        for extra in ((), ("--overwrite",)):
            refused(train(folder / "recipe.yaml", *extra, data=None, output_dir=folder), "not a run folder")
        assert {p.name for p in folder.iterdir()} == {"recipe.yaml", "mine.jsonl"}

    @pytest.mark.parametrize("name", ["adapter", "model", "recipe.yaml", "manifest.json"])
    def test_what_only_looks_like_a_run_is_left_alone(self, train, tmp_path, name: str) -> None:
        (tmp_path / "run").mkdir()
        mine = tmp_path / "run" / name
        mine.write_text('{"name": "my web app"}')
        refused(train("--overwrite"), "not a run folder")
        assert mine.exists()

    def test_overwriting_begins_when_all_is_checked(self, train, tmp_path) -> None:
        assert train()[0] == 0
        refused(train("--overwrite", data=tmp_path / "typo.jsonl"), "no file")
        refused(train("--overwrite", targets="q_prj"), "matches no module")
        assert (tmp_path / "run/summary.json").exists()
        assert (tmp_path / "run/adapter").exists()
        (tmp_path / "run/my-notes.txt").write_text("keep me")
        assert train("--overwrite")[0] == 0
        assert (tmp_path / "run/my-notes.txt").exists()

    def test_a_run_that_is_at_work_is_left_alone(self, train, tmp_path) -> None:
        import fcntl

        assert train()[0] == 0
        with (tmp_path / "run/.lock").open("w") as held:
            fcntl.flock(held, fcntl.LOCK_EX)
            refused(train("--overwrite"), "another process")
        assert (tmp_path / "run/summary.json").exists()


class TestOddFiles:
    @pytest.mark.parametrize(
        ("name", "content", "said"),
        [
            ("a.jsonl", "{}\n", "fit no known format"),
            ("a.json", "5", "expected a list of rows, found int"),
            ("a.jsonl", '{"prompt": "a", "prompt": "b", "completion": "c"}\n', "'prompt' stands twice"),
            ("a.csv", "prompt,completion,completion\na,b,c\n", "'completion' stands twice"),
            ("a.jsonl", '{"prompt": "\\ud800", "completion": "c"}\n', "surrogate"),
            ("a.jsonl", '{"prompt": ' + "9" * 5000 + ', "completion": "c"}\n', "line 1"),
            ("a.jsonl", "[" * 100_000 + "\n", "line 1"),
        ],
    )
    def test_data(self, train, tmp_path, name: str, content: str, said: str) -> None:
        (tmp_path / name).write_text(content)
        refused(train(data=tmp_path / name), said)

    @pytest.mark.parametrize(
        ("key", "value", "said"),
        [
            ("epochs", "inf", "finite"), ("lr", "nan", "finite"), ("seed", 10**30, "seed"),
            ("output_dir", "x" * 300, "name too long"), ("columns", "foo", "part=column"),
        ],
    )  # fmt: skip
    def test_values(self, train, key: str, value: object, said: str) -> None:
        code, _, err = train(**{key: value})
        assert code == 2
        assert said in err.lower()

    @pytest.mark.parametrize("config", [{"lora_alpha": "x"}, {"rank_pattern": [1]}, {"target_modules": 5}])
    def test_adapter_configs(self, run_cli, adapter, small_model, config: dict) -> None:
        path = adapter / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | config))
        refused(run_cli("generate", adapter, "--prompt", "x"), "adapter_config.json")

    @pytest.mark.parametrize("record", [{"base": "tiny"}, {"sha256": []}, {"stop_token_ids": ["a"]}, {"template": 3}])
    def test_records(self, run_cli, adapter, record: dict) -> None:
        path = adapter / "lorakit.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | record))
        refused(run_cli("generate", adapter, "--prompt", "x"), "lorakit.json")

    def test_settings_of_an_adapter_with_full_fine_tuning(self, train) -> None:
        refused(train(method="full", rank=8), "rank is for adapters")
        refused(train(method="full", precision="nonsense"), "'nonsense'")

    def test_no_metric(self, run_cli, small_model, jsonl) -> None:
        refused(run_cli("eval", small_model, "--data", jsonl(ROW), "--metrics", ","), "no metric")
