"""The Triton path of `linear_logprob.py`: logits live in registers, in fp32, and are never rounded or stored.

Forward: K1 computes tile after tile of the logits and writes a few sums a row and tile, K2 merges them in a fixed
order. Tiles are independent of each other, so their order serves the L2 cache, results repeat to the last bit, and
those of a row are the same in any batch of the same mode and options. Backward: tiles are recomputed (K3), or read
where their exponentials were stored, and dz is written to a buffer of bounded size, one vocabulary split after the
other; the two products that follow are cuBLAS's, with fp32 results: the hidden gradient accumulates in fp32 over the
splits (a bf16 sum over 16 splits loses two bits), the weight gradient of a split is finished before the next begins.

Operations: 2 T V H forward; backward 2 T V H each for the logits, the hidden and the weight gradient. Bytes, T = 16384,
V = 151936, H = 2560 in bf16, tiles of 128 x 256: partial sums 16 T V / 256 = 156 MB written and read once (twice that
with every statistic), dz 2 T V = 5.0 GB written and read twice, against 30 T V for eager statistics. The intensity of
the product is that of its tile, 85 operations a byte from the L2 cache; HBM sees hidden and weight about once (GROUP).

A gradient is not the same to the last bit in any batch: a library product may choose its order by the number of rows,
and the scale of fp16 is the batch's. `batch_invariant` gives the products one shape.
"""

# A @triton.jit function has no signature that a type checker could hold a launch against.
# pyright: reportCallIssue=false, reportArgumentType=false

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import triton
from torch import Tensor
from torch.nn.functional import pad

from entrocraft.kernels import linear_logprob_launch as launch
from entrocraft.kernels import row_stats
from entrocraft.kernels.dlogits_kernels import dlogits_kernel, stored_dlogits_kernel
from entrocraft.kernels.head import Exponentials, Head, Sinks
from entrocraft.kernels.row_stats import RowCoefficients, neutral_sums
from entrocraft.kernels.stats_kernels import merge_kernel, stats_kernel

# fp16 gradients are scaled to this size, so that small probabilities do not underflow; |dz| stays below 2.4
# times this.
FP16_SIZE = 2.0**13
# The least dz buffer, and what its sides are multiples of; every tile's sides divide these.
LEAST_T, LEAST_V = 128, 256
# Fields of a partial sum: maximum, s0, s1, then q0, q1, s2, argmax where one of them is asked for. Beside each other,
# so that a store needs one address and not one a field; a row's share is then a sector of 16 or 32 bytes.
FEW_FIELDS, ALL_FIELDS = 4, 8
# Rows of every library product of the hidden gradient when a row's bits may not depend on how many rows there are.
INVARIANT_ROWS = 1024


def tile_columns(head: Head) -> int:
    """Columns of a tile of stored exponentials: those of a forward tile."""
    return launch.forward_tile(head, store=True).BLOCK_V


def statistics(head: Head, exponentials: Exponentials | None = None) -> Tensor:
    """Sums [8, T] of every row, see `row_stats.py`; fills `exponentials`, where given, for the rows it covers."""
    head = launch.readable(head)
    tile = launch.forward_tile(head, store=exponentials is not None)
    sums_KT = neutral_sums(head.T, like=head.hidden_TH, dtype=torch.float32)
    # A target that no column answers to, being outside the vocabulary, must be seen.
    sums_KT[row_stats.TARGET] = torch.nan
    tiles = triton.cdiv(head.V, tile.BLOCK_V)
    fields = ALL_FIELDS if head.options.collision or head.options.varentropy or head.options.argmax else FEW_FIELDS
    per_row = 4 * fields * tiles
    rows = max(tile.BLOCK_T, head.options.buffer_bytes // per_row // tile.BLOCK_T * tile.BLOCK_T)
    part_STK = head.hidden_TH.new_empty((tiles, min(rows, head.T), fields), dtype=torch.float32)
    for start in range(0, head.T, rows):
        t = slice(start, min(start + rows, head.T))
        stored = _part(exponentials, t)
        _launch_stats(head.rows(t), tile, part_STK, sums_KT[row_stats.TARGET, t], stored)
        merge_kernel[(triton.cdiv(t.stop - t.start, launch.MERGE_ROWS),)](
            part_STK, sums_KT[:, t], t.stop - t.start, tiles, part_STK.stride(0), sums_KT.stride(0),
            COLLISION=head.options.collision, VARENTROPY=head.options.varentropy, ARGMAX=head.options.argmax,
            FIELDS=fields, BLOCK_T=launch.MERGE_ROWS, **launch.compile_options(launch.MERGE_WARPS, 1),
        )  # fmt: skip
    return sums_KT


def _part(exponentials: Exponentials | None, t: slice) -> Exponentials | None:
    """Those of the rows t; None when none is covered."""
    if exponentials is None or t.start >= exponentials.rows:
        return None
    if exponentials.row_N is not None:
        return exponentials._replace(row_N=exponentials.row_N[t])
    return exponentials._replace(value_NV=exponentials.value_NV[t], shift_NS=exponentials.shift_NS[t])


def _launch_stats(
    head: Head, tile: launch.Tile, part_STK: Tensor, target_T: Tensor, stored: Exponentials | None
) -> None:
    x, w, tma = launch.operands(head, tile)
    value_NV = shift_NS = None
    if stored is not None:
        value_NV, shift_NS = launch.target_of(stored.value_NV, head.V, tile, tma=tma), stored.shift_NS
    temperature_T = head.inv_temperature if isinstance(head.inv_temperature, Tensor) else None
    options = head.options
    programs = launch.programs(head, tile)
    stats_kernel[(programs,)](
        # operands and pointers
        x, w, head.bias_V, head.target_T, temperature_T, part_STK, target_T, value_NV, shift_NS,
        # sizes
        head.T, head.V, head.H, 0 if stored is None else stored.rows, programs,
        # strides
        *head.hidden_TH.stride(), *head.weight_VH.stride(), part_STK.stride(0),
        *((0, 0) if stored is None else (stored.value_NV.stride(0), stored.shift_NS.stride(0))),
        # constants
        HAS_BIAS=head.bias_V is not None,
        COLLISION=options.collision, VARENTROPY=options.varentropy, ARGMAX=options.argmax,
        STORE=stored is not None, FIELDS=part_STK.shape[2],
        **launch.logits_constants(head), **launch.product_constants(head, tile, tma=tma),
    )  # fmt: skip


def buffer_shape(T: int, V: int, H: int, *, element_bytes: int, buffer_bytes: int) -> tuple[int, int]:
    """Rows R and columns C of the dz buffer, so that what the backward holds at once stays inside `buffer_bytes`:

        element_bytes R C      dz
        + 8 H C                a slice of the weight gradient, and the product added to it or the converted weight
        + 4 H R                a product on its way to the hidden gradient, or the converted hidden rows

    but never less than LEAST_T x LEAST_V. Traffic over the splits is as 1/R + 1/C, so R = C is aimed at; C depends on
    the head alone, and few rows leave room unused.
    """
    side = (math.sqrt((12 * H) ** 2 + 4 * element_bytes * buffer_bytes) - 12 * H) / (2 * element_bytes)
    columns = min(max(LEAST_V, int(side) // LEAST_V * LEAST_V), V)
    rows = (buffer_bytes - 8 * H * columns) // (element_bytes * columns + 4 * H)
    return max(1, min(max(LEAST_T, rows // LEAST_T * LEAST_T), T)), columns


def _add_product(total: Tensor | None, left: Tensor, right: Tensor) -> Tensor:
    """total + left @ right in fp32, into `total`; None is zero. cuBLAS might otherwise reduce 16 bits in 16 bits."""
    if left.dtype == torch.float32:
        return torch.mm(left, right) if total is None else total.addmm_(left, right)
    product = torch.mm(left, right, out_dtype=torch.float32) if left.is_cuda else torch.mm(left.float(), right.float())
    return product if total is None else total.add_(product)


def _add_rows(total_NH: Tensor, dz_NM: Tensor, factor_MH: Tensor, *, invariant: bool) -> None:
    """total + dz @ factor; invariant: in products of one shape, so that a row's bits are its own."""
    if not invariant:
        _add_product(total_NH, dz_NM, factor_MH)
        return
    for start in range(0, len(dz_NM), INVARIANT_ROWS):
        block_NM = dz_NM[start : start + INVARIANT_ROWS]
        whole = pad(block_NM, (0, 0, 0, INVARIANT_ROWS - len(block_NM)))
        total_NH[start : start + INVARIANT_ROWS] += _add_product(None, whole, factor_MH)[: len(block_NM)]


def _scaled(rows: RowCoefficients, dz_dtype: torch.dtype) -> tuple[RowCoefficients, Tensor | None]:
    """For fp16, the coefficients times a power of two that brings the largest to FP16_SIZE, and that power [1].

    Only finite rows have a say: a NaN must not reach every row.
    """
    fields = [field for field in (rows.offset_T, rows.slope_T, rows.target_T) if field is not None]
    if dz_dtype != torch.float16 or not len(rows.shift_T):
        return rows, None
    size_KT = torch.stack(fields).abs()
    largest = torch.where(size_KT.isfinite(), size_KT, 0.0).amax()
    scale = torch.exp2(torch.floor(torch.log2(FP16_SIZE / largest.clamp_min(1e-30))))
    slope_T, target_T = (None if field is None else field * scale for field in (rows.slope_T, rows.target_T))
    return rows._replace(offset_T=rows.offset_T * scale, slope_T=slope_T, target_T=target_T), scale


class _LogitGradients:
    """Writes dz of one vocabulary split into a reused buffer, one block of rows after the other."""

    def __init__(self, head: Head, rows: RowCoefficients, exponentials: Exponentials | None, dtype) -> None:
        self.head, self.rows, self.exponentials = head, rows, exponentials
        bounds = {"element_bytes": dtype.itemsize, "buffer_bytes": head.options.buffer_bytes}
        block_T, self.columns = buffer_shape(head.T, head.V, head.H, **bounds)
        stored = 0 if exponentials is None else exponentials.rows
        self.blocks = [
            slice(start, min(start + block_T, last))
            for first, last in ((0, stored), (stored, head.T))
            for start in range(first, last, block_T)
        ]
        # A row pitch of 16 bytes, for the products.
        pitch = triton.cdiv(self.columns, 8) * 8
        self.buffer_NM = head.hidden_TH.new_empty((block_T, pitch), dtype=dtype)

    def splits(self) -> Iterator[slice]:
        """Slices of the vocabulary; none when there are no rows."""
        for start in range(0, self.head.V if self.blocks else 0, self.columns):
            yield slice(start, min(start + self.columns, self.head.V))

    def of(self, v: slice) -> Iterator[tuple[slice, Tensor]]:
        """Blocks of rows, each with dz in those rows and the columns of v."""
        for t in self.blocks:
            dz_NM = self.buffer_NM[: t.stop - t.start, : v.stop - v.start]
            part = self.head.rows(t)
            stored = _part(self.exponentials, t)
            if stored is None:
                _launch_dlogits(part, v, self.rows.pick(t), dz_NM)
            else:
                _launch_stored(part, v, self.rows.pick(t), stored, dz_NM)
            yield t, dz_NM


def gradients(head: Head, rows: RowCoefficients, sinks: Sinks, exponentials: Exponentials | None = None) -> None:
    """Put the gradients of hidden, weight and bias into `sinks`; stored exponentials stay as they are."""
    dz_dtype = head.hidden_TH.dtype if head.hidden_TH.dtype == head.weight_VH.dtype else torch.float32
    head = launch.readable(head)
    rows, scale = _scaled(rows, dz_dtype)
    tiles = _LogitGradients(head, rows, exponentials, dz_dtype)
    # With a scale the sum must not begin with what the sink holds.
    hidden_NH = sinks.hidden_NH if scale is None or sinks.hidden_NH is None else torch.zeros_like(sinks.hidden_NH)
    for v in tiles.splits():
        factor_MH = None if hidden_NH is None else head.weight_VH[v].to(dz_dtype)
        grad_w_MH = grad_b_M = None
        for t, dz_NM in tiles.of(v):
            if hidden_NH is not None and factor_MH is not None:
                _add_rows(hidden_NH[t], dz_NM, factor_MH, invariant=head.options.batch_invariant)
            if sinks.weight_VH is not None:
                grad_w_MH = _add_product(grad_w_MH, dz_NM.T, head.hidden_TH[t].to(dz_dtype))
            if sinks.bias_V is not None:
                part_M = dz_NM.sum(0, dtype=torch.float32)
                grad_b_M = part_M if grad_b_M is None else grad_b_M.add_(part_M)
        for whole_V, part_M in ((sinks.weight_VH, grad_w_MH), (sinks.bias_V, grad_b_M)):
            if whole_V is not None and part_M is not None:
                part_M = part_M if scale is None else part_M.div_(scale)
                whole_V[v] = whole_V[v] + part_M if sinks.accumulate else part_M
        del grad_w_MH, grad_b_M, factor_MH, part_M  # before the next split makes its own
    if scale is not None and hidden_NH is not None and sinks.hidden_NH is not None:
        sinks.hidden_NH.add_(hidden_NH.div_(scale))


def _launch_dlogits(head: Head, v: slice, rows: RowCoefficients, dz_NM: Tensor) -> None:
    tile = launch.backward_tile(head)
    head = head._replace(weight_VH=head.weight_VH[v], bias_V=None if head.bias_V is None else head.bias_V[v])
    x, w, tma = launch.operands(head, tile)
    temperature_T = head.inv_temperature if isinstance(head.inv_temperature, Tensor) else None
    programs = launch.programs(head, tile)
    dlogits_kernel[(programs,)](
        # operands and pointers
        x, w, head.bias_V, head.target_T, temperature_T,
        rows.shift_T, rows.offset_T, rows.slope_T, rows.target_T, launch.target_of(dz_NM, head.V, tile, tma=tma),
        # sizes
        head.T, head.V, head.H, programs,
        # strides
        *head.hidden_TH.stride(), *head.weight_VH.stride(), dz_NM.stride(0),
        # constants
        v.start, HAS_BIAS=head.bias_V is not None,
        HAS_SLOPE=rows.slope_T is not None, HAS_TARGET=rows.target_T is not None,
        **launch.logits_constants(head), **launch.product_constants(head, tile, tma=tma),
    )  # fmt: skip


def _launch_stored(head: Head, v: slice, rows: RowCoefficients, stored: Exponentials, dz_NM: Tensor) -> None:
    N, M = dz_NM.shape
    block_T, block_V, num_warps = launch.STORED_TILE
    temperature_T = head.inv_temperature if isinstance(head.inv_temperature, Tensor) else None
    stored_dlogits_kernel[(triton.cdiv(N, block_T), triton.cdiv(M, block_V))](
        # pointers
        stored.value_NV, stored.shift_NS, stored.row_N, head.target_T, temperature_T,
        rows.shift_T, rows.offset_T, rows.slope_T, rows.target_T, rows.u_T, dz_NM,
        # sizes
        N, M,
        # strides
        stored.value_NV.stride(0), stored.shift_NS.stride(0), dz_NM.stride(0),
        # constants
        v.start, HAS_ROWS=stored.row_N is not None,
        HAS_SLOPE=rows.slope_T is not None, HAS_TARGET=rows.target_T is not None,
        COLUMNS=stored.columns, BLOCK_T=block_T, BLOCK_V=block_V, **launch.compile_options(num_warps, 1),
        **launch.logits_constants(head),
    )  # fmt: skip
