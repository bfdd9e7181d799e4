from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

import lorakit
from lorakit.errors import LorakitError
from lorakit.recipes.defaults import RunFacts, capacity_sentence, choose_defaults
from lorakit.recipes.load import dump_recipe, load_recipe, parse_overrides
from lorakit.recipes.schema import ALIASES, Recipe, apply_aliases, build_recipe, json_schema
from tests.conftest import ROOT

BARE = {"model": "tiny", "data": "d.jsonl"}


def test_every_key_is_used_somewhere() -> None:
    """A setting that is accepted and does nothing is the silent failure we left behind."""
    package = Path(lorakit.__file__).parent
    source = "".join(p.read_text() for p in package.rglob("*.py") if p.name != "schema.py")
    assert [key for key in Recipe.model_fields if f"recipe.{key}" not in source] == []


def test_every_alias_leads_to_a_key() -> None:
    assert set(ALIASES.values()) <= set(Recipe.model_fields)
    assert not set(ALIASES) & set(Recipe.model_fields)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"learning_rte": 1}, "unknown key 'learning_rte'.*learning_rate"),
        ({"ranks": 8}, "unknown key 'ranks'. Did you mean 'rank'"),
        ({"rank": "eight"}, "rank: .*'eight'"),
        ({"rank": 0}, "rank: "),
        ({"schedule": "cosin"}, "schedule: .*'cosin'"),
        ({"columns": "prompt"}, "part=column"),
        ({"lora_r": 8, "rank": 4}, "both set rank"),
        ({"warmup_steps": 5}, "warmup_ratio"),
    ],
)
def test_wrong_settings(settings: dict, said: str) -> None:
    with pytest.raises(LorakitError, match=said):
        build_recipe(apply_aliases({**BARE, **settings})[0])


def test_a_missing_key_says_how_to_give_it() -> None:
    with pytest.raises(LorakitError, match=r"data is missing; give --data"):
        build_recipe({"model": "tiny"})


def test_familiar_spellings_are_echoed() -> None:
    settings, said = apply_aliases(
        {"base_model": "tiny", "dataset": "d.jsonl", "lora_r": 8, "lora_target_modules": "q_proj,v_proj",
         "learning_rate": 1e-4, "sequence_len": 128, "sample_packing": True, "train_on_inputs": True, "bf16": True,
         "use_rslora": True, "num_train_epochs": 2, "lr_scheduler_type": "cosine"}
    )  # fmt: skip
    recipe = build_recipe(settings)
    assert (recipe.rank, recipe.targets, recipe.lr, recipe.max_length) == (8, ["q_proj", "v_proj"], 1e-4, 128)
    assert (recipe.loss, recipe.precision, recipe.method, recipe.epochs) == ("all", "bf16", "rslora", 2)
    assert len(said) == 12
    assert "lora_r → rank" in said


def test_file_then_overrides(tmp_path) -> None:
    (tmp_path / "r.yaml").write_text("model: tiny\ndata: d.jsonl\nlr: 3e-4\nrank: 8\ntargets: [q_proj]\n")
    recipe, _ = load_recipe(tmp_path / "r.yaml", parse_overrides(["lr=1e-3", "columns=prompt=a,completion=b"]))
    assert (recipe.lr, recipe.rank, recipe.columns) == (1e-3, 8, {"prompt": "a", "completion": "b"})
    again = build_recipe(yaml.safe_load(dump_recipe(recipe)))
    assert again == recipe


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "is empty"),
        ("- a\n", "should hold"),
        ("a: 1\na: 2\n", "line 2: the key 'a' stands twice"),
        ("a: [1\n", "line 2"),
        ("model: tiny\ndata: x\nlrr: 1\n", "unknown key 'lrr'. Did you mean 'lr'"),
    ],
)
def test_broken_recipe_files(tmp_path, content: str, said: str) -> None:
    (tmp_path / "r.yaml").write_text(content)
    with pytest.raises(LorakitError, match=said):
        load_recipe(tmp_path / "r.yaml", {})


def test_the_published_schema_is_current() -> None:
    assert json.loads((ROOT / "docs/recipe.schema.json").read_text()) == json_schema()


def test_the_schema_accepts_our_recipes_and_refuses_unknown_keys() -> None:
    import jsonschema

    for path in (ROOT / "examples").rglob("*.yaml"):
        jsonschema.validate(yaml.safe_load(path.read_text()), json_schema())
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**BARE, "lrr": 1}, json_schema())


def facts(**changes) -> RunFacts:
    base = {
        "rows": 12_000, "loss_tokens": 450_000, "hidden_size": 256, "family": "llama", "parameters_per_rank": 74_752,
        "narrowest": 128, "bits_per_token": 4.0, "held_out_rows": 100,
    }  # fmt: skip
    return RunFacts(**{**base, **changes})


def test_defaults_follow_the_rules_and_give_reasons() -> None:
    recipe, chosen = choose_defaults(Recipe(**BARE), facts())
    assert recipe.rank == 32  # 1.8 Mbit / 74,752 a rank = 24, the next power of two
    assert recipe.batch_size == 16  # 12,000 rows / 1000 = 12
    assert (recipe.epochs, recipe.steps) == (3, 2250)
    assert recipe.lr == pytest.approx(1e-3)
    assert recipe.patience == 3
    assert recipe.eval_steps == 225
    assert all(default.reason for default in chosen)
    assert {d.key for d in chosen} == {
        "rank",
        "batch_size",
        "epochs",
        "steps",
        "patience",
        "lr",
        "eval_steps",
        "save_steps",
    }


def test_what_is_given_is_kept() -> None:
    given = Recipe(**BARE, rank=3, batch_size=5, epochs=1, lr=7e-4, eval_steps=9, save_steps=11, patience=2)
    recipe, chosen = choose_defaults(given, facts())
    assert (recipe.rank, recipe.batch_size, recipe.lr, recipe.eval_steps, recipe.save_steps) == (3, 5, 7e-4, 9, 11)
    assert [d.key for d in chosen] == ["steps"]


@pytest.mark.parametrize(
    ("changes", "key", "value"),
    [
        ({"loss_tokens": 10_000_000, "narrowest": 4096}, "rank", 256),
        ({"loss_tokens": 100}, "rank", 16),
        ({"loss_tokens": 100, "narrowest": 8}, "rank", 4),
        ({"rows": 500_000}, "batch_size", 128),
        ({"rows": 500_000}, "epochs", 1.0),
        ({"rows": 300}, "batch_size", 8),
        ({"hidden_size": 8192, "family": "bloom", "rows": 500_000}, "lr", 2.47e-4),
        ({"hidden_size": 4096, "family": "llama", "rows": 500_000}, "lr", 2.86e-4),
        ({"rows": 200, "hidden_size": 2000}, "lr", 7.5e-4),
    ],
)
def test_defaults_at_the_edges(changes: dict, key: str, value: float) -> None:
    recipe, _ = choose_defaults(Recipe(**BARE), facts(**changes))
    assert getattr(recipe, key) == pytest.approx(value, rel=0.01)


def test_full_fine_tuning_gets_a_tenth_of_the_rate() -> None:
    lora, _ = choose_defaults(Recipe(**BARE), facts())
    full, chosen = choose_defaults(Recipe(**BARE, method="full"), facts())
    assert full.lr == pytest.approx(lora.lr / 10)
    assert full.rank is None
    assert "rank" not in {d.key for d in chosen}


def test_the_capacity_sentence_warns() -> None:
    assert "ample" in capacity_sentence(facts(), 64)
    assert "tight" in capacity_sentence(facts(), 16)
    text = capacity_sentence(facts(), 4)
    assert "past capacity" in text
    assert "rank 16" in text
