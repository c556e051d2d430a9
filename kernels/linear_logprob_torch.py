"""The torch path of `linear_logprob.py`: tiles of the logits, one after the other, in bounded memory.

Order of the loops: vocabulary splits outside, blocks of tokens inside. So a slice of the weight is converted to the
compute dtype once, its gradient is finished before the next slice begins, and only the hidden gradient is carried.
The operands are converted to fp32 (or fp64) slice by slice: products of bf16 or fp16 numbers are exact there, and the
sums are never rounded back.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import pad

from entrocraft.kernels.head import Exponentials, Head, Sinks
from entrocraft.kernels.logits_logprob import scaled_logits
from entrocraft.kernels.row_stats import (
    ARGMAX,
    RowCoefficients,
    merge_sums,
    neutral_sums,
    stored_gradient,
    tile_gradient,
    tile_sums,
)

# Elements of a tile: 16 MiB in fp32. From 1 to 16 MiB one core is equally fast, and every operation on a tile is a
# meeting of all threads: fewer and larger ones suffer less when a core is shared.
TILE_ELEMENTS = 4 << 20
# Rows of a tile when the vocabulary does not fit beside them: with as many columns, a product as square as it gets.
TILE_ROWS = 1024
# Rows of every product when a row's bits may not depend on how many rows there are.
INVARIANT_ROWS = 64


def tile_shape(T: int, V: int, H: int, *, element_bytes: int, buffer_bytes: int) -> tuple[int, int]:
    """Rows and columns of a tile, from sizes alone.

    Live at once: three buffers of a tile (logits, exponentials, derivative of the softcap), a slice of the weight and
    of its gradient, a block of hidden rows and of their gradient.
    """
    elements = max(1, buffer_bytes // element_bytes)
    rows = max(1, min(T, TILE_ROWS, elements // (4 * H + 4)))
    columns = max(1, min(V, TILE_ELEMENTS // rows, (elements - 2 * rows * H) // (3 * rows + 2 * H)))
    if columns == V:
        rows = max(1, min(T, TILE_ELEMENTS // V, (elements - 2 * V * H) // (3 * V + 2 * H)))
    return rows, columns


def _shape_of(head: Head, T: int) -> tuple[int, int]:
    rows = INVARIANT_ROWS if head.options.batch_invariant else T
    bounds = {"element_bytes": head.dtype.itemsize, "buffer_bytes": head.options.buffer_bytes}
    return tile_shape(rows, head.V, head.H, **bounds)


def tile_columns(head: Head) -> int:
    """Columns of a tile of stored exponentials, which must not depend on the rows at hand."""
    return _shape_of(head, TILE_ROWS)[1]


class _Tiles:
    """Walks over the tiles of z and computes each into one reused buffer."""

    def __init__(self, head: Head, exponentials: Exponentials | None) -> None:
        self.head, self.exponentials, self.dtype = head, exponentials, head.dtype
        self.rows, self.columns = _shape_of(head, head.T if exponentials is None else TILE_ROWS)
        self.stored = 0 if exponentials is None else exponentials.rows
        self.logit = head.hidden_TH.new_empty(self.rows * self.columns, dtype=self.dtype)
        self.scratch = torch.empty_like(self.logit)

    def vocabulary(self) -> Iterator[tuple[slice, Tensor]]:
        """Slices of the vocabulary, each with its weight in the compute dtype."""
        for start in range(0, self.head.V, self.columns):
            v = slice(start, min(start + self.columns, self.head.V))
            yield v, self.head.weight_VH[v].to(self.dtype)

    def tokens(self) -> Iterator[tuple[slice, Tensor]]:
        """Blocks of the tokens, each with its hidden rows in the compute dtype; stored rows and others never mix."""
        for first, last in ((0, self.stored), (self.stored, self.head.T)):
            for start in range(first, last, self.rows):
                t = slice(start, min(start + self.rows, last))
                yield t, self.head.hidden_TH[t].to(self.dtype)

    def product(self, out: Tensor, left: Tensor, right: Tensor, *, add: bool = False) -> Tensor:
        """out (+)= left @ right; batch_invariant: with as many rows as a whole block has, zeros below."""
        missing = self.rows - left.shape[0] if self.head.options.batch_invariant else 0
        if missing == 0:
            return out.addmm_(left, right) if add else torch.mm(left, right, out=out)
        whole = torch.mm(pad(left, (0, 0, 0, missing)), right)[: left.shape[0]]
        return out.add_(whole) if add else out.copy_(whole)

    def room(self, t: slice, v: slice) -> tuple[Tensor, Tensor]:
        """Two buffers of a tile."""
        shape = (t.stop - t.start, v.stop - v.start)
        size = shape[0] * shape[1]
        return self.logit[:size].view(shape), self.scratch[:size].view(shape)

    def logits(self, t: slice, v: slice, x_NH: Tensor, w_MH: Tensor, *, slope: bool = False):
        """z of a tile, a scratch tile, and the derivative of the softcap when it is asked for and there is one."""
        z_NM, scratch_NM = self.room(t, v)
        self.product(z_NM, x_NH, w_MH.T)
        if self.head.bias_V is not None:
            z_NM += self.head.bias_V[v].to(self.dtype)
        inv = self.head.inv_temperature
        inv = inv[t] if isinstance(inv, Tensor) else inv
        return z_NM, scratch_NM, scaled_logits(z_NM, inv, self.head.options.softcap, slope=slope)

    def store(self, t: slice, v: slice, e_NM: Tensor, shift_N: Tensor) -> None:
        """Keep the exponentials of a tile whose rows are to be stored."""
        if self.exponentials is not None and t.start < self.stored:
            self.exponentials.value_NV[t, v] = e_NM
            self.exponentials.shift_NS[t, v.start // self.columns] = shift_N

    def gradient(self, t: slice, v: slice, x_NH: Tensor, w_MH: Tensor, rows: RowCoefficients) -> Tensor:
        """dz of a tile, before softcap and temperature."""
        target_N = self.head.target_T[t] - v.start
        if self.exponentials is None or t.start >= self.stored:
            z_NM, scratch_NM, slope_NM = self.logits(t, v, x_NH, w_MH, slope=True)
            dz_NM = tile_gradient(z_NM, scratch_NM, target_N, rows)
            return dz_NM if slope_NM is None else dz_NM.mul_(slope_NM)
        e_NM, scratch_NM = self.room(t, v)
        index = t if self.exponentials.row_N is None else self.exponentials.row_N[t]
        e_NM.copy_(self.exponentials.value_NV[index, v])
        shift_N = self.exponentials.shift_NS[index, v.start // self.columns]
        dz_NM, u_NM = stored_gradient(e_NM, scratch_NM, shift_N, target_N, rows)
        softcap, inv = self.head.options.softcap, self.head.inv_temperature
        if softcap is None:
            return dz_NM
        size_N = softcap * (inv[t] if isinstance(inv, Tensor) else torch.full_like(shift_N, inv))
        tanh_NM = u_NM.add_(rows.shift_T[:, None]).div_(size_N[:, None]).clamp_(-1.0, 1.0)
        return dz_NM.mul_(tanh_NM.square_().neg_().add_(1.0))


def statistics(head: Head, exponentials: Exponentials | None = None) -> Tensor:
    """Sums [8, T] of every row, see `row_stats.py`; fills `exponentials`, where given, for the rows it covers."""
    tiles = _Tiles(head, exponentials)
    sums_KT = neutral_sums(head.T, like=head.hidden_TH, dtype=head.dtype)
    asked = {name: getattr(head.options, name) for name in ("collision", "varentropy", "argmax")}
    for v, w_MH in tiles.vocabulary():
        for t, x_NH in tiles.tokens():
            z_NM, scratch_NM, _ = tiles.logits(t, v, x_NH, w_MH)
            part_KN = tile_sums(z_NM, scratch_NM, head.target_T[t] - v.start, **asked)
            tiles.store(t, v, scratch_NM, part_KN[0])
            part_KN[ARGMAX] += v.start
            sums_KT[:, t] = part_KN if v.start == 0 else merge_sums(sums_KT[:, t], part_KN)
    return sums_KT


def gradients(head: Head, rows: RowCoefficients, sinks: Sinks, exponentials: Exponentials | None = None) -> None:
    """Put the gradients of hidden, weight and bias into `sinks`; stored exponentials stay as they are."""
    tiles = _Tiles(head, exponentials)
    for v, w_MH in tiles.vocabulary():
        grad_w_MH = None if sinks.weight_VH is None else _accumulator(sinks.weight_VH[v], sinks, tiles.dtype)
        grad_b_M = None if sinks.bias_V is None else _accumulator(sinks.bias_V[v], sinks, tiles.dtype)
        for t, x_NH in tiles.tokens():
            dz_NM = tiles.gradient(t, v, x_NH, w_MH, rows.pick(t))
            if sinks.hidden_NH is not None:
                tiles.product(sinks.hidden_NH[t], dz_NM, w_MH, add=True)
            if grad_w_MH is not None:
                grad_w_MH.addmm_(dz_NM.T, x_NH)
            if grad_b_M is not None:
                grad_b_M += dz_NM.sum(0)
        for whole_V, part_M in ((sinks.weight_VH, grad_w_MH), (sinks.bias_V, grad_b_M)):
            if whole_V is not None and part_M is not None and part_M.dtype != whole_V.dtype:
                whole_V[v] = part_M


def _accumulator(sink_M: Tensor, sinks: Sinks, dtype: torch.dtype) -> Tensor:
    """Where a split of a gradient is summed: in place if it has the compute dtype, else in zeros of that dtype."""
    if sinks.accumulate:
        return sink_M
    return sink_M.zero_() if sink_M.dtype == dtype else sink_M.new_zeros(sink_M.shape, dtype=dtype)
