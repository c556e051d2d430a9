"""A tile of logits on the device: where it lies, its matrix product, its logits, which stay in registers.

What the kernels of `stats_kernels.py` and `dlogits_kernels.py` share; each adds its epilogue to the product. The
mathematics is that of `row_stats.py`.

What keeps the tensor cores busy, compiled for sm_80, sm_90 and sm_100 and held by `tests/kernels/test_aot.py`:
- No branch touches the accumulator. It is scaled first, once and for all; branches read and write what follows. A
  branch on the accumulator makes the compiler wait for every wgmma (ptxas C7514).
- The loop over H is known to run (`tl.assume`): otherwise there is a second copy of the epilogue for H = 0.
- Masks are finite: -inf would meet u e^u as inf * 0. Rows and columns past the end are read from the first row or as
  zeros, and masked in the epilogue, of columns only in the last tile.
- Offsets of rows and columns are 64 bits wide where a stride multiplies them, and are added up once a tile.
"""

# Triton has no signature that a type checker could hold a call against.
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
def place(tile, T, V, GROUP: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_V: tl.constexpr):
    """First row and column of a tile. GROUP row blocks share a column block, so that both stay in the L2 cache."""
    row_blocks = tl.cdiv(T, BLOCK_T)
    in_group = GROUP * tl.cdiv(V, BLOCK_V)
    first = tile // in_group * GROUP
    height = tl.minimum(row_blocks - first, GROUP)
    return (first + tile % in_group % height) * BLOCK_T, tile % in_group // height * BLOCK_V


@triton.jit
def product(
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
def logits(
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
