"""How large a tile each chip computes at a time, and how the kernels of the head are started.

A row's sums depend on the tile's width alone, and the width on chip and dtype alone: that is what makes them
independent of the batch. The tiles are those that compile without a register spill, without serialised wgmma and
within the chip's shared memory; `tests/kernels/test_aot.py` compiles every line of the tables with the launchers' own
arguments.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton import knobs
from triton.tools.tensor_descriptor import TensorDescriptor

from entrocraft.kernels.head import NARROWEST_TILE, Head


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


class Tiles(NamedTuple):
    """The two tiles of a kernel: with the plain epilogue, and with one that needs more registers."""

    plain: Tile
    rich: Tile


# Products of 16-bit operands. 128 x 256 halves the operand traffic of 128 x 128, and takes all registers: the epilogue
# has room for three sums (rich: collision, varentropy, argmax, stored exponentials), for neither bias nor softcap, nor
# for a temperature of each row.
FORWARD_TILES = {
    80: Tiles(Tile(128, 128, 32, 8, 4), Tile(128, 128, 32, 8, 4)),
    90: Tiles(Tile(128, 256, 64, 8, 3, tma=True, flatten=True), Tile(128, 128, 64, 8, 4, tma=True, flatten=True)),
    100: Tiles(Tile(128, 128, 64, 8, 4, tma=True), Tile(128, 64, 64, 4, 4, tma=True)),
    # Consumer Blackwell has a hundred KiB of shared memory and the instructions of Ampere.
    120: Tiles(Tile(128, 128, 32, 8, 4), Tile(128, 128, 32, 8, 4)),
}
BACKWARD_TILES = {
    80: Tiles(Tile(128, 128, 32, 8, 4), Tile(128, 128, 32, 8, 4)),
    90: Tiles(Tile(128, 256, 64, 8, 3, tma=True), Tile(128, 128, 64, 8, 4, tma=True)),
    100: Tiles(Tile(128, 256, 64, 8, 3, tma=True), Tile(128, 128, 64, 8, 4, tma=True)),
    120: Tiles(Tile(128, 128, 32, 8, 4), Tile(128, 128, 32, 8, 4)),
}
# Products of fp32, or of mixed, operands, on plain cores: exact, and slow. Also of operands without a 16-byte pitch.
PLAIN_TILE = Tile(64, 128, 32, 8, 3)
# The interpreter pays for every operation of a tile, whatever its size.
INTERPRETED_TILE = Tile(64, 128, 64, 8, 3)
# Row blocks that share a block of columns: with BLOCK_T = 128 and H = 4096, 8 MiB of hidden stay in the L2 cache.
GROUP = 8
MERGE_ROWS, MERGE_WARPS = 64, 2
STORED_TILE = (16, NARROWEST_TILE, 4)  # rows, columns, warps; the columns divide those of every forward tile


@functools.cache
def capability(device_index: int) -> int:
    """The table's line for a GPU: the newest that it is no older than."""
    major, minor = torch.cuda.get_device_capability(device_index)
    return max((line for line in FORWARD_TILES if line <= 10 * major + minor), default=80)


def sixteen_bit(head: Head) -> bool:
    """Both operands of one 16-bit dtype: what tensor cores multiply exactly into fp32."""
    return head.hidden_TH.dtype == head.weight_VH.dtype and head.hidden_TH.element_size() == 2


def _bent(head: Head) -> bool:
    """Something happens to a logit besides its temperature."""
    return head.bias_V is not None or head.options.softcap is not None


def forward_tile(head: Head, *, store: bool) -> Tile:
    """The tile of K1, from dtypes, device and what is asked for; never from the number of rows."""
    options = head.options
    rich = store or options.collision or options.varentropy or options.argmax
    rich = rich or _bent(head) or isinstance(head.inv_temperature, Tensor)
    return _tile_of(head, FORWARD_TILES, rich=rich)


def backward_tile(head: Head) -> Tile:
    """The tile of K3."""
    return _tile_of(head, BACKWARD_TILES, rich=_bent(head))


def _tile_of(head: Head, tiles: dict[int, Tiles], *, rich: bool) -> Tile:
    fast = sixteen_bit(head) and aligned(head)
    if knobs.runtime.interpret:
        return INTERPRETED_TILE._replace(tma=fast)
    return tiles[capability(head.hidden_TH.device.index)][rich] if fast else PLAIN_TILE


def aligned(head: Head) -> bool:
    """Whether 16-byte copies and descriptors can read the operands: the weight as it is, hidden at least as a copy.

    Decided by the weight and H alone, since hidden has other strides in every batch.
    """
    return describable(head.weight_VH) and head.H * head.weight_VH.element_size() % 16 == 0


def readable(head: Head) -> Head:
    """The head with hidden rows that a descriptor can hold, copied where their strides are odd and the weight's not."""
    if not sixteen_bit(head) or not aligned(head) or describable(head.hidden_TH):
        return head
    return head._replace(hidden_TH=head.hidden_TH.clone(memory_format=torch.contiguous_format))


def describable(matrix: Tensor) -> bool:
    """Whether a tensor descriptor can hold a matrix: rows of unit stride, 16-byte pitch and base, at least one
    element."""
    pitch = matrix.stride(0) * matrix.element_size()
    dense = matrix.stride(1) == 1 and pitch >= matrix.shape[1] * matrix.element_size()
    return dense and pitch % 16 == 0 and matrix.data_ptr() % 16 == 0 and matrix.numel() > 0


def upcast(head: Head) -> bool:
    """Operands go to the product as fp32: two dtypes; or bf16 in the interpreter, which multiplies its raw bits."""
    interpreted = knobs.runtime.interpret and head.hidden_TH.dtype == torch.bfloat16
    return head.hidden_TH.dtype != head.weight_VH.dtype or interpreted


def operands(head: Head, tile: Tile) -> tuple[Any, Any, bool]:
    """Hidden and weight as the kernel takes them, and whether those are descriptors; the arithmetic is the same."""
    if not tile.tma or upcast(head):
        return head.hidden_TH, head.weight_VH, False
    pairs = (head.hidden_TH, tile.BLOCK_T), (head.weight_VH, tile.BLOCK_V)
    x, w = (TensorDescriptor.from_tensor(matrix, [rows, tile.BLOCK_H]) for matrix, rows in pairs)
    return x, w, True


def target_of(matrix: Tensor, columns: int, tile: Tile, *, tma: bool) -> Any:
    """Where a kernel stores a tile: a matrix, or a descriptor that holds its rows and `columns` columns and no more."""
    if not tma:
        return matrix
    shape, strides = [matrix.shape[0], columns], [matrix.stride(0), 1]
    return TensorDescriptor(matrix, shape, strides, [tile.BLOCK_T, tile.BLOCK_V])


def product_constants(head: Head, tile: Tile, *, tma: bool) -> dict[str, Any]:
    """The constants that every kernel with a product takes."""
    return {
        "TMA": tma,
        "UPCAST": upcast(head),
        "EVEN_H": head.H % tile.BLOCK_H == 0,
        "FLATTEN": tile.flatten,
        "GROUP": GROUP,
        "BLOCK_T": tile.BLOCK_T,
        "BLOCK_V": tile.BLOCK_V,
        "BLOCK_H": tile.BLOCK_H,
    } | compile_options(tile.num_warps, tile.num_stages)


def compile_options(num_warps: int, num_stages: int) -> dict[str, Any]:
    """Of a launch, or of a compilation. Fused multiply-add is asked for: Triton means to drop it as the default."""
    options: dict[str, Any] = {"num_warps": num_warps, "num_stages": num_stages}
    return options if knobs.runtime.interpret else options | {"enable_fp_fusion": True}


def logits_constants(head: Head) -> dict[str, Any]:
    """What happens to a product before it is a logit."""
    return {
        "inv_temperature": 1.0 if isinstance(head.inv_temperature, Tensor) else head.inv_temperature,
        "softcap": head.options.softcap or 1.0,
        "HAS_SOFTCAP": head.options.softcap is not None,
        "ROW_TEMPERATURE": isinstance(head.inv_temperature, Tensor),
    }


def programs(head: Head, tile: Tile) -> int:
    """Persistent programs: one a multiprocessor, no more than there are tiles."""
    tiles = math.ceil(head.T / tile.BLOCK_T) * math.ceil(head.V / tile.BLOCK_V)
    if not head.hidden_TH.is_cuda:
        return 1
    return min(tiles, torch.cuda.get_device_properties(head.hidden_TH.device).multi_processor_count)
