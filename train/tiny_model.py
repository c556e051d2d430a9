"""A byte-level Qwen3 with random weights, built on the spot: the real architecture, small enough for two CPU cores."""

import copy
import functools
import math
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from entrocraft.train.config_model import TinyModelConfig


def build_tiny_model(shape: TinyModelConfig, seed: int) -> tuple[Any, Any]:
    """Returns a randomly initialised Qwen3 over V symbols, by default 259 (256 bytes, padding, end, unknown), and its
    tokenizer.

    The weights are a function of `seed` alone; the global random state is left as it was.
    """
    tokenizer = tiny_tokenizer(shape)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = Qwen3ForCausalLM(tiny_model_config(shape))
    return model, tokenizer


@functools.lru_cache(maxsize=1)  # a large vocabulary takes half a second
def _wide(vocabulary: int) -> Any:
    """Printable characters, then words that stand in no text: what a large head costs, and nothing more."""
    marks = ["<pad>", "</s>", "<unk>"]
    characters = ["\n", *map(chr, range(32, 127))]
    words = [*marks, *characters, *(f"<unused{i}>" for i in range(vocabulary - len(marks) - len(characters)))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("[\\s\\S]"), "isolated")  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.decoder = decoders.Fuse()  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])  # pyright: ignore[reportAttributeAccessIssue]
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")


def tiny_tokenizer(shape: TinyModelConfig) -> Any:
    """Bytes, or for a given size of the vocabulary characters; either ends a text with its end mark."""
    return ByT5Tokenizer(extra_ids=0) if shape.vocabulary is None else copy.deepcopy(_wide(shape.vocabulary))


def tiny_model_config(shape: TinyModelConfig) -> Qwen3Config:
    """The architecture of that model."""
    tokenizer = tiny_tokenizer(shape)
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
