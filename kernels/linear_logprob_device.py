"""The device code of `linear_logprob_triton.py`: four kernels over tiles of the logits, which stay in registers.

The mathematics is that of `row_stats.py`. A tile of logits is one matrix product with an epilogue: `stats_kernel`
(K1) reduces it to a few sums a row, `dlogits_kernel` (K3) turns it into logit gradients. `merge_kernel` (K2) folds
the sums of the tiles, `stored_dlogits_kernel` makes logit gradients from stored exponentials without a product.

What keeps the tensor cores busy, compiled for sm_80, sm_90 and sm_100 and held by `tests/kernels/test_aot.py`:
- No branch touches the accumulator. It is scaled first, once and for all; branches read and write what follows. A
  branch on the accumulator makes the compiler wait for every wgmma (ptxas C7514).
- The loop over H is known to run (`tl.assume`): otherwise there is a second copy of the epilogue for H = 0.
- Masks are finite: -inf would meet u e^u as inf * 0. Rows and columns past the end are read from the first row or as
  zeros, and masked in the epilogue, of columns only in the last tile.
- Offsets of rows and columns are 64 bits wide where a stride multiplies them, and are added up once a tile.

Triton has no signature that a type checker could hold a call against.
"""

# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false, reportIndexIssue=false

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
def _place(tile, T, V, GROUP: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_V: tl.constexpr):
    """First row and column of a tile. GROUP row blocks share a column block, so that both stay in the L2 cache."""
    row_blocks = tl.cdiv(T, BLOCK_T)
    in_group = GROUP * tl.cdiv(V, BLOCK_V)
    first = tile // in_group * GROUP
    height = tl.minimum(row_blocks - first, GROUP)
    return (first + tile % in_group % height) * BLOCK_T, tile % in_group // height * BLOCK_V


@triton.jit
def _product(
    # operands: pointers, or tensor descriptors
    x, w,
    # sizes
    t_first, v_first, T, V, H,
    # strides
    stride_x_t, stride_x_h, stride_w_v, stride_w_h,
    # constants
    TMA: tl.constexpr, UPCAST: tl.constexpr, EVEN_H: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """hidden @ weight^T of a tile, [BLOCK_T, BLOCK_V] in fp32."""
    acc = tl.zeros((BLOCK_T, BLOCK_V), dtype=tl.float32)
    steps = tl.cdiv(H, BLOCK_H)
    tl.assume(steps > 0)
    if TMA:
        for k in range(0, steps):
            a = x.load([t_first, k * BLOCK_H])
            b = w.load([v_first, k * BLOCK_H])
            acc = tl.dot(a, b.T, acc)
    else:
        t = t_first + tl.arange(0, BLOCK_T)
        v = v_first + tl.arange(0, BLOCK_V)
        h = tl.arange(0, BLOCK_H)
        step = tl.full((), BLOCK_H, tl.int64)  # a stride of 1 arrives as a constant, which has no type to convert
        x_ptrs = x + tl.where(t < T, t, 0).to(tl.int64)[:, None] * stride_x_t + h.to(tl.int64)[None, :] * stride_x_h
        w_ptrs = w + tl.where(v < V, v, 0).to(tl.int64)[None, :] * stride_w_v + h.to(tl.int64)[:, None] * stride_w_h
        for k in range(0, steps):
            if EVEN_H:
                a = tl.load(x_ptrs)
                b = tl.load(w_ptrs)
            else:
                a = tl.load(x_ptrs, mask=(h < H - k * BLOCK_H)[None, :], other=0.0)
                b = tl.load(w_ptrs, mask=(h < H - k * BLOCK_H)[:, None], other=0.0)
            if UPCAST:
                a = a.to(tl.float32)
                b = b.to(tl.float32)
            acc = tl.dot(a, b, acc, input_precision="ieee")
            x_ptrs += step * stride_x_h
            w_ptrs += step * stride_w_h
    return acc


@triton.jit
def _logits(
    acc, b_ptr, inv_temperature_ptr, t, v, T, V, inv_temperature, softcap,
    HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, ROW_TEMPERATURE: tl.constexpr,
):  # fmt: skip
    """z = softcap(acc + bias) / temperature, and tanh of the softcap (or z again)."""
    if HAS_BIAS:
        acc += tl.load(b_ptr + v, mask=v < V, other=0.0).to(tl.float32)[None, :]
    capped = acc
    if HAS_SOFTCAP:
        capped = _tanh(acc / softcap)
        acc = capped * softcap
    if ROW_TEMPERATURE:
        acc *= tl.load(inv_temperature_ptr + t, mask=t < T, other=1.0)[:, None]
    else:
        acc *= inv_temperature
    return acc, capped


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
        t_first, v_first = _place(tile, T, V, GROUP, BLOCK_T, BLOCK_V)
        acc = _product(
            x, w, t_first, v_first, T, V, H, stride_x_t, stride_x_h, stride_w_v, stride_w_h,
            TMA, UPCAST, EVEN_H, BLOCK_T, BLOCK_V, BLOCK_H,
        )  # fmt: skip
        t = t_first + tl.arange(0, BLOCK_T)
        v = v_first + tl.arange(0, BLOCK_V)
        z, _ = _logits(
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
        t_first, v_first = _place(tile, T, V, GROUP, BLOCK_T, BLOCK_V)
        acc = _product(
            x, w, t_first, v_first, T, V, H, stride_x_t, stride_x_h, stride_w_v, stride_w_h,
            TMA, UPCAST, EVEN_H, BLOCK_T, BLOCK_V, BLOCK_H,
        )  # fmt: skip
        t = t_first + tl.arange(0, BLOCK_T)
        v = v_first + tl.arange(0, BLOCK_V)
        t_mask, v_mask = t < T, v < V
        z, capped = _logits(
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
