"""Small models of real architectures, made on the spot: no download, no trained weights."""

from __future__ import annotations

import torch
from transformers import (
    BertConfig,
    BertModel,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

VOCABULARY = 97
_WIDTHS = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip

_MAKERS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**_WIDTHS)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**_WIDTHS, sliding_window=4)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**_WIDTHS)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**_WIDTHS, head_dim=8)),
    "gemma2": lambda: Gemma2ForCausalLM(Gemma2Config(**_WIDTHS, head_dim=8, query_pre_attn_scalar=8, sliding_window=4)),
    "gemma3": lambda: Gemma3ForCausalLM(
        Gemma3TextConfig(**_WIDTHS, head_dim=8, query_pre_attn_scalar=8, sliding_window=4)
    ),
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=128, bos_token_id=1, eos_token_id=2)
    ),
    "bert": lambda: BertModel(
        BertConfig(
            vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            max_position_embeddings=128,
        )
    ),
}  # fmt: skip

TARGETS = {
    "gpt2": ["c_attn", "c_proj", "c_fc"],
    "bert": ["query", "value", "dense"],
}
EMBEDDING = {"gpt2": "wte", "bert": "word_embeddings"}


def make(family: str, seed: int = 0) -> torch.nn.Module:
    """A model with weights large enough that differences show."""
    torch.manual_seed(seed)
    model = _MAKERS[family]().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.normal_(0, 0.15)
    return model


def targets(family: str) -> list[str]:
    return TARGETS.get(family, ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"])


def embedding(family: str) -> str:
    return EMBEDDING.get(family, "embed_tokens")


def ids(rows: int = 2, length: int = 11, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCABULARY, (rows, length), generator=generator)


def output(model: torch.nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    result = model(input_ids=tokens)
    return result.logits if "logits" in result else result.last_hidden_state


def randomise(model: torch.nn.Module, seed: int = 3) -> None:
    """Give every trainable tensor values, so that an adapter does something."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
