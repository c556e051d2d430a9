"""Which attention and which layers a model runs with: flash-attention and Liger where they are installed and can run.

Both are measured against what they stand for before a run begins: `Policy.check` compares a packed sequence with one
alone on the attention in use, and Liger's layers are compared with transformers' own on one prompt.
"""

from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

import torch

from entrocraft.train.config import ModelConfig
from entrocraft.train.policy import Policy


def use_liger(policy: Policy, config: ModelConfig, prompt: Sequence[int]) -> bool:
    """Puts Liger's rotary embedding, norm and MLP in the place of the model's own, and says whether it did.

    With `auto` where it is installed, on CUDA, and knows the model. Raises ValueError where `on` cannot be, and where
    the model then says something else.
    """
    model_type = policy.model.config.model_type
    obstacle = _liger_obstacle(policy.device, model_type)
    if config.liger == "off" or (config.liger == "auto" and obstacle):
        return False
    if obstacle:
        raise ValueError(f"model.liger = 'on': {obstacle}; leave it out, or set it to 'auto'")
    from liger_kernel.transformers import (  # pyright: ignore[reportMissingImports]
        _apply_liger_kernel_to_instance,
    )

    before = policy.hidden_of(prompt)
    _apply_liger_kernel_to_instance(model=policy.model, cross_entropy=False, fused_linear_cross_entropy=False)
    after = policy.hidden_of(prompt)
    error = float((after - before).abs().max() / before.abs().max())
    if not error < (0.05 if policy.low_precision else 1e-3):
        raise ValueError(
            f"Liger's layers change the hidden states of this {model_type} model by {error:.2g} of their size; set "
            "model.liger = 'off'"
        )
    return True


def _liger_obstacle(device: torch.device, model_type: str) -> str | None:
    if find_spec("liger_kernel") is None:
        return "liger-kernel is not installed (pip install 'entrocraft[liger]')"
    if device.type != "cuda":
        return f"its layers need CUDA and the model is on {device.type}"
    from liger_kernel.transformers.monkey_patch import (  # pyright: ignore[reportMissingImports]
        MODEL_TYPE_TO_APPLY_LIGER_FN,
    )

    return None if model_type in MODEL_TYPE_TO_APPLY_LIGER_FN else f"it does not know models of type {model_type!r}"


def description(model: Any, dtype: torch.dtype, *, liger: bool) -> list[tuple[str, str]]:
    """Lines for the table that a run begins with."""
    kind = getattr(model.config, "_attn_implementation", None) or "its own"
    names = {"sdpa": "torch's SDPA", "eager": "eager (keeps all scores)"}
    layers = "Liger's norm, MLP and rotary embedding" if liger else "transformers' own"
    return [
        ("attention", f"{names.get(kind, kind)}, sequences packed"),
        ("layers", f"{layers}, in {str(dtype).removeprefix('torch.')}"),
    ]
