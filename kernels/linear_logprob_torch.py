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

from entrocraft.kernels.arguments import HeadOptions, compute_dtype
from entrocraft.kernels.logits_logprob import scaled_logits
from entrocraft.kernels.row_stats import (
    RowCoefficients,
    merge_sums,
    neutral_sums,
    tile_gradient,
    tile_sums,
)

# Elements of a tile: 16 MiB in fp32. From 1 to 16 MiB one core is equally fast, and every operation on a tile is a
# meeting of all threads: fewer and larger ones suffer less when a core is shared.
TILE_ELEMENTS = 4 << 20
# Rows of a tile when the vocabulary does not fit beside them: with as many columns, a product as square as it gets.
TILE_ROWS = 1024


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


class _Tiles:
    """Walks over the tiles of z and computes each into one reused buffer."""

    def __init__(self, hidden_TH, weight_VH, bias_V, inv_temperature, options: HeadOptions) -> None:
        self.hidden_TH, self.weight_VH, self.bias_V = hidden_TH, weight_VH, bias_V
        self.inv_temperature, self.softcap = inv_temperature, options.softcap
        self.dtype = compute_dtype(hidden_TH, weight_VH)
        self.rows, self.columns = tile_shape(
            hidden_TH.shape[0],
            *weight_VH.shape,
            element_bytes=self.dtype.itemsize,
            buffer_bytes=options.buffer_bytes,
        )
        self.logit = hidden_TH.new_empty(self.rows * self.columns, dtype=self.dtype)
        self.scratch = torch.empty_like(self.logit)

    def vocabulary(self) -> Iterator[tuple[slice, Tensor]]:
        """Slices of the vocabulary, each with its weight in the compute dtype."""
        for start in range(0, self.weight_VH.shape[0], self.columns):
            v = slice(start, min(start + self.columns, self.weight_VH.shape[0]))
            yield v, self.weight_VH[v].to(self.dtype)

    def tokens(self) -> Iterator[tuple[slice, Tensor]]:
        """Blocks of the tokens, each with its hidden rows in the compute dtype."""
        for start in range(0, self.hidden_TH.shape[0], self.rows):
            t = slice(start, min(start + self.rows, self.hidden_TH.shape[0]))
            yield t, self.hidden_TH[t].to(self.dtype)

    def compute(
        self, t: slice, v: slice, x_NH: Tensor, w_MH: Tensor, *, slope: bool = False
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """z of a tile, a scratch tile, and the derivative of the softcap when it is asked for and there is one."""
        shape = (x_NH.shape[0], w_MH.shape[0])
        z_NM = self.logit[: shape[0] * shape[1]].view(shape)
        torch.mm(x_NH, w_MH.T, out=z_NM)
        if self.bias_V is not None:
            z_NM += self.bias_V[v].to(self.dtype)
        inv = self.inv_temperature
        slope_NM = scaled_logits(z_NM, inv[t] if isinstance(inv, Tensor) else inv, self.softcap, slope=slope)
        return z_NM, self.scratch[: shape[0] * shape[1]].view(shape), slope_NM


def _picked(value, index: Tensor | None):
    return value[index] if index is not None and isinstance(value, Tensor) else value


def forward(
    hidden_TH: Tensor,
    weight_VH: Tensor,
    bias_V: Tensor | None,
    target_T: Tensor,
    inv_temperature: float | Tensor,
    options: HeadOptions,
) -> Tensor:
    """The sums [K, T] of every row; rows whose target is ignore_index are left neutral and not computed."""
    T = hidden_TH.shape[0]
    dtype = compute_dtype(hidden_TH, weight_VH)
    sums_KT = neutral_sums(T, collision=options.collision, like=hidden_TH, dtype=dtype)
    valid_T = target_T != options.ignore_index
    index = None if bool(valid_T.all()) else valid_T.nonzero()[:, 0]
    target_N = _picked(target_T, index)
    tiles = _Tiles(_picked(hidden_TH, index), weight_VH, bias_V, _picked(inv_temperature, index), options)
    computed_KN = sums_KT if index is None else sums_KT[:, index]
    for v, w_MH in tiles.vocabulary():
        for t, x_NH in tiles.tokens():
            z_NM, scratch_NM, _ = tiles.compute(t, v, x_NH, w_MH)
            part_KN = tile_sums(z_NM, scratch_NM, target_N[t] - v.start, collision=options.collision)
            computed_KN[:, t] = part_KN if v.start == 0 else merge_sums(computed_KN[:, t], part_KN)
    if index is not None:
        sums_KT[:, index] = computed_KN
    return sums_KT


def backward(
    hidden_TH: Tensor,
    weight_VH: Tensor,
    bias_V: Tensor | None,
    target_T: Tensor,
    inv_temperature: float | Tensor,
    options: HeadOptions,
    rows: RowCoefficients,
    *,
    needs: tuple[bool, bool, bool],
) -> list[Tensor | None]:
    """Gradients of hidden, weight and bias (None where not needed), each in the dtype of what it is the gradient of."""
    index = None if bool(rows.active_T.all()) else rows.active_T.nonzero()[:, 0]
    x_TH, target_T = _picked(hidden_TH, index), _picked(target_T, index)
    rows = rows if index is None else rows.pick(index)
    tiles = _Tiles(x_TH, weight_VH, bias_V, _picked(inv_temperature, index), options)
    grad_x_TH = x_TH.new_zeros(x_TH.shape, dtype=tiles.dtype) if needs[0] else None
    grad_w_VH = weight_VH.new_zeros(weight_VH.shape) if needs[1] else None
    grad_b_V = bias_V.new_zeros(bias_V.shape) if needs[2] and bias_V is not None else None
    for v, w_MH in tiles.vocabulary():
        grad_w_MH = None if grad_w_VH is None else _accumulator(grad_w_VH[v], tiles.dtype)
        grad_b_M = None if grad_b_V is None else _accumulator(grad_b_V[v], tiles.dtype)
        for t, x_NH in tiles.tokens():
            z_NM, scratch_NM, slope_NM = tiles.compute(t, v, x_NH, w_MH, slope=True)
            dz_NM = tile_gradient(z_NM, scratch_NM, target_T[t] - v.start, rows.pick(t))
            if slope_NM is not None:
                dz_NM.mul_(slope_NM)
            if grad_x_TH is not None:
                grad_x_TH[t].addmm_(dz_NM, w_MH)
            if grad_w_MH is not None:
                grad_w_MH.addmm_(dz_NM.T, x_NH)
            if grad_b_M is not None:
                grad_b_M += dz_NM.sum(0)
        for whole_V, part_M in ((grad_w_VH, grad_w_MH), (grad_b_V, grad_b_M)):
            if whole_V is not None and part_M is not None and part_M.dtype != whole_V.dtype:
                whole_V[v] = part_M
    if grad_x_TH is not None:
        grad_x_TH = grad_x_TH.to(hidden_TH.dtype)
        if index is not None:
            grad_x_TH = hidden_TH.new_zeros(hidden_TH.shape).index_copy_(0, index, grad_x_TH)
    return [grad_x_TH, grad_w_VH, grad_b_V]


def _accumulator(zeros_M: Tensor, dtype: torch.dtype) -> Tensor:
    """Where a split of a gradient is summed: in place if it has the compute dtype, else in zeros of that dtype."""
    return zeros_M if zeros_M.dtype == dtype else zeros_M.new_zeros(zeros_M.shape, dtype=dtype)
