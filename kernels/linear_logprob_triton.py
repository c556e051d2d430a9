"""The Triton path of `linear_logprob.py`: logits live in registers, in fp32, and are never rounded or stored.

Forward: a program owns a block of rows and a split of the vocabulary, walks over the split's tiles, and keeps the sums
of `row_stats.py` online; a second kernel merges the splits. Partial sums: 16 T ceil(V / SPLIT_V) bytes (24 with
collision). Backward: tiles are recomputed and dz is written to a buffer of bounded size, one vocabulary split after the
other; the two products that follow are cuBLAS's, with fp32 results: the hidden gradient accumulates in fp32 over the
splits (a bf16 sum over 16 splits loses two bits), the weight gradient of a split is finished before the next begins.

Rows without a target or without a gradient are left out through a list of the rows that have one, made on the device:
programs past its end return at once, and nothing waits for the count. Tile sizes depend on the dtype alone, every sum
has a fixed order, and there are no atomics: a row's result is the same to the last bit in any batch.
"""

# A @triton.jit function has no signature that a type checker could hold a launch against.
# pyright: reportCallIssue=false, reportArgumentType=false

from __future__ import annotations

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


def buffer_shape(T: int, V: int, *, element_bytes: int, buffer_bytes: int) -> tuple[int, int]:
    """Rows and columns of the dz buffer: all rows if 1,024 columns of each fit, and whole tiles of columns."""
    elements = max(1, buffer_bytes // element_bytes)
    rows = max(1, min(T, max(BLOCK_T, elements // 1024)))
    columns = max(BLOCK_V, elements // rows // BLOCK_V * BLOCK_V)
    return rows, min(columns, V)


def _fp32_product(left: Tensor, right: Tensor) -> Tensor:
    """left @ right with an fp32 result, whatever the operands: cuBLAS may otherwise reduce in bf16."""
    if left.dtype == torch.float32:
        return torch.mm(left, right)
    if left.is_cuda:
        return torch.mm(left, right, out_dtype=torch.float32)
    return torch.mm(left.float(), right.float())


def _fp16_scale(rows: RowCoefficients) -> Tensor:
    """A power of two that brings the largest coefficient to FP16_SIZE, as a tensor of one element."""
    largest = torch.stack(
        [field.abs().amax() for field in (rows.offset_T, rows.slope_T, rows.target_T) if field is not None]
    )
    return torch.exp2(torch.floor(torch.log2(FP16_SIZE / largest.amax().clamp_min(1e-30))))


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
    (T, H), V = hidden_TH.shape, weight_VH.shape[0]
    dz_dtype = hidden_TH.dtype if hidden_TH.dtype == weight_VH.dtype else torch.float32
    scale = _fp16_scale(rows) if dz_dtype == torch.float16 and T else 1.0
    scaled = [None if field is None else field * scale for field in rows[1:4]]
    rows = RowCoefficients(rows.shift_T, scaled[0], scaled[1], scaled[2], rows.active_T)
    grad_x_TH = hidden_TH.new_zeros((T, H), dtype=torch.float32) if needs[0] else None
    grad_w_VH = weight_VH.new_zeros((V, H)) if needs[1] else None
    grad_b_V = bias_V.new_zeros(V) if needs[2] and bias_V is not None else None
    block_T, block_V = buffer_shape(T, V, element_bytes=dz_dtype.itemsize, buffer_bytes=options.buffer_bytes)
    blocks = [slice(start, min(start + block_T, T)) for start in range(0, T, block_T)]
    lists = [_row_list(rows.active_T[t]) for t in blocks]
    buffer_NM = hidden_TH.new_zeros((block_T, block_V), dtype=dz_dtype)
    for start in range(0, V if T else 0, block_V):
        v = slice(start, min(start + block_V, V))
        w_MH, bias_M = weight_VH[v], None if bias_V is None else bias_V[v]
        grad_w_MH = hidden_TH.new_zeros(w_MH.shape, dtype=torch.float32) if grad_w_VH is not None else None
        grad_b_M = hidden_TH.new_zeros(w_MH.shape[0], dtype=torch.float32) if grad_b_V is not None else None
        for t, listed in zip(blocks, lists, strict=True):
            # Rows that are not listed are never written and must read as 0: with one block they stay so.
            dz_NM = (buffer_NM.zero_() if len(blocks) > 1 else buffer_NM)[: t.stop - t.start, : v.stop - v.start]
            inv_N = inv_temperature[t] if isinstance(inv_temperature, Tensor) else inv_temperature
            _launch_dlogits(hidden_TH[t], w_MH, bias_M, target_T[t], inv_N, options, rows.pick(t), listed, dz_NM, start)
            if grad_x_TH is not None:
                grad_x_TH[t] += _fp32_product(dz_NM, w_MH.to(dz_dtype))
            if grad_w_MH is not None:
                grad_w_MH += _fp32_product(dz_NM.T, hidden_TH[t].to(dz_dtype))
            if grad_b_M is not None:
                grad_b_M += dz_NM.sum(0, dtype=torch.float32)
        for whole_V, part_M in ((grad_w_VH, grad_w_MH), (grad_b_V, grad_b_M)):
            if whole_V is not None and part_M is not None:
                whole_V[v] = part_M.div_(scale) if isinstance(scale, Tensor) else part_M
    if grad_x_TH is not None:
        grad_x_TH = (grad_x_TH.div_(scale) if isinstance(scale, Tensor) else grad_x_TH).to(hidden_TH.dtype)
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
