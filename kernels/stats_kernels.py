"""Device code of the forward of `linear_logprob_triton.py`: the sums of a row, tile by tile, then merged.

`stats_kernel` (K1) reduces a tile of logits to a few sums a row, `merge_kernel` (K2) folds the sums of the tiles.
What keeps the tensor cores busy is said in `logits_tile.py`, the mathematics in `row_stats.py`.
"""

# Triton has no signature that a type checker could hold a call against.
# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false, reportIndexIssue=false

from __future__ import annotations

import triton
import triton.language as tl

from entrocraft.kernels.logits_tile import ABSENT, ROW_FLOOR, U_MIN, logits, place, product


@triton.jit
def stats_kernel(
    # operands: pointers, or tensor descriptors
    x, w,
    # pointers
    b_ptr, y_ptr, inv_temperature_ptr, part_ptr, target_ptr, e_ptr, shift_ptr,
    # sizes
    T, V, H, stored_rows, programs,
    # strides
    stride_x_t, stride_x_h, stride_w_v, stride_w_h, stride_part_s, stride_e_t, stride_shift_t,
    # constants
    inv_temperature, softcap,
    HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, ROW_TEMPERATURE: tl.constexpr,
    COLLISION: tl.constexpr, VARENTROPY: tl.constexpr, ARGMAX: tl.constexpr, STORE: tl.constexpr,
    FIELDS: tl.constexpr,
    TMA: tl.constexpr, UPCAST: tl.constexpr, EVEN_H: tl.constexpr, FLATTEN: tl.constexpr,
    GROUP: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """K1: the sums of every row in every tile of columns, the target's logit where it is, and e^(z - max) if STORE."""
    tiles = tl.cdiv(T, BLOCK_T) * tl.cdiv(V, BLOCK_V)
    for tile in tl.range(tl.program_id(0), tiles, programs, flatten=FLATTEN):
        t_first, v_first = place(tile, T, V, GROUP, BLOCK_T, BLOCK_V)
        acc = product(
            x, w, t_first, v_first, T, V, H, stride_x_t, stride_x_h, stride_w_v, stride_w_h,
            TMA, UPCAST, EVEN_H, BLOCK_T, BLOCK_V, BLOCK_H,
        )  # fmt: skip
        t = t_first + tl.arange(0, BLOCK_T)
        v = v_first + tl.arange(0, BLOCK_V)
        z, _ = logits(
            acc, b_ptr, inv_temperature_ptr, t, v, T, V, inv_temperature, softcap,
            HAS_BIAS, HAS_SOFTCAP, ROW_TEMPERATURE,
        )  # fmt: skip
        t_mask = t < T
        y = tl.load(y_ptr + t, mask=t_mask, other=-1) - v_first
        here = (y >= 0) & (y < BLOCK_V) & (y < V - v_first)
        if tl.max(here.to(tl.int32), axis=0) > 0:
            hit = (tl.arange(0, BLOCK_V)[None, :] == y[:, None]) & here[:, None]
            tl.store(target_ptr + t, tl.sum(tl.where(hit, z, 0.0), axis=1), mask=here)
        if v_first + BLOCK_V > V:
            z = tl.where((v < V)[None, :], z, ABSENT)
        if HAS_BIAS:
            z = tl.where(z < ABSENT, ABSENT, z)  # a comparison, not tl.maximum, which drops a NaN
        m = tl.maximum(tl.max(z, axis=1), ROW_FLOOR)
        wide = tl.full((), 1, tl.int64)
        part = part_ptr + (wide * (v_first // BLOCK_V) * stride_part_s + t * FIELDS)
        if ARGMAX:
            index = tl.min(tl.where(z == m[:, None], v[None, :], V), axis=1)
            tl.store(part + 6, index.to(tl.float32), mask=t_mask)
        u = z - m[:, None]
        e = tl.exp(u)
        tl.store(part, m, mask=t_mask)
        tl.store(part + 1, tl.sum(e, axis=1), mask=t_mask)
        if STORE:
            if TMA:
                e_ptr.store([t_first, v_first], e.to(e_ptr.dtype))
            else:
                # Offsets inside a tile fit in 32 bits; 64 for each element would take all registers twice.
                e_ptrs = e_ptr + wide * t_first * stride_e_t + v_first
                e_ptrs += tl.arange(0, BLOCK_T)[:, None] * stride_e_t + tl.arange(0, BLOCK_V)[None, :]
                tl.store(e_ptrs, e.to(e_ptr.dtype.element_ty), mask=(t < stored_rows)[:, None] & (v < V)[None, :])
            tl.store(shift_ptr + wide * t * stride_shift_t + v_first // BLOCK_V, m, mask=t < stored_rows)
        ue = u * e
        if VARENTROPY:
            tl.store(part + 5, tl.sum(u * ue, axis=1), mask=t_mask)
        tl.store(part + 2, tl.sum(ue, axis=1), mask=t_mask)
        if COLLISION:
            tl.store(part + 4, tl.sum(ue * e, axis=1), mask=t_mask)
            tl.store(part + 3, tl.sum(e * e, axis=1), mask=t_mask)


@triton.jit
def merge_kernel(
    # pointers
    part_ptr, sums_ptr,
    # sizes
    T, tiles,
    # strides
    stride_part_s, stride_sums_k,
    # constants
    COLLISION: tl.constexpr, VARENTROPY: tl.constexpr, ARGMAX: tl.constexpr,
    FIELDS: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """K2: the sums of a block of rows over the whole vocabulary, merged tile by tile in a fixed order."""
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    t_mask = t < T
    zero = tl.zeros((BLOCK_T,), dtype=tl.float32)
    m, s0, s1, q0, q1, s2, index = zero + ROW_FLOOR, zero, zero, zero, zero, zero, zero
    part = part_ptr + t.to(tl.int64) * FIELDS
    for _ in range(0, tiles):
        part_m = tl.load(part, mask=t_mask, other=ROW_FLOOR)
        part_s0 = tl.load(part + 1, mask=t_mask, other=0.0)
        part_s1 = tl.load(part + 2, mask=t_mask, other=0.0)
        m_new = tl.maximum(m, part_m)
        d, part_d = m - m_new, part_m - m_new
        scale, part_scale = tl.exp(d), tl.exp(part_d)
        if ARGMAX:
            index = tl.where(part_m > m, tl.load(part + 6, mask=t_mask, other=0.0), index)
        if VARENTROPY:
            part_s2 = tl.load(part + 5, mask=t_mask, other=0.0)
            # d is clamped where it is squared, far below where its exponential is 0.
            s2 = scale * (s2 + d * (2.0 * s1 + tl.maximum(d, U_MIN) * s0)) + part_scale * (
                part_s2 + part_d * (2.0 * part_s1 + tl.maximum(part_d, U_MIN) * part_s0)
            )
        if COLLISION:
            part_q0 = tl.load(part + 3, mask=t_mask, other=0.0)
            part_q1 = tl.load(part + 4, mask=t_mask, other=0.0)
            q1 = scale * scale * (q1 + d * q0) + part_scale * part_scale * (part_q1 + part_d * part_q0)
            q0 = scale * scale * q0 + part_scale * part_scale * part_q0
        s1 = scale * (s1 + d * s0) + part_scale * (part_s1 + part_d * part_s0)
        s0 = scale * s0 + part_scale * part_s0
        m = m_new
        part += stride_part_s
    sums, field = sums_ptr + t, tl.full((), 1, tl.int64) * stride_sums_k
    tl.store(sums, m, mask=t_mask)
    tl.store(sums + 2 * field, s0, mask=t_mask)
    tl.store(sums + 3 * field, s1, mask=t_mask)
    if COLLISION:
        tl.store(sums + 4 * field, q0, mask=t_mask)
        tl.store(sums + 5 * field, q1, mask=t_mask)
    if VARENTROPY:
        tl.store(sums + 6 * field, s2, mask=t_mask)
    if ARGMAX:
        tl.store(sums + 7 * field, index, mask=t_mask)
