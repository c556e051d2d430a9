"""The Triton path of `linear_logprob.py`: logits live in registers, in fp32, and are never rounded or stored.

Forward: a program owns a block of rows and a split of the vocabulary, walks over the split's tiles, and keeps the sums
of `row_stats.py` online; a second kernel merges the splits. Partial sums: 12 T ceil(V / SPLIT_V) bytes (20 with
collision), which `buffer_bytes` does not bound. Backward: tiles are recomputed and dz is written to a buffer of bounded
size, one vocabulary split after the other; the two products that follow are cuBLAS's, with fp32 results: the hidden
gradient accumulates in fp32 over the splits (a bf16 sum over 16 splits loses two bits), the weight gradient of a split
is finished before the next begins.

Rows without a target or without a gradient are left out through a list of the rows that have one, made on the device:
programs past its end return at once, and nothing waits for the count. Tile sizes depend on the dtype alone, sums of the
forward have a fixed order, and there are no atomics: a row's statistics are the same to the last bit in any batch. Its
gradients are not: a library product may choose its order by the number of rows, and the scale of fp16 is the batch's.
"""

# A @triton.jit function has no signature that a type checker could hold a launch against.
# pyright: reportCallIssue=false, reportArgumentType=false

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import triton
from torch import Tensor

from entrocraft.kernels import row_stats
from entrocraft.kernels.arguments import HeadOptions
from entrocraft.kernels.linear_logprob_device import dlogits_kernel, merge_kernel, stats_kernel
from entrocraft.kernels.row_stats import RowCoefficients, neutral_sums

# For 16-bit operands the largest tile that Triton 3.7 compiles without a register spill for sm_80, sm_90 and sm_100
# (128 x 128 spills up to 490 bytes a thread: 64-bit offsets). BLOCK_H times the element size is 128 bytes.
BLOCK_T, BLOCK_V, NUM_WARPS, NUM_STAGES = 64, 128, 8, 3
# Vocabulary columns of one forward program: 149 splits of 152k are programs enough for any T.
SPLIT_V = 1024
# fp16 gradients are scaled to this size, so that small probabilities do not underflow; |dz| stays below 2.4
# times this.
FP16_SIZE = 2.0**13


def block_h(*, sixteen_bit: bool) -> int:
    """Columns of hidden taken at a time."""
    return 64 if sixteen_bit else 32


def _row_list(active_T: Tensor) -> tuple[Tensor, Tensor]:
    """Active rows first, in order, then the others; and how many are active, as a tensor of one element."""
    row_T = torch.argsort((~active_T).to(torch.int8), stable=True)
    return row_T, active_T.sum(dtype=torch.int32).reshape(1)


def _head_constants(hidden_TH: Tensor, weight_VH: Tensor, bias_V, inv_temperature, options: HeadOptions) -> dict:
    sixteen_bit = hidden_TH.dtype == weight_VH.dtype and hidden_TH.element_size() == 2
    # The interpreter multiplies the raw bits of bf16 operands; their products are exact in fp32 as well.
    upcast = hidden_TH.dtype != weight_VH.dtype or (hidden_TH.dtype == torch.bfloat16 and not hidden_TH.is_cuda)
    return {
        "inv_temperature": 1.0 if isinstance(inv_temperature, Tensor) else inv_temperature,
        "softcap": options.softcap or 1.0,
        "HAS_BIAS": bias_V is not None,
        "HAS_SOFTCAP": options.softcap is not None,
        "ROW_TEMPERATURE": isinstance(inv_temperature, Tensor),
        "UPCAST": upcast,
        "BLOCK_T": BLOCK_T,
        "BLOCK_V": BLOCK_V,
        "BLOCK_H": block_h(sixteen_bit=sixteen_bit),
        "num_warps": NUM_WARPS,
        "num_stages": NUM_STAGES,
    }


def forward(
    hidden_TH: Tensor,
    weight_VH: Tensor,
    bias_V: Tensor | None,
    target_T: Tensor,
    inv_temperature: float | Tensor,
    options: HeadOptions,
) -> Tensor:
    """The sums [K, T] of every row; rows whose target is ignore_index are left neutral and not computed."""
    T, H = hidden_TH.shape
    V = weight_VH.shape[0]
    sums_KT = neutral_sums(T, collision=options.collision, like=hidden_TH, dtype=torch.float32)
    if T == 0:
        return sums_KT
    valid_T = target_T != options.ignore_index
    row_T, count = _row_list(valid_T)
    # A target that no column answers to, being outside the vocabulary, must be seen.
    sums_KT[row_stats.TARGET] = torch.where(valid_T, torch.nan, 0.0)
    splits = triton.cdiv(V, SPLIT_V)
    part_KST = hidden_TH.new_empty((5 if options.collision else 3, splits, T), dtype=torch.float32)
    temperature_T = inv_temperature if isinstance(inv_temperature, Tensor) else None
    stats_kernel[(triton.cdiv(T, BLOCK_T), splits)](
        # pointers
        hidden_TH, weight_VH, bias_V, target_T.contiguous(), temperature_T, row_T, count,
        part_KST, sums_KT[row_stats.TARGET],
        # sizes
        V, H,
        # strides
        *hidden_TH.stride(), *weight_VH.stride(), part_KST.stride(0), part_KST.stride(1),
        # constants
        COLLISION=options.collision, SPLIT_V=SPLIT_V,
        **_head_constants(hidden_TH, weight_VH, bias_V, inv_temperature, options),
    )  # fmt: skip
    collision_rows = (sums_KT[row_stats.Q0], sums_KT[row_stats.Q1]) if options.collision else (None, None)
    merge_kernel[(triton.cdiv(T, BLOCK_T),)](
        # pointers
        part_KST, row_T, count,
        sums_KT[row_stats.MAX], sums_KT[row_stats.S0], sums_KT[row_stats.S1], *collision_rows,
        # sizes
        splits,
        # strides
        part_KST.stride(0), part_KST.stride(1),
        # constants
        COLLISION=options.collision, BLOCK_T=BLOCK_T,
    )  # fmt: skip
    return sums_KT


def buffer_shape(T: int, V: int, H: int, *, element_bytes: int, buffer_bytes: int) -> tuple[int, int]:
    """Rows R and columns C of the dz buffer, so that what the backward holds at once stays inside `buffer_bytes`:

        element_bytes R C      dz
        + 8 H C                a slice of the weight gradient, and the product added to it or the converted weight
        + 4 H R                a product on its way to the hidden gradient, or the masked hidden rows

    but never less than one tile, BLOCK_T x BLOCK_V. Traffic over the splits is as 1/R + 1/C, so R = C is aimed at; C
    depends on the head alone, and few rows leave room unused.
    """
    side = (math.sqrt((12 * H) ** 2 + 4 * element_bytes * buffer_bytes) - 12 * H) / (2 * element_bytes)
    columns = min(max(BLOCK_V, int(side) // BLOCK_V * BLOCK_V), V)
    rows = (buffer_bytes - 8 * H * columns) // (element_bytes * columns + 4 * H)
    return max(1, min(max(BLOCK_T, rows // BLOCK_T * BLOCK_T), T)), columns


def _add_product(total: Tensor | None, left: Tensor, right: Tensor) -> Tensor:
    """total + left @ right in fp32, into `total`; None is zero. cuBLAS might otherwise reduce 16 bits in 16 bits."""
    if left.dtype == torch.float32:
        return torch.mm(left, right) if total is None else total.addmm_(left, right)
    product = torch.mm(left, right, out_dtype=torch.float32) if left.is_cuda else torch.mm(left.float(), right.float())
    return product if total is None else total.add_(product)


def _scaled(rows: RowCoefficients, dz_dtype: torch.dtype) -> tuple[RowCoefficients, Tensor | None]:
    """For fp16, the coefficients times a power of two that brings the largest to FP16_SIZE, and that power [1].

    Only rows that are computed, and are finite, have a say: a NaN elsewhere must not reach every row.
    """
    fields = [field for field in (rows.offset_T, rows.slope_T, rows.target_T) if field is not None]
    if dz_dtype != torch.float16 or not len(rows.shift_T):
        return rows, None
    size_KT = torch.stack(fields).abs()
    largest = torch.where(rows.active_T & size_KT.isfinite(), size_KT, 0.0).amax()
    scale = torch.exp2(torch.floor(torch.log2(FP16_SIZE / largest.clamp_min(1e-30))))
    slope_T, target_T = (None if field is None else field * scale for field in (rows.slope_T, rows.target_T))
    return RowCoefficients(rows.shift_T, rows.offset_T * scale, slope_T, target_T, rows.active_T), scale


class _LogitGradients:
    """Writes dz of one vocabulary split into a reused buffer, one block of rows after the other."""

    def __init__(self, hidden_TH, weight_VH, bias_V, target_T, inv_temperature, options, rows, dz_dtype) -> None:
        self.hidden_TH, self.weight_VH, self.bias_V, self.target_T = hidden_TH, weight_VH, bias_V, target_T
        self.inv_temperature, self.options, self.rows = inv_temperature, options, rows
        (T, H), V = hidden_TH.shape, weight_VH.shape[0]
        bounds = {"element_bytes": dz_dtype.itemsize, "buffer_bytes": options.buffer_bytes}
        block_T, self.columns = buffer_shape(T, V, H, **bounds)
        self.blocks = [slice(start, min(start + block_T, T)) for start in range(0, T, block_T)]
        self.lists = [_row_list(rows.active_T[t]) for t in self.blocks]
        self.buffer_NM = hidden_TH.new_zeros((block_T, self.columns), dtype=dz_dtype)

    def splits(self) -> Iterator[slice]:
        """Slices of the vocabulary; none when there are no rows."""
        V = self.weight_VH.shape[0] if self.blocks else 0
        for start in range(0, V, self.columns):
            yield slice(start, min(start + self.columns, V))

    def of(self, v: slice) -> Iterator[tuple[slice, Tensor]]:
        """Blocks of rows, each with dz in those rows and the columns of v."""
        bias_M = None if self.bias_V is None else self.bias_V[v]
        for t, listed in zip(self.blocks, self.lists, strict=True):
            # Rows that are not listed are never written and must read as 0: with one block they stay so.
            buffer_NM = self.buffer_NM.zero_() if len(self.blocks) > 1 else self.buffer_NM
            dz_NM = buffer_NM[: t.stop - t.start, : v.stop - v.start]
            inv_N = self.inv_temperature[t] if isinstance(self.inv_temperature, Tensor) else self.inv_temperature
            operands = self.hidden_TH[t], self.weight_VH[v], bias_M, self.target_T[t], inv_N
            _launch_dlogits(*operands, self.options, self.rows.pick(t), listed, dz_NM, v.start)
            yield t, dz_NM


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
    dz_dtype = hidden_TH.dtype if hidden_TH.dtype == weight_VH.dtype else torch.float32
    rows, scale = _scaled(rows, dz_dtype)
    tiles = _LogitGradients(hidden_TH, weight_VH, bias_V, target_T, inv_temperature, options, rows, dz_dtype)
    grad_x_TH = hidden_TH.new_zeros(hidden_TH.shape, dtype=torch.float32) if needs[0] else None
    grad_w_VH = weight_VH.new_zeros(weight_VH.shape) if needs[1] else None
    grad_b_V = bias_V.new_zeros(bias_V.shape) if needs[2] and bias_V is not None else None
    for v in tiles.splits():
        factor_MH = None if grad_x_TH is None else weight_VH[v].to(dz_dtype)
        grad_w_MH = grad_b_M = None
        for t, dz_NM in tiles.of(v):
            if grad_x_TH is not None and factor_MH is not None:
                _add_product(grad_x_TH[t], dz_NM, factor_MH)
            if grad_w_VH is not None:
                # A row that is not listed may hold NaN, which its zeros in dz would not stop.
                x_NH = hidden_TH[t].to(dz_dtype, copy=True).masked_fill_(~rows.active_T[t, None], 0.0)
                grad_w_MH = _add_product(grad_w_MH, dz_NM.T, x_NH)
                del x_NH
            if grad_b_V is not None:
                part_M = dz_NM.sum(0, dtype=torch.float32)
                grad_b_M = part_M if grad_b_M is None else grad_b_M.add_(part_M)
        for whole_V, part_M in ((grad_w_VH, grad_w_MH), (grad_b_V, grad_b_M)):
            if whole_V is not None and part_M is not None:
                whole_V[v] = part_M if scale is None else part_M.div_(scale)
        del grad_w_MH, grad_b_M, factor_MH, part_M  # before the next split makes its own
    if grad_x_TH is not None:
        grad_x_TH = (grad_x_TH if scale is None else grad_x_TH.div_(scale)).to(hidden_TH.dtype)
    return [grad_x_TH, grad_w_VH, grad_b_V]


def _launch_dlogits(
    hidden_NH, weight_MH, bias_M, target_N, inv_temperature, options, rows, listed, dz_NM, v_first
) -> None:
    N, H = hidden_NH.shape
    M = weight_MH.shape[0]
    temperature_N = inv_temperature if isinstance(inv_temperature, Tensor) else None
    dlogits_kernel[(triton.cdiv(N, BLOCK_T), triton.cdiv(M, BLOCK_V))](
        # pointers
        hidden_NH, weight_MH, bias_M, target_N.contiguous(), temperature_N, *listed,
        rows.shift_T, rows.offset_T, rows.slope_T, rows.target_T, dz_NM,
        # sizes
        M, H,
        # strides
        *hidden_NH.stride(), *weight_MH.stride(), dz_NM.stride(0),
        # constants
        v_first,
        HAS_SLOPE=rows.slope_T is not None, HAS_TARGET=rows.target_T is not None,
        **_head_constants(hidden_NH, weight_MH, bias_M, inv_temperature, options),
    )  # fmt: skip
