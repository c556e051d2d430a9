"""Ranks: the processes of one run, and the few things they say to each other on the host.

Whatever decides a step (rollouts, rewards, statistics, decisions) is gathered, so that every rank holds the whole batch
and computes the same from it; only gradients and weights are sharded, which is FSDP's business (`sharding.py`).
Host messages go through gloo also where gradients go through nccl. They are pickled: all ranks are this run's own.
"""

import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

Value = TypeVar("Value")

_LONGEST_WRITE = timedelta(hours=2)  # ranks may wait so long for the slowest to write its part of a checkpoint


@dataclass(frozen=True, slots=True)
class Ranks:
    """This process among the `size` processes of the run. With one process every method is the identity."""

    rank: int = 0
    size: int = 1
    host_group: dist.ProcessGroup | None = None
    """gloo group of all ranks; None when there is one process."""

    @property
    def main(self) -> bool:
        """Whether this is the rank that writes logs, report and model."""
        return self.rank == 0

    def gather(self, value: Value) -> list[Value]:
        """Every rank's value, in rank order, on every rank."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.host_group)
        return values

    def from_main(self, value: Value) -> Value:
        """Rank 0's value, on every rank."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self.host_group)
        return box[0]

    def totals(self, values: Mapping[str, float]) -> dict[str, float]:
        """The sum over ranks of each number, added in rank order: the same bits on every rank."""
        if self.size == 1:
            return dict(values)
        parts = self.gather(dict(values))
        return {name: sum(part[name] for part in parts) for name in values}

    def largest(self, value: int) -> int:
        """The greatest of the ranks' numbers."""
        return max(self.gather(value))

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on some rank."""
        return any(self.gather(flag))

    def share(self, count: int) -> range:
        """Which of `count` things, in order, are this rank's; sizes differ by one at most."""
        least, more = divmod(count, self.size)
        first = self.rank * least + min(self.rank, more)
        return range(first, first + least + (self.rank < more))

    def another(self) -> "Ranks":
        """The same ranks with a host group of their own, for a thread whose messages must not mix with these. All call
        it together."""
        if self.host_group is None:
            return self
        group: Any = dist.new_group(backend="gloo", timeout=_LONGEST_WRITE)
        return Ranks(self.rank, self.size, group)

    def barrier(self) -> None:
        """Waits until all ranks are here."""
        if self.size > 1:
            dist.barrier(group=self.host_group)

    def agree(self, what: str, values: Iterable[Any]) -> None:
        """Makes sure that all ranks computed the same tensors, texts and numbers, bit for bit.

        Raises RuntimeError, on all ranks, naming those that differ: training on would tear the weights apart.
        """
        if self.size == 1:
            return
        digests = self.gather(_digest(values))
        if len(set(digests)) > 1:
            different = [rank for rank, digest in enumerate(digests) if digest != digests[0]]
            raise RuntimeError(
                f"the ranks do not agree on {what}: ranks {different} differ from rank 0. They must run the same code "
                "and libraries on the same kind of machine, with the same settings and data"
            )

    @staticmethod
    @contextmanager
    def joined(*, device: torch.device, timeout_s: float, needed: bool = False) -> Iterator["Ranks"]:
        """The ranks that torchrun started (it sets RANK, WORLD_SIZE, ...), or this process alone.

        device: where the model lives; CUDA gradients go through nccl, all else through gloo. needed: make a group also
        for one process. timeout_s: longest wait for the others.
        """
        size, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
        if size == 1 and not needed:
            yield Ranks()
            return
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        limit = timedelta(seconds=timeout_s)
        # Outside torchrun there is no other process to meet: a store in memory will do.
        store = None if {"RANK", "MASTER_ADDR"} <= os.environ.keys() else dist.HashStore()  # pyright: ignore[reportPrivateImportUsage]
        place = {} if store is None else {"store": store, "rank": rank, "world_size": size}
        dist.init_process_group(backend, timeout=limit, **place)
        host: Any = dist.new_group(backend="gloo", timeout=limit) if size > 1 else None
        try:
            yield Ranks(rank, size, host)
        except BaseException:
            # Others may be waiting for this rank, and nccl for them: leaving ends the process, and torchrun the others.
            if size == 1:
                dist.destroy_process_group()
            raise
        dist.destroy_process_group()


def local_device(device: torch.device) -> torch.device:
    """The GPU of this process, which is made the current one: that of its number, else of the LOCAL_RANK that torchrun
    sets. The CPU as it is.

    Raises ValueError for a number beside several processes, which would share that GPU.
    """
    if device.type != "cuda":
        return device
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if device.index is not None and processes > 1:
        raise ValueError(
            f"device = '{device}': {processes} processes cannot share one GPU; say 'cuda', and each takes its own "
            "(CUDA_VISIBLE_DEVICES chooses among them)"
        )
    own = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) if device.index is None else device.index)
    torch.cuda.set_device(own)
    return own


def stable_seed(seed: int, name: str) -> int:
    """A 63-bit seed from a number and a text, the same in every process."""
    return int.from_bytes(hashlib.sha256(f"{seed} {name}".encode()).digest()[:8], "big") >> 1


def balanced(cost_N: Sequence[int], bins: int) -> list[list[int]]:
    """Indices of N things in `bins` lists whose summed costs are nearly equal: the costliest first, each to the list
    with least. A function of the costs alone; lists are ascending."""
    lists: list[list[int]] = [[] for _ in range(bins)]
    total = [0] * bins
    for i in sorted(range(len(cost_N)), key=lambda i: (-cost_N[i], i)):
        least = min(range(bins), key=lambda b: (total[b], b))
        lists[least].append(i)
        total[least] += cost_N[i]
    return [sorted(chosen) for chosen in lists]


def _digest(values: Iterable[Any]) -> str:
    digest = hashlib.sha256()
    for value in values:
        if isinstance(value, torch.Tensor):
            digest.update(str(value.dtype).encode() + str(tuple(value.shape)).encode())
            digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        else:
            digest.update(repr(value).encode())
        digest.update(b"|")
    return digest.hexdigest()
