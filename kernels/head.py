"""What the two paths of the linear head are given, and where they put what they make.

The operation decides which rows are computed: rows without a target never reach the forward, rows without an upstream
gradient never reach the backward. A path therefore sees dense operands, every row of which is live.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from entrocraft.kernels.arguments import compute_dtype

# Columns of the narrowest tile whose exponentials any backend stores with one shift.
NARROWEST_TILE = 64
BUFFER_BYTES = 256 << 20
# Row pitch of stored exponentials: what a bulk copy or a library product asks of an operand.
PITCH_BYTES = 16


class HeadOptions(NamedTuple):
    """The arguments of a head that are not tensors."""

    softcap: float | None = None
    collision: bool = False
    varentropy: bool = False
    argmax: bool = False
    buffer_bytes: int = BUFFER_BYTES
    batch_invariant: bool = False


class Head(NamedTuple):
    """One linear head and the rows it is applied to: z = softcap(hidden @ weight^T + bias) * inv_temperature."""

    hidden_TH: Tensor
    weight_VH: Tensor
    bias_V: Tensor | None
    target_T: Tensor
    """int64 rows of this weight; a target outside [0, V) is answered by no column, and its logit is NaN."""
    inv_temperature: float | Tensor
    options: HeadOptions = HeadOptions()

    @property
    def T(self) -> int:
        """Rows."""
        return self.hidden_TH.shape[0]

    @property
    def V(self) -> int:
        """Columns of z."""
        return self.weight_VH.shape[0]

    @property
    def H(self) -> int:
        """Hidden size."""
        return self.weight_VH.shape[1]

    @property
    def dtype(self) -> torch.dtype:
        """What sums and coefficients are kept in: fp32, or fp64 when an operand is fp64."""
        return compute_dtype(self.hidden_TH, self.weight_VH)

    def rows(self, index: slice | Tensor | None) -> Head:
        """The same head on some of the rows; None is all of them."""
        if index is None:
            return self
        inv = self.inv_temperature
        return self._replace(
            hidden_TH=self.hidden_TH[index],
            target_T=self.target_T[index],
            inv_temperature=inv[index] if isinstance(inv, Tensor) else inv,
        )


class Exponentials(NamedTuple):
    """e^(z - shift) of the leading rows of a head, with one shift for each row and tile of `columns` columns.

    The rounding of a bf16 exponential is relative, like that of the bf16 logit gradient made from it: what is lost is
    what the store of that gradient loses anyway. It needs no knowledge of the row's maximum, which is not known yet.
    """

    value_NV: Tensor
    """[N, >= V], bf16 for 16-bit operands, else the compute dtype."""
    shift_NS: Tensor
    """[N, ceil(V / columns)] in the compute dtype: the maximum of the row in that tile, never below MAX_FLOOR."""
    columns: int
    row_N: Tensor | None = None
    """int64: row i of the head is row row_N[i] here; None where they are the same."""

    @staticmethod
    def dtype(head: Head) -> torch.dtype:
        """bf16 has the exponent range of fp32: no exponential that matters underflows, as in fp16 it would."""
        sixteen_bit = head.hidden_TH.element_size() == 2 and head.weight_VH.element_size() == 2
        return torch.bfloat16 if sixteen_bit else head.dtype

    @staticmethod
    def bytes_per_row(head: Head, columns: int) -> int:
        """Bytes one row of a head needs here."""
        element = Exponentials.dtype(head).itemsize
        pitch = math.ceil(head.V * element / PITCH_BYTES) * PITCH_BYTES
        return pitch + math.ceil(head.V / columns) * head.dtype.itemsize

    @staticmethod
    def empty(head: Head, rows: int, columns: int) -> Exponentials:
        """Room for the leading `rows` rows."""
        dtype = Exponentials.dtype(head)
        elements = PITCH_BYTES // dtype.itemsize
        pitch = math.ceil(head.V / elements) * elements
        return Exponentials(
            head.hidden_TH.new_empty((rows, pitch), dtype=dtype),
            head.hidden_TH.new_empty((rows, math.ceil(head.V / columns)), dtype=head.dtype),
            columns,
        )

    @property
    def rows(self) -> int:
        """How many of the head's leading rows are covered."""
        return self.value_NV.shape[0] if self.row_N is None else self.row_N.shape[0]

    def pick(self, index: Tensor | None) -> Exponentials:
        """For a head of the rows `index` (ascending) alone; waits for the device, to know how many are covered."""
        if index is None:
            return self
        return self._replace(row_N=index[index < self.value_NV.shape[0]])


class Sinks(NamedTuple):
    """Where a backward puts its gradients; None where one is not needed."""

    hidden_NH: Tensor | None
    """[N, H] in the compute dtype, added to."""
    weight_VH: Tensor | None
    """[V, H]. accumulate: in the compute dtype, added to. Otherwise of any dtype, written once, rounded once."""
    bias_V: Tensor | None
    """[V], by the same rule."""
    accumulate: bool = False
