"""A byte-level Qwen3 with random weights, built on the spot: the real architecture, small enough for two CPU cores."""

import math
from typing import Any

import torch
from transformers import ByT5Tokenizer, Qwen3Config, Qwen3ForCausalLM

from entrocraft.train.config import TinyModelConfig


def build_tiny_model(shape: TinyModelConfig, seed: int) -> tuple[Any, Any]:
    """Returns a randomly initialised Qwen3 over V = 259 symbols (256 bytes, padding, end, unknown) and its tokenizer.

    The weights are a function of `seed` alone; the global random state is left as it was.
    """
    tokenizer: Any = ByT5Tokenizer(extra_ids=0)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = Qwen3ForCausalLM(tiny_model_config(shape))
    return model, tokenizer


def tiny_model_config(shape: TinyModelConfig) -> Qwen3Config:
    """The architecture of that model."""
    tokenizer: Any = ByT5Tokenizer(extra_ids=0)
    return Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=shape.hidden_size,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.heads // 2,
        head_dim=shape.hidden_size // shape.heads,
        intermediate_size=shape.mlp_size,
        max_position_embeddings=shape.context,
        tie_word_embeddings=shape.tied,
        # 0.02, the default, is made for widths of thousands; at 1 / sqrt(4 H) a narrow model learns to add.
        initializer_range=0.5 / math.sqrt(shape.hidden_size),
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
