"""One pass over chunks of rows that computes a policy loss and, while their exponentials are hot, its gradients.

No autograd towards the operands here (`linear_policy_loss.py` has it), only through the closure, on [N] numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from entrocraft.kernels.arguments import no_autocast
from entrocraft.kernels.head import BUFFER_BYTES, Exponentials, Head, Sinks
from entrocraft.kernels.head_passes import (
    Upstream,
    add_gradients,
    backend_of,
    coefficients,
    local_head,
    rows_with_target,
    sums_of,
)
from entrocraft.kernels.row_stats import RowValues, active_rows, finish, neutral_sums
from entrocraft.kernels.vocab_parallel import Shard, agreed

Loss = Callable[[Tensor, Tensor, slice], Tensor]

# Rows of a chunk come in multiples of what the tiles of the products have.
CHUNK_ALIGN = 128


class Chunk(NamedTuple):
    """Consecutive rows that the closure sees at once."""

    rows: slice
    """Of all T rows."""
    live: slice
    """Of the rows that have a target, in order."""

    @property
    def N(self) -> int:
        """Rows that have a target."""
        return self.live.stop - self.live.start


class ChunkPlan(NamedTuple):
    """What a call does; its `str` says it in one line."""

    room: int
    """Rows whose exponentials fit."""
    chunks: int
    products: float
    """Matrix products of 2 T V H operations over the rows that have a target, all of them having a gradient."""

    def __str__(self) -> str:
        return f"loss in forward: {self.products:.3g} products, chunks {self.chunks}, room for {self.room} rows"


def chunk_room(head: Head, shard: Shard, buffer_bytes: int) -> tuple[Head, int]:
    """The head with its share of the budget for tiles, and how many rows fit into the rest.

    A row needs its exponentials, its hidden gradient in the compute dtype, and a copy of its hidden vector.
    """
    work_bytes = max(1, min(BUFFER_BYTES, buffer_bytes // 4))
    head = head._replace(options=head.options._replace(buffer_bytes=work_bytes))
    rows = max(1, head.T)
    if head.V:
        row_bytes = Exponentials.bytes_per_row(head, backend_of(head).tile_columns(head))
        row_bytes += head.H * (head.dtype.itemsize + head.hidden_TH.element_size())
        rows = max(1, (buffer_bytes - work_bytes) // row_bytes)
        rows = rows // CHUNK_ALIGN * CHUNK_ALIGN or rows
    # Ranks hold shards of different sizes, and must cut at the same rows.
    return head, agreed(rows, shard, head.hidden_TH.device)


def chunks_of(T: int, live_L: Tensor | None, lengths_R: Sequence[int] | None, room: int) -> list[Chunk]:
    """All T rows, cut where `room` rows with a target are full: between sequences, where there are lengths.

    A sequence with more of them than `room` is a chunk of its own. Waits for the device when `live_L`, the rows that
    have a target, is given.
    """
    if lengths_R is None:
        if live_L is None:
            ends = [(row, row) for row in range(room, T, room)]
        else:
            ends = list(zip(live_L[room::room].tolist(), range(room, len(live_L), room), strict=True))
        ends.append((T, T if live_L is None else len(live_L)))
    else:
        row_R = list(accumulate(lengths_R))
        if live_L is None:
            before_R = row_R
        else:
            before_R = torch.searchsorted(live_L, torch.tensor(row_R, device=live_L.device)).tolist()
        ends, first = [], (0, 0)
        last = first
        for end in zip(row_R, before_R, strict=True):
            if end[1] - first[1] > room and last[0] > first[0]:
                ends.append(last)
                first = last
            last = end
        ends.append(last)
    starts = [(0, 0), *ends[:-1]]
    return [Chunk(slice(a, b), slice(c, d)) for (a, c), (b, d) in zip(starts, ends, strict=True) if b > a]


def plan_of(chunks: list[Chunk], room: int, needs_hidden: bool, needs_weight: bool) -> ChunkPlan:
    """What these chunks cost."""
    live = sum(chunk.N for chunk in chunks)
    again = sum(max(0, chunk.N - room) for chunk in chunks)
    gradients = needs_hidden + needs_weight
    return ChunkPlan(room, len(chunks), 1 + gradients + (again / live if gradients and live else 0))


class PolicyPass:
    """The rows of one call, chunk by chunk. To learn which have a gradient, it waits for the device once a chunk."""

    def __init__(self, head: Head, shard: Shard, ignore_index: int | None, lengths_R, buffer_bytes: int) -> None:
        self.head, self.room = chunk_room(local_head(head, shard), shard, buffer_bytes)
        self.shard = shard
        self.live_L = rows_with_target(head.target_T, ignore_index)
        self.chunks = chunks_of(head.T, self.live_L, lengths_R, self.room)
        self.sums_KT = neutral_sums(head.T, like=head.hidden_TH, dtype=head.dtype)

    def run(self, loss: Loss, sinks: Sinks | None) -> tuple[Tensor, RowValues]:
        """The sum of the chunks' losses, and the values of all T rows; gradients go into `sinks`, where there are.

        `sinks.hidden_NH` has all T rows, of any dtype; the sinks are added to.
        """
        # Many small numbers: summed in fp64, the order of chunks does not show.
        total = torch.zeros((), dtype=torch.float64, device=self.head.hidden_TH.device)
        stored = self._room() if sinks is not None else None
        for chunk in self.chunks:
            self._statistics(chunk, stored)
            values = finish(self.sums_KT[:, chunk.rows])
            part, upstream = evaluate(loss, values, chunk.rows, gradients=sinks is not None)
            total += part
            if sinks is not None and any(grad is not None for grad in upstream):
                self._gradients(chunk, upstream, values, sinks, stored)
        return total.to(self.head.dtype), finish(self.sums_KT)

    def _room(self) -> Exponentials | None:
        rows = min(self.room, max((chunk.N for chunk in self.chunks), default=0))
        if not rows or not self.head.V:
            return None
        return Exponentials.empty(self.head, rows, backend_of(self.head).tile_columns(self.head))

    def _blocks(self, chunk: Chunk) -> Iterator[slice | Tensor]:
        """The chunk's rows that have a target, `room` at a time; more than one block only of a long sequence."""
        for start in range(chunk.live.start, chunk.live.stop, self.room):
            block = slice(start, min(start + self.room, chunk.live.stop))
            yield block if self.live_L is None else self.live_L[block]

    def _statistics(self, chunk: Chunk, stored: Exponentials | None) -> None:
        """Fill the sums of the chunk's rows; the first block leaves its exponentials."""
        for i, rows in enumerate(self._blocks(chunk)):
            head = self.head.rows(rows)
            with no_autocast(head.hidden_TH.device):
                sums_KN = sums_of(head, self.shard, _leading(stored, head.T) if i == 0 and stored is not None else None)
            if isinstance(rows, Tensor):
                self.sums_KT.index_copy_(1, rows, sums_KN)
            else:
                self.sums_KT[:, rows] = sums_KN

    def _gradients(
        self, chunk: Chunk, upstream: Upstream, values: RowValues, sinks: Sinks, stored: Exponentials | None
    ) -> None:
        """Gradients of the chunk's rows that have one: dX is final, dW and dbias are added to."""
        for i, block in enumerate(self._blocks(chunk)):
            index = active_rows(None, *(_part(grad, block, chunk) for grad in upstream))
            rows = block
            if index is not None:
                if len(index) == 0:
                    continue
                rows = block[index] if isinstance(block, Tensor) else index + block.start
            head = self.head.rows(rows)
            exponentials = None
            if i == 0 and stored is not None:
                exponentials = _leading(stored, min(chunk.N, self.room)).pick(index)
            part_NH = None
            if sinks.hidden_NH is not None:
                part_NH = self.sums_KT.new_zeros((head.T, head.H))
            of_rows = coefficients(
                head,
                Upstream(*(_part(grad, rows, chunk) for grad in upstream)),
                RowValues(*(field[_inside(rows, chunk)] for field in values)),
            )
            with no_autocast(head.hidden_TH.device):
                add_gradients(head, of_rows, sinks._replace(hidden_NH=part_NH), self.shard, exponentials)
            if sinks.hidden_NH is not None and part_NH is not None:
                _add_rows(sinks.hidden_NH, rows, part_NH)


def evaluate(loss: Loss, values: RowValues, rows: slice, *, gradients: bool) -> tuple[Tensor, Upstream]:
    """The closure's number for these rows, and its gradients; None where there is none.

    Raises:
        ValueError: it returned no scalar tensor.
    """
    leaves = [field.detach().requires_grad_(gradients) for field in (values.logprob_T, values.entropy_T)]
    with torch.set_grad_enabled(gradients):
        part = loss(leaves[0], leaves[1], rows)
    if not isinstance(part, Tensor) or part.dim() != 0 or not part.is_floating_point():
        got = f"{part.dtype} {tuple(part.shape)}" if isinstance(part, Tensor) else repr(part)
        raise ValueError(
            f"loss returned {got} for rows {rows.start} to {rows.stop}; expected one floating point number as a tensor "
            "of no dimension, such as (weight_T[rows] * loss_N).sum()"
        )
    if not part.requires_grad:
        return part, Upstream(None, None, None)
    logprob_N, entropy_N = torch.autograd.grad(part, leaves, allow_unused=True)
    return part.detach(), Upstream(logprob_N, entropy_N, None)


def _leading(stored: Exponentials, rows: int) -> Exponentials:
    """Room for no more rows than there are."""
    return stored._replace(value_NV=stored.value_NV[:rows], shift_NS=stored.shift_NS[:rows])


def _inside(rows: slice | Tensor, chunk: Chunk) -> slice | Tensor:
    """Rows counted from the chunk's first."""
    first = chunk.rows.start
    return slice(rows.start - first, rows.stop - first) if isinstance(rows, slice) else rows - first


def _part(grad_N: Tensor | None, rows: slice | Tensor, chunk: Chunk) -> Tensor | None:
    """What belongs to `rows`, of what belongs to a chunk."""
    return None if grad_N is None else grad_N[_inside(rows, chunk)]


def _add_rows(total_TH: Tensor, rows: slice | Tensor, part_NH: Tensor) -> None:
    if isinstance(rows, Tensor):
        total_TH.index_add_(0, rows, part_NH.to(total_TH.dtype))
    else:
        total_TH[rows] += part_NH
