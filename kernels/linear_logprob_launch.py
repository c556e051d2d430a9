"""How large a tile each chip computes at a time, and how the kernels of the head are started.

A row's sums depend on the tile's width alone, and the width on chip and dtype alone: that is what makes them
independent of the batch. The tiles are those that compile without a register spill, without serialised wgmma and
within the chip's shared memory; `tests/kernels/test_aot.py` compiles every line of the tables with the launchers' own
arguments.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from entrocraft.kernels.head import Head


class Tile(NamedTuple):
    """Shape of a tile and resources of a program; `tma`: operands come through tensor descriptors (sm_90 and later)."""

    BLOCK_T: int
    BLOCK_V: int
    BLOCK_H: int
    num_warps: int
    num_stages: int
    tma: bool = False
    # One loop over tiles and their steps, so that a tile's operands are loaded while the last one's epilogue runs.
    flatten: bool = False


# Products of 16-bit operands. 128 x 256 halves the operand traffic of 128 x 128, and takes all registers.
FORWARD_TILES = {
    80: Tile(128, 128, 32, 8, 4),
    90: Tile(128, 256, 64, 8, 3, tma=True),
    100: Tile(128, 256, 64, 8, 3, tma=True),
}
BACKWARD_TILES = {
    80: Tile(128, 128, 32, 8, 4),
    90: Tile(128, 256, 64, 8, 3, tma=True),
    100: Tile(128, 256, 64, 8, 3, tma=True),
}
# Products of fp32, or of mixed, operands, on plain cores: exact, and slow. Also where operands have no 16-byte pitch.
PLAIN_TILE = Tile(64, 128, 32, 8, 3)
# The interpreter pays for every operation of a tile, whatever its size.
INTERPRETED_TILE = Tile(64, 128, 64, 8, 3)
# Row blocks that share a block of columns: with BLOCK_T = 128 and H = 4096, 8 MiB of hidden stay in the L2 cache.
GROUP = 8
MERGE_ROWS, MERGE_WARPS = 64, 2
STORED_TILE = (16, 128, 4)  # rows, columns, warps; the columns divide those of every forward tile


@functools.cache
def capability(device_index: int) -> int:
    """The table's line for a GPU: the newest that it is no older than."""
    major, minor = torch.cuda.get_device_capability(device_index)
    return max((line for line in FORWARD_TILES if line <= 10 * major + minor), default=80)


def sixteen_bit(head: Head) -> bool:
    """Both operands of one 16-bit dtype: what tensor cores multiply exactly into fp32."""
    return head.hidden_TH.dtype == head.weight_VH.dtype and head.hidden_TH.element_size() == 2


def tile_of(head: Head, tiles: dict[int, Tile], *, interpreted: bool) -> Tile:
    """The tile for a head, from its dtypes, its device and the alignment of its weight."""
    if interpreted:
        return INTERPRETED_TILE._replace(tma=sixteen_bit(head) and describable(head.weight_VH))
    if not sixteen_bit(head):
        return PLAIN_TILE
    return tiles[capability(head.hidden_TH.device.index)]


def describable(matrix: Tensor) -> bool:
    """Whether a tensor descriptor can hold a matrix: rows of unit stride, 16-byte pitch and base, at least one
    element."""
    pitch = matrix.stride(0) * matrix.element_size()
    dense = matrix.stride(1) == 1 and pitch >= matrix.shape[1] * matrix.element_size()
    return dense and pitch % 16 == 0 and matrix.data_ptr() % 16 == 0 and matrix.numel() > 0


def upcast(head: Head) -> bool:
    """Operands go to the product as fp32: two dtypes; or bf16 in the interpreter, which multiplies its raw bits."""
    interpreted = triton.knobs.runtime.interpret and head.hidden_TH.dtype == torch.bfloat16
    return head.hidden_TH.dtype != head.weight_VH.dtype or interpreted


def operands(head: Head, tile: Tile) -> tuple[Any, Any, bool]:
    """Hidden and weight as the kernel takes them, and whether those are descriptors; the arithmetic is the same."""
    matrices = head.hidden_TH, head.weight_VH
    if not tile.tma or upcast(head) or not all(describable(matrix) for matrix in matrices):
        return *matrices, False
    rows = tile.BLOCK_T, tile.BLOCK_V
    x, w = (TensorDescriptor.from_tensor(m, [n, tile.BLOCK_H]) for m, n in zip(matrices, rows, strict=True))
    return x, w, True


def product_constants(head: Head, tile: Tile, *, tma: bool) -> dict[str, Any]:
    """The constants that every kernel with a product takes."""
    return {
        "TMA": tma,
        "UPCAST": upcast(head),
        "EVEN_H": head.H % tile.BLOCK_H == 0,
        "GROUP": GROUP,
        "BLOCK_T": tile.BLOCK_T,
        "BLOCK_V": tile.BLOCK_V,
        "BLOCK_H": tile.BLOCK_H,
    } | compile_options(tile)


def compile_options(tile: Tile) -> dict[str, Any]:
    """Of a launch, or of a compilation. Fused multiply-add is asked for: Triton means to drop it as the default."""
    options: dict[str, Any] = {"num_warps": tile.num_warps, "num_stages": tile.num_stages}
    return options if triton.knobs.runtime.interpret else options | {"enable_fp_fusion": True}


def logits_constants(head: Head) -> dict[str, Any]:
    """What happens to a product before it is a logit."""
    return {
        "inv_temperature": 1.0 if isinstance(head.inv_temperature, Tensor) else head.inv_temperature,
        "softcap": head.options.softcap or 1.0,
        "HAS_SOFTCAP": head.options.softcap is not None,
        "ROW_TEMPERATURE": isinstance(head.inv_temperature, Tensor),
    }


def programs(device: torch.device, tiles: int) -> int:
    """Persistent programs: one a multiprocessor."""
    if device.type != "cuda":
        return 1
    return min(tiles, torch.cuda.get_device_properties(device).multi_processor_count)
