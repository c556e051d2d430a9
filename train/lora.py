"""Low-rank adapters through peft, put into the model itself: no wrapper stands between it and FSDP or `generate`.

The head gets none, so it is frozen, and the fused op takes its two-product path.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from entrocraft.train.config_lora import LoraConfig
from entrocraft.train.parallel import stable_seed

_ADAPTER = "default"


def add_adapters(model: Any, config: LoraConfig) -> None:
    """Puts adapters into the model's layers, in place, and freezes everything else. The model may lie on meta.

    Raises ValueError where peft is missing, or a target names no layer or the head.
    """
    try:
        from peft import LoraConfig as PeftConfig
        from peft import inject_adapter_in_model
    except ImportError as error:
        raise ValueError(
            f"lora.rank = {config.rank}: adapters need peft ({error}); pip install 'entrocraft[lora]'"
        ) from None
    assert config.rank is not None, "no adapters were asked for"
    head = model.get_output_embeddings()
    targets = config.targets or sorted(
        {
            name.rpartition(".")[2]
            for name, module in model.base_model.named_modules()
            if isinstance(module, nn.Linear) and module is not head
        }
    )
    settings = PeftConfig(
        r=config.rank, lora_alpha=config.alpha, lora_dropout=config.dropout, target_modules=targets, bias="none"
    )
    inject_adapter_in_model(settings, model, adapter_name=_ADAPTER)
    if model.get_output_embeddings() is not head or hasattr(head, "lora_A"):
        raise ValueError(
            f"lora.targets = {config.targets!r}: expected layers other than the LM head, which the fused op reads as a "
            "plain weight"
        )


def is_adapter(name: str) -> bool:
    """Whether a parameter's name is that of an adapter."""
    return ".lora_A." in name or ".lora_B." in name


def has_adapters(model: nn.Module) -> bool:
    """Whether the model got any."""
    return any(is_adapter(name) for name, _ in model.named_parameters())


def plain_name(name: str) -> str:
    """The name that a parameter has in the model without adapters."""
    return name.replace(".base_layer.", ".")


def first_values(name: str, shape: torch.Size, seed: int) -> Tensor:
    """What an adapter begins with: B is 0, so that the model is unchanged; A is uniform in +-1/sqrt(inputs), drawn from
    (seed, name), the same however the model is sharded."""
    if ".lora_B." in name:
        return torch.zeros(shape)
    generator = torch.Generator().manual_seed(stable_seed(seed, name))
    bound = shape[1] ** -0.5
    return torch.rand(shape, generator=generator) * (2 * bound) - bound


@contextmanager
def without_adapters(model: nn.Module) -> Iterator[None]:
    """The model as it was before it got its adapters."""
    layers = _layers(model)
    for layer in layers.values():
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers.values():
            layer.enable_adapters(True)


def _layers(model: nn.Module) -> dict[str, Any]:
    if not has_adapters(model):
        return {}
    from peft.tuners.lora import LoraLayer

    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}


def update_of(model: nn.Module, gather: Any) -> dict[str, Any]:
    """For each adapted weight's own name, a function that gives what its adapter adds, [out, in]; `gather` makes a
    sharded parameter whole."""

    def product(layer: Any) -> Tensor:
        a, b = (gather(part[_ADAPTER].weight.detach()) for part in (layer.lora_A, layer.lora_B))
        return layer.scaling[_ADAPTER] * (b @ a)

    return {f"{name}.base_layer.weight": (lambda layer=layer: product(layer)) for name, layer in _layers(model).items()}
