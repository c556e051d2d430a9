"""The device code of `linear_logprob_triton.py`: three kernels over tiles of the logits, which stay in registers.

The mathematics is that of `row_stats.py`. A stride arrives in 32 bits where it fits: what it is multiplied with is 64
bits wide already (row lists, columns, splits), and it is added to a pointer to reach the fields of the partial sums. An
absent row or column is masked, with a finite value; accumulators are fp32 and are rounded once, at the store of dz.
"""

from __future__ import annotations

import triton
import triton.language as tl

from entrocraft.kernels import row_stats

# Finite stand-ins for -inf, whose arithmetic would give NaN: no row maximum is below ROW_FLOOR, and an absent column is
# so far below it that its exponential is 0.
ROW_FLOOR = tl.constexpr(row_stats.MAX_FLOOR)
ABSENT = tl.constexpr(2 * row_stats.MAX_FLOOR)
U_MIN = tl.constexpr(row_stats.U_MIN)


@triton.jit
def _tanh(a):
    # (1 - e) / (1 + e) cancels near 0, where the odd series is exact to 1e-9 instead.
    size = tl.abs(a)
    e = tl.exp(-2.0 * size)
    far = (1.0 - e) / (1.0 + e)
    s = a * a
    near = size * (
        1.0 + s * (-1.0 / 3 + s * (2.0 / 15 + s * (-17.0 / 315 + s * (62.0 / 2835 - s * (1382.0 / 155925)))))
    )
    size = tl.where(size < 0.25, near, far)
    return tl.where(a < 0, -size, size)


@triton.jit
def _tile(
    # pointers
    x_ptr, w_ptr, b_ptr, inv_temperature_ptr,
    # sizes
    t, v, t_mask, v_mask, H,
    # strides
    stride_x_t, stride_x_h, stride_w_v, stride_w_h,
    # constants
    inv_temperature, softcap,
    HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, ROW_TEMPERATURE: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """Logits z [BLOCK_T, BLOCK_V] in fp32, and tanh of the softcap (or z again)."""
    z = tl.zeros((BLOCK_T, BLOCK_V), dtype=tl.float32)
    for start in range(0, H, BLOCK_H):
        h = start + tl.arange(0, BLOCK_H).to(tl.int64)
        x_offset = t[:, None] * stride_x_t + h[None, :] * stride_x_h
        w_offset = v[None, :] * stride_w_v + h[:, None] * stride_w_h
        x = tl.load(x_ptr + x_offset, mask=t_mask[:, None] & (h < H)[None, :], other=0.0)
        w = tl.load(w_ptr + w_offset, mask=v_mask[None, :] & (h < H)[:, None], other=0.0)
        if UPCAST:
            x = x.to(tl.float32)
            w = w.to(tl.float32)
        z = tl.dot(x, w, z, input_precision="ieee")
    if HAS_BIAS:
        z += tl.load(b_ptr + v, mask=v_mask, other=0.0).to(tl.float32)[None, :]
    capped = z
    if HAS_SOFTCAP:
        capped = _tanh(z / softcap)
        z = capped * softcap
    if ROW_TEMPERATURE:
        z *= tl.load(inv_temperature_ptr + t, mask=t_mask, other=1.0)[:, None]
    else:
        z *= inv_temperature
    return z, capped


@triton.jit
def stats_kernel(
    # pointers
    x_ptr, w_ptr, b_ptr, y_ptr, inv_temperature_ptr, row_ptr, count_ptr, part_ptr, target_ptr,
    # sizes
    V, H,
    # strides
    stride_x_t, stride_x_h, stride_w_v, stride_w_h, stride_part_k, stride_part_s,
    # constants
    inv_temperature, softcap,
    HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, ROW_TEMPERATURE: tl.constexpr, COLLISION: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_H: tl.constexpr, SPLIT_V: tl.constexpr,
):  # fmt: skip
    """Partial sums of a block of listed rows over one vocabulary split, and the target's logit where it is there."""
    count = tl.load(count_ptr)
    i = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    split = tl.program_id(1).to(tl.int64)
    if tl.program_id(0) * BLOCK_T >= count:
        return
    t_mask = i < count
    t = tl.load(row_ptr + i, mask=t_mask, other=0)
    y = tl.load(y_ptr + t, mask=t_mask, other=-1)
    m = tl.full((BLOCK_T,), ROW_FLOOR, dtype=tl.float32)
    s0 = tl.zeros((BLOCK_T,), dtype=tl.float32)
    s1 = tl.zeros((BLOCK_T,), dtype=tl.float32)
    q0 = tl.zeros((BLOCK_T,), dtype=tl.float32)
    q1 = tl.zeros((BLOCK_T,), dtype=tl.float32)
    for start in range(0, SPLIT_V, BLOCK_V):
        v = split * SPLIT_V + start + tl.arange(0, BLOCK_V)
        v_mask = v < V
        z, _ = _tile(
            x_ptr, w_ptr, b_ptr, inv_temperature_ptr,
            t, v, t_mask, v_mask, H,
            stride_x_t, stride_x_h, stride_w_v, stride_w_h,
            inv_temperature, softcap,
            HAS_BIAS, HAS_SOFTCAP, ROW_TEMPERATURE, UPCAST, BLOCK_T, BLOCK_V, BLOCK_H,
        )  # fmt: skip
        hit = (v[None, :] == y[:, None]) & v_mask[None, :]
        found = tl.sum(hit.to(tl.int32), axis=1) > 0
        tl.store(target_ptr + t, tl.sum(tl.where(hit, z, 0.0), axis=1), mask=found & t_mask)
        # Comparisons, not tl.maximum, which drops a NaN.
        z = tl.where(v_mask[None, :], z, ABSENT)
        z = tl.where(z < ABSENT, ABSENT, z)
        m_new = tl.maximum(m, tl.max(z, axis=1))
        u = z - m_new[:, None]
        e = tl.exp(u)
        ue = u * e
        d = m - m_new
        scale = tl.exp(d)
        s1 = scale * (s1 + d * s0) + tl.sum(ue, axis=1)
        s0 = scale * s0 + tl.sum(e, axis=1)
        if COLLISION:
            q1 = scale * scale * (q1 + d * q0) + tl.sum(ue * e, axis=1)
            q0 = scale * scale * q0 + tl.sum(e * e, axis=1)
        m = m_new
    part = part_ptr + split * stride_part_s + t
    tl.store(part, m, mask=t_mask)
    part += stride_part_k
    tl.store(part, s0, mask=t_mask)
    part += stride_part_k
    tl.store(part, s1, mask=t_mask)
    if COLLISION:
        part += stride_part_k
        tl.store(part, q0, mask=t_mask)
        part += stride_part_k
        tl.store(part, q1, mask=t_mask)


@triton.jit
def merge_kernel(
    # pointers
    part_ptr, row_ptr, count_ptr, max_ptr, s0_ptr, s1_ptr, q0_ptr, q1_ptr,
    # sizes
    SPLITS,
    # strides
    stride_part_k, stride_part_s,
    # constants
    COLLISION: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """The sums of a block of listed rows over the whole vocabulary, merged split by split in a fixed order."""
    i = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    t_mask = i < tl.load(count_ptr)
    t = tl.load(row_ptr + i, mask=t_mask, other=0)
    m = tl.full((BLOCK_T,), ROW_FLOOR, dtype=tl.float32)
    s0 = tl.zeros((BLOCK_T,), dtype=tl.float32)
    s1 = tl.zeros((BLOCK_T,), dtype=tl.float32)
    q0 = tl.zeros((BLOCK_T,), dtype=tl.float32)
    q1 = tl.zeros((BLOCK_T,), dtype=tl.float32)
    part = part_ptr + t
    for _ in range(0, SPLITS):
        field = part
        part_m = tl.load(field, mask=t_mask, other=ROW_FLOOR)
        field += stride_part_k
        part_s0 = tl.load(field, mask=t_mask, other=0.0)
        field += stride_part_k
        part_s1 = tl.load(field, mask=t_mask, other=0.0)
        m_new = tl.maximum(m, part_m)
        d = m - m_new
        part_d = part_m - m_new
        scale = tl.exp(d)
        part_scale = tl.exp(part_d)
        s1 = scale * (s1 + d * s0) + part_scale * (part_s1 + part_d * part_s0)
        s0 = scale * s0 + part_scale * part_s0
        if COLLISION:
            field += stride_part_k
            part_q0 = tl.load(field, mask=t_mask, other=0.0)
            field += stride_part_k
            part_q1 = tl.load(field, mask=t_mask, other=0.0)
            q1 = scale * scale * (q1 + d * q0) + part_scale * part_scale * (part_q1 + part_d * part_q0)
            q0 = scale * scale * q0 + part_scale * part_scale * part_q0
        m = m_new
        part += stride_part_s
    tl.store(max_ptr + t, m, mask=t_mask)
    tl.store(s0_ptr + t, s0, mask=t_mask)
    tl.store(s1_ptr + t, s1, mask=t_mask)
    if COLLISION:
        tl.store(q0_ptr + t, q0, mask=t_mask)
        tl.store(q1_ptr + t, q1, mask=t_mask)


@triton.jit
def dlogits_kernel(
    # pointers
    x_ptr, w_ptr, b_ptr, y_ptr, inv_temperature_ptr, row_ptr, count_ptr,
    shift_ptr, offset_ptr, slope_ptr, target_ptr, dz_ptr,
    # sizes
    V, H,
    # strides
    stride_x_t, stride_x_h, stride_w_v, stride_w_h, stride_dz_t,
    # constants
    v_first, inv_temperature, softcap,
    HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, ROW_TEMPERATURE: tl.constexpr,
    HAS_SLOPE: tl.constexpr, HAS_TARGET: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """Logit gradients of a block of listed rows, for V columns from column v_first of the vocabulary on."""
    count = tl.load(count_ptr)
    i = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    if tl.program_id(0) * BLOCK_T >= count:
        return
    t_mask = i < count
    t = tl.load(row_ptr + i, mask=t_mask, other=0)
    v = tl.program_id(1).to(tl.int64) * BLOCK_V + tl.arange(0, BLOCK_V)
    v_mask = v < V
    z, capped = _tile(  # pyright: ignore[reportGeneralTypeIssues]
        x_ptr, w_ptr, b_ptr, inv_temperature_ptr,
        t, v, t_mask, v_mask, H,
        stride_x_t, stride_x_h, stride_w_v, stride_w_h,
        inv_temperature, softcap,
        HAS_BIAS, HAS_SOFTCAP, ROW_TEMPERATURE, UPCAST, BLOCK_T, BLOCK_V, BLOCK_H,
    )  # fmt: skip
    u = z - tl.load(shift_ptr + t, mask=t_mask, other=0.0)[:, None]
    u = tl.where((u < U_MIN) | ~v_mask[None, :], U_MIN, u)
    factor = tl.load(offset_ptr + t, mask=t_mask, other=0.0)[:, None]
    if HAS_SLOPE:
        factor += tl.load(slope_ptr + t, mask=t_mask, other=0.0)[:, None] * u
    dz = -tl.exp(u) * factor
    if HAS_TARGET:
        y = tl.load(y_ptr + t, mask=t_mask, other=-1)
        target = tl.load(target_ptr + t, mask=t_mask, other=0.0)
        dz += tl.where((v + v_first)[None, :] == y[:, None], target[:, None], 0.0)
    if HAS_SOFTCAP:
        dz *= 1.0 - capped * capped
    mask = t_mask[:, None] & v_mask[None, :]
    tl.store(dz_ptr + t[:, None] * stride_dz_t + v[None, :], dz.to(dz_ptr.dtype.element_ty), mask=mask)
