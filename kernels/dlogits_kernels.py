"""Device code of the backward of `linear_logprob_triton.py`: logit gradients, a tile at a time.

`dlogits_kernel` (K3) makes a tile of logits again and turns it into dz, `stored_dlogits_kernel` turns stored
exponentials into dz, without a product.
What keeps the tensor cores busy is said in `logits_tile.py`, the mathematics in `row_stats.py`.
"""

# Triton has no signature that a type checker could hold a call against.
# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false, reportIndexIssue=false

from __future__ import annotations

import triton
import triton.language as tl

from entrocraft.kernels.logits_tile import ROW_FLOOR, U_MIN, logits, place, product


@triton.jit
def dlogits_kernel(
    # operands: pointers, or tensor descriptors
    x, w,
    # pointers
    b_ptr, y_ptr, inv_temperature_ptr, shift_ptr, offset_ptr, slope_ptr, target_ptr, dz_ptr,
    # sizes
    T, V, H, programs,
    # strides
    stride_x_t, stride_x_h, stride_w_v, stride_w_h, stride_dz_t,
    # constants
    column, inv_temperature, softcap,
    HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, ROW_TEMPERATURE: tl.constexpr,
    HAS_SLOPE: tl.constexpr, HAS_TARGET: tl.constexpr,
    TMA: tl.constexpr, UPCAST: tl.constexpr, EVEN_H: tl.constexpr, FLATTEN: tl.constexpr,
    GROUP: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """K3: dz of a block of rows, for V columns of the vocabulary from `column` on, from recomputed logits."""
    tiles = tl.cdiv(T, BLOCK_T) * tl.cdiv(V, BLOCK_V)
    for tile in tl.range(tl.program_id(0), tiles, programs, flatten=FLATTEN):
        t_first, v_first = place(tile, T, V, GROUP, BLOCK_T, BLOCK_V)
        acc = product(
            x, w, t_first, v_first, T, V, H, stride_x_t, stride_x_h, stride_w_v, stride_w_h,
            TMA, UPCAST, EVEN_H, BLOCK_T, BLOCK_V, BLOCK_H,
        )  # fmt: skip
        t = t_first + tl.arange(0, BLOCK_T)
        v = v_first + tl.arange(0, BLOCK_V)
        t_mask, v_mask = t < T, v < V
        z, capped = logits(
            acc, b_ptr, inv_temperature_ptr, t, v, T, V, inv_temperature, softcap,
            HAS_BIAS, HAS_SOFTCAP, ROW_TEMPERATURE,
        )  # fmt: skip
        # Rows and columns past the end hold logits of others (descriptors: zeros), whose exponentials might overflow.
        u = z - tl.load(shift_ptr + t, mask=t_mask, other=-ROW_FLOOR)[:, None]
        if not TMA:
            u = tl.where(v_mask[None, :], u, U_MIN)
        if HAS_BIAS:
            u = tl.where(u < U_MIN, U_MIN, u)
        factor = tl.load(offset_ptr + t, mask=t_mask, other=0.0)[:, None]
        if HAS_SLOPE:
            factor += tl.load(slope_ptr + t, mask=t_mask, other=0.0)[:, None] * u
        dz = -tl.exp(u) * factor
        if HAS_TARGET:
            y = tl.load(y_ptr + t, mask=t_mask, other=-1) - column
            target = tl.load(target_ptr + t, mask=t_mask, other=0.0)
            if tl.max(((y >= v_first) & (y < v_first + BLOCK_V)).to(tl.int32), axis=0) > 0:
                dz += tl.where(v[None, :] == y[:, None], target[:, None], 0.0)
        if HAS_SOFTCAP:
            dz *= 1.0 - capped * capped
        if TMA:
            dz_ptr.store([t_first, v_first], dz.to(dz_ptr.dtype))
        else:
            dz_ptrs = dz_ptr + tl.full((), 1, tl.int64) * t_first * stride_dz_t + v_first
            dz_ptrs += tl.arange(0, BLOCK_T)[:, None] * stride_dz_t + tl.arange(0, BLOCK_V)[None, :]
            tl.store(dz_ptrs, dz.to(dz_ptr.dtype.element_ty), mask=t_mask[:, None] & v_mask[None, :])


@triton.jit
def stored_dlogits_kernel(
    # pointers
    e_ptr, tile_shift_ptr, row_ptr, y_ptr, inv_temperature_ptr, shift_ptr, offset_ptr, slope_ptr, target_ptr, u_ptr,
    dz_ptr,
    # sizes
    T, V,
    # strides
    stride_e_t, stride_tile_t, stride_dz_t,
    # constants
    column, inv_temperature, softcap,
    HAS_ROWS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, ROW_TEMPERATURE: tl.constexpr,
    HAS_SLOPE: tl.constexpr, HAS_TARGET: tl.constexpr,
    COLUMNS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """dz from stored exponentials, whose tiles are COLUMNS wide: `column` is a multiple of that, and BLOCK_V divides
    it.

    The target's own element is made from the exact z_y - shift (`row_stats.stored_gradient`).
    """
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    v = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    t_mask = t < T
    mask = t_mask[:, None] & (v < V)[None, :]
    row = t.to(tl.int64)
    if HAS_ROWS:
        row = tl.load(row_ptr + t, mask=t_mask, other=0)
    e = tl.load(e_ptr + row[:, None] * stride_e_t + (column + v)[None, :], mask=mask, other=0.0).to(tl.float32)
    tile = (column + tl.program_id(1) * BLOCK_V) // COLUMNS
    shift = tl.load(shift_ptr + t, mask=t_mask, other=0.0)
    d = tl.load(tile_shift_ptr + row * stride_tile_t + tile, mask=t_mask, other=0.0) - shift
    u = tl.where(e > 0.0, tl.log(tl.where(e > 0.0, e, 1.0)) + d[:, None], U_MIN)
    e *= tl.exp(d)[:, None]  # a NaN is kept here
    exact = tl.load(u_ptr + t, mask=t_mask, other=0.0)
    y = tl.load(y_ptr + t, mask=t_mask, other=-1) - column
    hit = v[None, :] == y[:, None]
    u = tl.where(hit, tl.where(exact < U_MIN, U_MIN, exact)[:, None], u)
    e = tl.where(hit, tl.exp(u), e)
    factor = tl.load(offset_ptr + t, mask=t_mask, other=0.0)[:, None]
    if HAS_SLOPE:
        factor += tl.load(slope_ptr + t, mask=t_mask, other=0.0)[:, None] * u
    dz = -e * factor
    if HAS_TARGET:
        dz += tl.where(hit, tl.load(target_ptr + t, mask=t_mask, other=0.0)[:, None], 0.0)
    if HAS_SOFTCAP:
        scale = tl.zeros((BLOCK_T,), dtype=tl.float32) + inv_temperature
        if ROW_TEMPERATURE:
            scale = tl.load(inv_temperature_ptr + t, mask=t_mask, other=1.0)
        tanh = (u + shift[:, None]) / (scale * softcap)[:, None]
        tanh = tl.where(tanh < -1.0, -1.0, tl.where(tanh > 1.0, 1.0, tanh))
        dz *= 1.0 - tanh * tanh
    tl.store(dz_ptr + t.to(tl.int64)[:, None] * stride_dz_t + v[None, :], dz.to(dz_ptr.dtype.element_ty), mask=mask)
