"""A vocabulary that is sharded over ranks: one gather of sums a token forward, one sum of hidden gradients backward.

Each rank holds the rows [vocab_start, vocab_start + V) of the weight and the same hidden states. Its sums merge with
those of the others as tiles do on one device (`row_stats.py`), in the order of the ranks, so that every rank has the
same numbers to the last bit. What each then computes of its loss is the same too, and so are the upstream gradients;
the gradient of the shard needs no communication, and that of hidden is the sum of every rank's part.

Bytes: 32 a token, rank and direction (eight fp32 sums) against 2 T V for gathered logits.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from entrocraft.kernels.row_stats import ARGMAX, MAX, MAX_FLOOR, TARGET, merge_sums


class Shard(NamedTuple):
    """Which rows of the whole vocabulary are here."""

    group: dist.ProcessGroup | None = None
    vocab_start: int = 0
    """Token id of the first row."""
    columns: int | None = None
    """How many rows count; the others are padding. None: all."""


def shard_of(weight_VH, group, vocab_start: int | None, vocab_size: int | None) -> tuple[Tensor, Shard]:
    """The local weight and its place.

    Raises:
        ValueError: a DTensor without a group, or not sharded by rows over it; group without vocab_start or the reverse.
    """
    if hasattr(weight_VH, "to_local"):
        weight_VH, vocab_start = _local(weight_VH, group, vocab_start)
    elif (group is None) != (vocab_start is None):
        raise ValueError(
            f"group is {'not ' if group is not None else ''}None and vocab_start is {vocab_start}; expected both or "
            "neither: vocab_start is the token id of this rank's first row of weight_VH"
        )
    first, rows = vocab_start or 0, weight_VH.shape[0]
    if vocab_size is not None and (vocab_size <= 0 or (group is None and vocab_size > rows)):
        raise ValueError(
            f"vocab_size is {vocab_size}; expected a positive number of tokens, at most the {rows} rows of weight_VH"
        )
    columns = None if vocab_size is None else max(0, min(rows, vocab_size - first))
    return weight_VH, Shard(group, first, columns)


def _local(weight_VH, group, vocab_start: int | None) -> tuple[Tensor, int]:
    """The local rows of a DTensor and the id of the first."""
    from torch.distributed.tensor import Shard as ShardPlacement

    placements, mesh = tuple(weight_VH.placements), weight_VH.device_mesh
    if group is None:
        raise ValueError(
            f"weight_VH is a DTensor {placements}; expected a plain tensor, or group= to say that its shards are the "
            "vocabulary's and all ranks of the group hold the same hidden states. For data-parallel shards (FSDP) pass "
            "weight_VH.full_tensor()"
        )
    whole_mesh = mesh.ndim == 1 and dist.get_process_group_ranks(mesh.get_group()) == dist.get_process_group_ranks(
        group
    )
    if placements != (ShardPlacement(0),) or not whole_mesh or vocab_start is not None:
        raise ValueError(
            f"weight_VH is a DTensor {placements} on {mesh}, vocab_start {vocab_start}; expected (Shard(dim=0),) on a "
            "mesh of one dimension whose group is `group`, and no vocab_start, which follows from it"
        )
    rows = -(-weight_VH.shape[0] // mesh.size())  # every rank has as many but the last ones
    return weight_VH.to_local(), min(weight_VH.shape[0], rows * mesh.get_local_rank())


def absent_sums(like: Tensor) -> Tensor:
    """Sums [8, T] of a shard without a single column: merging leaves the others as they are."""
    sums_KT = torch.zeros_like(like)
    sums_KT[MAX], sums_KT[TARGET] = MAX_FLOOR, torch.nan
    return sums_KT


def merged_over(sums_KT: Tensor, shard: Shard) -> Tensor:
    """The sums of the whole vocabulary, the same on every rank."""
    if shard.group is None:
        return sums_KT
    sums_KT[ARGMAX] += shard.vocab_start
    parts = [torch.empty_like(sums_KT) for _ in range(shard.group.size())]
    dist.all_gather(parts, sums_KT.contiguous(), group=shard.group)
    merged_KT = parts[0]
    for part_KT in parts[1:]:
        merged_KT = merge_sums(merged_KT, part_KT)
    return merged_KT


def summed_over(grad_NH: Tensor, shard: Shard) -> Tensor:
    """The gradient of hidden from the parts of every rank, in place."""
    if shard.group is not None:
        dist.all_reduce(grad_NH, group=shard.group)
    return grad_NH


def agreed(rows: int, shard: Shard, device: torch.device) -> int:
    """The least of the ranks' numbers: shards of different sizes would cut the tokens differently, and wait forever."""
    if shard.group is None:
        return rows
    least = torch.tensor(rows, device=device)
    dist.all_reduce(least, op=dist.ReduceOp.MIN, group=shard.group)
    return int(least)
