"""What a model looks like without its weights: from a folder, from the shapes written here, or from the hub.

The four families that the recipes train are written down, so that a run can be planned where the hub cannot be reached:
hidden size, layers and so on as in the `config.json` that their makers publish beside the weights, at the addresses
that are their names below. Base and instruction-tuned models of a family differ in their context alone.
"""

import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

from entrocraft.train.config import ModelConfig
from entrocraft.train.loading import told_as_users_mistake
from entrocraft.train.tiny_model import tiny_model_config

_QWEN3 = {
    "model_type": "qwen3", "vocab_size": 151_936, "head_dim": 128, "num_key_value_heads": 8,
    "max_position_embeddings": 32_768, "rope_theta": 1_000_000.0, "rms_norm_eps": 1e-6, "torch_dtype": "bfloat16",
}  # fmt: skip
_QWEN3_4B = _QWEN3 | {
    "hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36, "num_attention_heads": 32,
    "tie_word_embeddings": True,
}  # fmt: skip
_QWEN3_8B = _QWEN3 | {
    "hidden_size": 4096, "intermediate_size": 12_288, "num_hidden_layers": 36, "num_attention_heads": 32,
    "tie_word_embeddings": False,
}  # fmt: skip
_QWEN3_14B = _QWEN3 | {
    "hidden_size": 5120, "intermediate_size": 17_408, "num_hidden_layers": 40, "num_attention_heads": 40,
    "tie_word_embeddings": False,
}  # fmt: skip
_LLAMA31_8B = {
    "model_type": "llama", "vocab_size": 128_256, "hidden_size": 4096, "intermediate_size": 14_336,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
    "max_position_embeddings": 131_072, "rope_theta": 500_000.0, "rms_norm_eps": 1e-5, "torch_dtype": "bfloat16",
    "tie_word_embeddings": False,
}  # fmt: skip
# Source of each: https://huggingface.co/NAME/blob/main/config.json
SHAPES: dict[str, dict[str, Any]] = {
    "Qwen/Qwen3-4B": _QWEN3_4B | {"max_position_embeddings": 40_960},
    "Qwen/Qwen3-4B-Base": _QWEN3_4B,
    "Qwen/Qwen3-8B": _QWEN3_8B | {"max_position_embeddings": 40_960},
    "Qwen/Qwen3-8B-Base": _QWEN3_8B,
    "Qwen/Qwen3-14B": _QWEN3_14B | {"max_position_embeddings": 40_960},
    "Qwen/Qwen3-14B-Base": _QWEN3_14B,
    "meta-llama/Llama-3.1-8B": _LLAMA31_8B,
    "meta-llama/Llama-3.1-8B-Instruct": _LLAMA31_8B,
}


def model_shape(config: ModelConfig, shape: str | None = None) -> tuple[PretrainedConfig, str]:
    """The architecture that `model` names, and where it was found.

    shape: a `config.json`, its text, or one of the names in SHAPES, in the place of `model.path`. Raises ValueError for
    one that is none of these, and for a model that is neither here nor on the hub; FileNotFoundError for a folder that
    is not there.
    """
    if shape is not None:
        return _given(shape)
    if config.path is None:
        return tiny_model_config(config.tiny), "model.tiny"
    folder = Path(config.path).expanduser()
    if not folder.is_dir() and config.path in SHAPES:
        return _made(SHAPES[config.path]), f"the published shape of {config.path}"
    if config.path.startswith((".", "/", "~")) and not folder.is_dir():
        raise FileNotFoundError(f"model.path = {config.path!r}: no such folder")
    with told_as_users_mistake(config):
        found = AutoConfig.from_pretrained(
            str(folder) if folder.is_dir() else config.path, trust_remote_code=config.trust_remote_code
        )
    return found, config.path


def _given(shape: str) -> tuple[PretrainedConfig, str]:
    if shape in SHAPES:
        return _made(SHAPES[shape]), f"the published shape of {shape}"
    text, source = shape, "--plan-shape"
    if not shape.lstrip().startswith("{"):
        place = Path(shape).expanduser()
        place = place / "config.json" if place.is_dir() else place
        if not place.is_file():
            raise ValueError(
                f"--plan-shape {shape}: expected a config.json, its text, or one of {', '.join(sorted(SHAPES))}"
            )
        text, source = place.read_text(), str(place)
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"--plan-shape {shape:.60}: not valid JSON: {error}") from None
    if not isinstance(values, dict) or "model_type" not in values:
        raise ValueError(f"--plan-shape {shape:.60}: has no `model_type`, such as qwen3 or llama")
    return _made(values), source


def _made(values: dict[str, Any]) -> PretrainedConfig:
    rest = dict(values)
    return AutoConfig.for_model(rest.pop("model_type"), **rest)


def meta_model(shape: PretrainedConfig, *, trust_remote_code: bool = False) -> Any:
    """The model with float32 parameters that have no storage: names and shapes are real, values do not exist."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(shape, dtype=torch.float32, trust_remote_code=trust_remote_code)
