"""Weights on their way from the trainer to a sampler: what was sent, under which version, and proof that it arrived.

Two checksums, both of 64 bits, added up over elements with a mixing step in between, so that two errors do not cancel:

    received    of each tensor as it was sent; depends on the place of every element
    held        of each block of the model (a layer, the embedding, the head) as the sampler uses it; does not depend on
                the order of elements, and padding with zeros adds nothing, so it survives what a sampler does to a
                layout: fused query-key-value matrices, transposed or padded ones
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from entrocraft import Rollouts
from entrocraft.train.errors import TrainingStopped

NamedWeights = Iterator[tuple[str, Tensor]]
WeightSource = Callable[[], NamedWeights]
"""Yields (name in a Hugging Face checkpoint, full tensor), each weight once. On a sharded policy gathering is a
collective: all ranks iterate, and in step."""

_BYTES = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_CHUNK = 1 << 22
# Odd constants of 64 bits as signed integers: splitmix64's, Steele et al. 2014.
_MIX_1, _MIX_2, _GOLDEN = -0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15, -0x61C8864680B583EB


class PublicationError(TrainingStopped):
    """The sampler does not have the trainer's weights."""


def _mix(bits: Tensor) -> Tensor:
    """A permutation of 64-bit integers that leaves 0 alone and spreads a changed bit over all."""
    # The masks make logical shifts of torch's arithmetic ones, which would drop the sign.
    bits = (bits ^ (bits >> 30 & (1 << 34) - 1)) * _MIX_1
    bits = (bits ^ (bits >> 27 & (1 << 37) - 1)) * _MIX_2
    return bits ^ (bits >> 31 & (1 << 33) - 1)


@torch.no_grad()
def checksum(value: Tensor, *, ordered: bool) -> int:
    """64 bits of what a tensor holds, bit for bit: shape and device do not matter, its type does.

    ordered: whether exchanging two elements changes it. If not, zeros add nothing.
    """
    flat = value.detach().contiguous().view(-1).view(_BYTES[value.element_size()])
    total = 0
    for start in range(0, len(flat), _CHUNK):
        bits = _mix(flat[start : start + _CHUNK].to(torch.int64))
        if ordered:
            place = torch.arange(start, start + len(bits), device=bits.device)
            bits = _mix(bits ^ (place * _GOLDEN))
        total += int(bits.sum())
    return total % (1 << 64)


def block_of(name: str) -> str:
    """Which part of a model a weight belongs to, whatever stands before: `layers.3`, `embed_tokens`, `lm_head`."""
    words = name.split(".")
    for i, word in enumerate(words[1:], 1):
        if word.isdigit():
            return f"{words[i - 1]}.{word}"
    return words[-2] if len(words) > 1 else name


@dataclass
class Ledger:
    """What was sent in one publication, as it is sent."""

    version: int
    received: dict[str, str] = field(default_factory=dict)
    held: dict[str, int] = field(default_factory=dict)
    bytes: int = 0

    def passing(self, weights: Iterable[tuple[str, Tensor]], dtype: torch.dtype | None) -> NamedWeights:
        """The same weights, floating-point ones as `dtype`, each written down before it is passed on."""
        for name, value in weights:
            value = value.to(dtype) if dtype is not None and value.is_floating_point() else value
            self.received[name] = hexadecimal(checksum(value, ordered=True))
            block = block_of(name)
            self.held[block] = (self.held.get(block, 0) + checksum(value, ordered=False)) % (1 << 64)
            self.bytes += value.numel() * value.element_size()
            yield name, value

    def compare(self, attested: Mapping[str, Any], who: str, *, check: str) -> None:
        """Compares with what a sampler's worker says it has (`attest` of `vllm_worker`).

        check: `held` or `received`. Raises PublicationError with what differs.
        """
        if attested.get("error"):
            raise self._refused(who, str(attested["error"]))
        got = dict(attested["received"])
        lost, changed = set(self.received) - set(got), [n for n in got if got[n] != self.received.get(n)]
        if lost or changed:
            raise self._refused(
                who,
                f"of {len(self.received)} weights {len(lost)} did not arrive and {len(changed)} arrived as others"
                + _few(lost or changed),
            )
        if check == "received" or attested.get("shards", 1) > 1:  # a shard's sum is of a part of each block
            return
        held = {block: int(value, 16) for block, value in attested["held"].items() if value is not None}
        strange = set(held) - set(self.held)
        wrong = [block for block, value in held.items() if self.held.get(block, value) != value]
        if strange or wrong:
            raise self._refused(
                who,
                f"all weights arrived, but after loading {len(wrong) + len(strange)} of {len(held)} blocks of the "
                f"model hold other values{_few(strange or wrong)}. If this format changes values when it is loaded "
                "(quantisation), set engine.check = received",
            )

    def _refused(self, who: str, reason: str) -> PublicationError:
        return PublicationError(f"publication of weight version {self.version} to {who} failed: {reason}")


def hexadecimal(value: int) -> str:
    """How a checksum travels: 64-bit integers do not survive every JSON reader."""
    return f"{value:016x}"


def _few(names: Iterable[str]) -> str:
    shown = sorted(names)
    return f": {', '.join(shown[:3])}{', ...' if len(shown) > 3 else ''}"


def one_version(labels: Iterable[str], who: str) -> int:
    """The version that all rollouts say they were drawn from.

    Raises PublicationError when they differ, or when it is none that a trainer published.
    """
    found = sorted(set(labels))
    if len(found) != 1 or not found[0].isdigit():
        raise PublicationError(
            f"{who} drew one batch of rollouts from the weight versions {', '.join(map(repr, found))}: expected one "
            "that this trainer published. Does somebody else publish to it?"
        )
    return int(found[0])


def check_version(rollouts: Rollouts, present: int, *, allowed: int) -> int:
    """How many versions older than the policy (version `present`) the rollouts' weights are.

    Raises PublicationError when they are older than `allowed`, or newer: a publication was skipped or lost.
    """
    age = present - rollouts.weight_version
    if not 0 <= age <= allowed:
        raise PublicationError(
            f"rollouts were drawn from weight version {rollouts.weight_version} while the policy is at version "
            f"{present}: expected {f'at most {allowed} older' if allowed else 'the same'}. A publication was skipped "
            "or lost"
        )
    return age
