from __future__ import annotations

import pytest
import torch
from torch import nn

from lorakit.adapters.methods import LoRA
from lorakit.adapters.targets import resolve_targets
from lorakit.errors import LorakitError
from tests.models import make


def test_all_linear_leaves_the_unembedding_out() -> None:
    paths = resolve_targets(make("llama"), "all-linear")
    assert len(paths) == 2 * 7
    assert "lm_head" not in paths
    assert resolve_targets(make("gpt2"), "all-linear") == [
        f"transformer.h.{i}.{name}" for i in (0, 1) for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    ]


def test_all_linear_takes_everything_in_a_bare_module() -> None:
    assert resolve_targets(nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2)), "all-linear") == ["0", "2"]


@pytest.mark.parametrize(
    ("names", "count"),
    [
        ("q_proj", 2),
        (["q_proj", "v_proj"], 4),
        (["self_attn.q_proj"], 2),
        (["model.layers.1.self_attn.q_proj"], 1),
        (r".*\.[qk]_proj", 4),
        (r"re:model\.layers\.0\..*_proj", 7),
        (["q_proj", r".*\.1\.mlp\..*"], 2 + 3),
        (["lm_head", "embed_tokens"], 2),
    ],
)
def test_names_suffixes_and_patterns(names: str | list[str], count: int) -> None:
    assert len(resolve_targets(make("llama"), names)) == count


def test_exclusion_takes_whole_parts_out() -> None:
    model = make("llama")
    assert len(resolve_targets(model, "all-linear", ["mlp"])) == 8
    assert len(resolve_targets(model, "all-linear", ["model.layers.0"])) == 7
    with pytest.raises(LorakitError, match="nothing is left"):
        resolve_targets(model, "q_proj", ["self_attn"])


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["q_porj"], "'q_porj' matches no module.*q_proj"),
        (["q_proj", "v_prj"], "'v_prj' matches no module.*v_proj"),
        (["self_attn"], "LlamaAttention, which cannot carry.*q_proj"),
        ([r"(q_proj"], "not a valid regular expression"),
        ([], "empty"),
    ],
)
def test_mistakes_name_the_nearest(names: list[str], said: str) -> None:
    with pytest.raises(LorakitError, match=said):
        resolve_targets(make("llama"), names)


def test_a_pattern_that_matches_no_target_is_an_error() -> None:
    with pytest.raises(LorakitError, match=r"rank_pattern: 'q_prj' matches none.*q_proj"):
        LoRA(targets=["q_proj"], rank_pattern={"q_prj": 4}).plan(make("llama"))
    with pytest.raises(LorakitError, match=r"alpha_pattern: 'mlp' matches none"):
        LoRA(targets=["q_proj"], alpha_pattern={"mlp": 4}).plan(make("llama"))


def test_the_plan_is_made_without_weights_and_counts_exactly() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.device("meta"):
        model = LlamaForCausalLM(
            LlamaConfig(
                hidden_size=4096, intermediate_size=14336, num_hidden_layers=2, num_key_value_heads=8, vocab_size=1000
            )
        )
    plan = LoRA(rank=1).plan(model)
    # Llama-3.1-8B: 1,769,472 (MLP) + 851,968 (attention) per unit of rank over 32 layers
    assert plan.trainable_parameters == (1_769_472 + 851_968) // 32 * 2
    assert plan.trainable_parameters == sum(m.in_features + m.out_features for m in plan.modules)


@pytest.mark.parametrize("options", [{"rank": 0}, {"rank": 2.5}, {"alpha": -1}, {"dropout": 1.0}, {"rank": 1000}])
def test_impossible_settings_are_refused(options: dict) -> None:
    with pytest.raises(LorakitError):
        LoRA(**options).plan(make("llama"))
