"""FSDP2 over the policy: what is gathered together, how gradients are summed and clipped, how weights are read whole.

Every block is a group of its own. A tied head shares its weight with the embedding, so both stay in the root's group:
wrapped apart, torch refuses them or, before 2.13, each would have updated half of the gradient. An untied embedding and
head are groups of their own. The head's weight is used by the fused op and never by `head.forward`, so the methods
that use it are registered with FSDP as forward methods (`policy.py`); read at any other time it is a DTensor, and the
op refuses that instead of failing inside a matrix product.

Gradients are summed over ranks, not averaged: the loss is already normalised by counts of the whole batch.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from entrocraft.train.config_parallel import ParallelConfig
from entrocraft.train.parallel import Ranks


class Gathered(NamedTuple):
    """How the weights of a sharded module are gathered: freed after its forward pass or kept, and in what dtype."""

    freed_after_forward: bool
    dtype: torch.dtype


def compute_dtype(config: ParallelConfig, *, device: torch.device, pretrained: bool) -> torch.dtype:
    """What the model computes in: `parallel.param_dtype`, with `auto` resolved."""
    if config.param_dtype == "auto":
        return torch.bfloat16 if device.type == "cuda" and pretrained else torch.float32
    return getattr(torch, config.param_dtype)


def needs_sharding(config: ParallelConfig, size: int, dtype: torch.dtype) -> bool:
    """Whether the model goes through FSDP2: several ranks, or something that only FSDP2 does here."""
    return size > 1 or dtype != torch.float32 or config.cpu_offload


def check_shard_ranks(shard_ranks: int | None, size: int) -> None:
    """Raises ValueError when so many ranks cannot be divided so."""
    if shard_ranks is not None and size % shard_ranks:
        raise ValueError(
            f"parallel.shard_ranks = {shard_ranks}: expected a divisor of the {size} processes, so that every copy of "
            "the model has as many"
        )


def build_mesh(device: torch.device, size: int, shard_ranks: int | None) -> DeviceMesh:
    """All ranks in one dimension, or ("copies", "shards") for HSDP."""
    shards = shard_ranks or size
    if shards == size:
        return init_device_mesh(device.type, (size,), mesh_dim_names=("shards",))
    return init_device_mesh(device.type, (size // shards, shards), mesh_dim_names=("copies", "shards"))


def is_tied(model: Any) -> bool:
    """Whether the LM head's weight is the embedding's."""
    return model.get_output_embeddings().weight is model.get_input_embeddings().weight


def blocks(model: Any) -> list[nn.Module]:
    """The decoder blocks: a list of `num_hidden_layers` modules in the backbone, else its longest list. ValueError when
    there is none."""
    lists = [module for module in model.base_model.modules() if isinstance(module, nn.ModuleList)]
    if not lists:
        raise ValueError(
            f"{type(model).__name__} has no list of decoder blocks in its backbone, so it cannot be sharded block by "
            "block; train it on one process with parallel.param_dtype = 'float32'"
        )
    layers = getattr(model.config.get_text_config(decoder=True), "num_hidden_layers", None)
    return list(max(lists, key=lambda found: (len(found) == layers, len(found))))  # experts may be more than layers


def shard_model(model: Any, config: ParallelConfig, mesh: DeviceMesh, dtype: torch.dtype) -> None:
    """Shards the model in place; its parameters become DTensors. They may lie on the meta device still.

    Raises ValueError for a vocabulary-sharded head where it cannot be.
    """
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    tied = is_tied(model)
    if config.vocab_parallel_head:
        _check_vocab_parallel(config, mesh, tied)
        weight = distribute_tensor(head.weight.detach(), mesh, [Shard(0)], src_data_rank=None)
        head.weight = nn.Parameter(weight, requires_grad=head.weight.requires_grad)
        head.vocabulary_group = mesh.get_group()
    ignored = {head.weight} if config.vocab_parallel_head else set()
    offload = CPUOffloadPolicy(pin_memory=mesh.device_type == "cuda") if config.cpu_offload else OffloadPolicy()
    options: dict[str, Any] = {"mesh": mesh, "offload_policy": offload, "ignored_params": ignored}
    low = None if dtype == torch.float32 else dtype
    own = MixedPrecisionPolicy(param_dtype=low, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for block in blocks(model):
        if config.compile is not None:
            block.compile(backend=config.compile)
        within = MixedPrecisionPolicy(param_dtype=low, reduce_dtype=torch.float32)
        _shard(block, within, config.reshard_after_forward, dtype, options)
    if not tied:
        _shard(embedding, own, config.reshard_after_forward, dtype, options)
        if not config.vocab_parallel_head:  # used last and first again: freed in between it would be gathered twice
            _shard(head, own, False, dtype, options)
    _shard(model, own, False, dtype, options)
    for module in sharded_modules(model):
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)  # else a factor asks for an operation that gloo does not have


def _shard(
    module: Any, precision: MixedPrecisionPolicy, freed: bool, dtype: torch.dtype, options: dict[str, Any]
) -> None:
    """`fully_shard`, and a note of what was asked for: torch has no public way to read it back."""
    fully_shard(module, mp_policy=precision, reshard_after_forward=freed, **options)
    module.gathered = Gathered(freed, dtype)


def _check_vocab_parallel(config: ParallelConfig, mesh: DeviceMesh, tied: bool) -> None:
    if tied:
        raise ValueError(
            "parallel.vocab_parallel_head: this model's head is tied to its embedding, which looks up whole rows for "
            "any token, so its weight is gathered anyway; leave the option off"
        )
    if mesh.ndim > 1 or config.cpu_offload:
        other = "parallel.shard_ranks" if mesh.ndim > 1 else "parallel.cpu_offload"
        raise ValueError(f"parallel.vocab_parallel_head does not go with {other}: leave one of them out")


def is_sharded(model: nn.Module) -> bool:
    """Whether FSDP manages the model."""
    return isinstance(model, FSDPModule)


def compute_dtype_of(model: nn.Module) -> torch.dtype:
    """What a model computes in: that of FSDP's policy, or of its parameters."""
    modules = sharded_modules(model)
    return modules[0].gathered.dtype if modules else next(model.parameters()).dtype


def sharded_modules(model: nn.Module) -> list[Any]:
    """The modules whose parameters FSDP gathers together, the root first; none when the model is not sharded."""
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def release_weights(model: Any) -> None:
    """Lets go of what a forward pass left gathered: without a backward pass after it, FSDP would keep the root's."""
    for module in sharded_modules(model):
        module.reshard()


@contextmanager
def whole_weights(model: Any) -> Iterator[None]:
    """Inside the block every rank has all weights, in the compute dtype, and forward passes talk to no other rank.

    For generating and for looking; no gradients. All ranks enter and leave together. Needs room for the whole model.
    """
    modules = sharded_modules(model)
    if not modules:
        yield
        return
    try:
        for module in modules:
            module.set_reshard_after_forward(False, recurse=False)
            module.unshard()
        with _whole_head(model):
            yield
    finally:
        for module in modules:
            module.set_reshard_after_forward(module.gathered.freed_after_forward, recurse=False)
            module.reshard()


@contextmanager
def _whole_head(model: Any) -> Iterator[None]:
    """Puts the gathered weight in the place of a head that is sharded by vocabulary."""
    head = model.get_output_embeddings()
    own = head.weight
    if not isinstance(own, DTensor):
        yield
        return
    dtype = model.get_input_embeddings().weight.dtype
    head.weight = nn.Parameter(own.full_tensor().to(dtype), requires_grad=False)
    try:
        yield
    finally:
        head.weight = own


def last_of_update(model: Any, last: bool) -> None:
    """Under HSDP, sum gradients over the copies of the model after the last micro-batch only."""
    for module in sharded_modules(model):
        module.set_requires_all_reduce(last)


def clip_gradients(model: nn.Module, limit: float, ranks: Ranks) -> float:
    """Scales all gradients so that their norm over all parameters of all ranks is at most `limit`; returns the norm.

    A norm that is not finite is returned and the gradients stay as they are.
    """
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    if ranks.size == 1 and not any(isinstance(gradient, DTensor) for gradient in gradients):
        return nn.utils.clip_grad_norm_(model.parameters(), limit).item()
    # Each number is held by as many ranks as its tensor has copies; a total over ranks must count it once.
    squares: list[Tensor] = []
    for gradient in gradients:
        local, copies = _local_and_copies(gradient, ranks.size)
        squares.append(torch.linalg.vector_norm(local.float()).double().square() / copies)
    norm = math.sqrt(ranks.totals({"square": float(torch.stack(squares).sum()) if squares else 0.0})["square"])
    if math.isfinite(norm) and norm > limit:
        for gradient in gradients:
            _local_and_copies(gradient, 1)[0].mul_(limit / (norm + 1e-6))
    return norm


def _local_and_copies(gradient: Tensor, ranks: int) -> tuple[Tensor, int]:
    """This rank's numbers of a gradient, and how many ranks hold the same ones."""
    if not isinstance(gradient, DTensor):
        return gradient, ranks
    copies = 1
    for dim, placement in enumerate(gradient.placements):
        copies *= gradient.device_mesh.size(dim) if isinstance(placement, Replicate) else 1
    return gradient.to_local(), copies


def full_tensor(tensor: Tensor) -> Tensor:
    """The whole of a parameter, gathered where it is sharded; all ranks must ask for it together."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
