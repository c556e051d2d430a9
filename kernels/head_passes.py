"""Forward and backward of the linear head over either path, in every mode; no autograd here.

What both share: rows without a target are packed away before the forward, rows without an upstream gradient before the
backward, so that neither costs anything but the gather of the others. Learning how many there are waits for the device
once a pass. Modes differ in what is kept in between (`plan.py`).
"""

from __future__ import annotations

import importlib.util
import os
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from entrocraft.kernels import linear_logprob_torch
from entrocraft.kernels.head import Exponentials, Head, HeadOptions, Sinks
from entrocraft.kernels.row_stats import RowCoefficients, RowValues, active_rows, finish, neutral_sums, row_coefficients
from entrocraft.kernels.vocab_parallel import Shard, absent_sums, agreed, merged_over, summed_over

# Triton itself decides between compiler and interpreter when it is imported, for good; so does this.
HAS_TRITON = importlib.util.find_spec("triton") is not None
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


class Setting(NamedTuple):
    """The arguments of a call that are not tensors."""

    options: HeadOptions
    ignore_index: int | None
    mode: str
    stored_rows: int
    entropy_gradient: bool
    shard: Shard


class Kept(NamedTuple):
    """What a forward leaves to its backward besides the row values; empty tensors where a mode keeps nothing."""

    value_NV: Tensor
    """Exponentials of the leading rows that have a target."""
    shift_NS: Tensor
    logprob_basis_TH: Tensor
    """d logprob / d hidden, for a frozen head."""
    entropy_basis_TH: Tensor
    """d entropy / d hidden, likewise."""


class Upstream(NamedTuple):
    """Gradients of the loss with respect to the three differentiable fields; None where there is none."""

    logprob_T: Tensor | None
    entropy_T: Tensor | None
    lse_T: Tensor | None


def backend_of(head: Head) -> ModuleType:
    """The module that computes: Triton on CUDA, or anywhere under its interpreter; without it, and for fp64, torch."""
    if HAS_TRITON and (head.hidden_TH.is_cuda or INTERPRETED) and head.dtype == torch.float32:
        from entrocraft.kernels import linear_logprob_triton

        return linear_logprob_triton
    return linear_logprob_torch


def local_head(head: Head, shard: Shard) -> Head:
    """The head of this rank: padding left out, targets counted from its first row."""
    if shard.columns is not None and shard.columns < head.V:
        bias_V = None if head.bias_V is None else head.bias_V[: shard.columns]
        head = head._replace(weight_VH=head.weight_VH[: shard.columns], bias_V=bias_V)
    return head._replace(target_T=head.target_T - shard.vocab_start) if shard.vocab_start else head


def rows_with_target(target_T: Tensor, ignore_index: int | None) -> Tensor | None:
    """The rows that are to be computed; None for all of them."""
    if ignore_index is None:
        return None
    index = (target_T != ignore_index).nonzero()[:, 0]
    return None if len(index) == len(target_T) else index


def sums_of(head: Head, shard: Shard, exponentials: Exponentials | None = None) -> Tensor:
    """Sums [8, T] over the whole vocabulary, every rank's part included."""
    if head.V and head.T:
        sums_KT = backend_of(head).statistics(head, exponentials)
    else:
        sums_KT = absent_sums(neutral_sums(head.T, like=head.hidden_TH, dtype=head.dtype))
    return merged_over(sums_KT, shard)


def add_gradients(
    head: Head, rows: RowCoefficients, sinks: Sinks, shard: Shard, exponentials: Exponentials | None = None
) -> None:
    """Add dX of every rank's columns to the sink of hidden, and the gradients of this rank's weight to the others."""
    if head.V and head.T:
        backend_of(head).gradients(head, rows, sinks, exponentials)
    if sinks.hidden_NH is not None:
        summed_over(sinks.hidden_NH, shard)


def run_forward(head: Head, setting: Setting) -> tuple[RowValues, Kept]:
    """Values of all T rows, and what the backward of this mode will need."""
    index = rows_with_target(head.target_T, setting.ignore_index)
    live = local_head(head.rows(index), setting.shard)
    kept = Kept(*(head.hidden_TH.new_empty(0) for _ in Kept._fields))  # an operator's outputs may not be one tensor
    if setting.mode == "frozen":
        sums_KN, *bases = _frozen_forward(live, setting)
        kept = kept._replace(logprob_basis_TH=bases[0], entropy_basis_TH=bases[1])
        if index is not None:
            wide = [basis.new_zeros(head.hidden_TH.shape).index_copy_(0, index, basis) for basis in bases if len(basis)]
            kept = kept._replace(**dict(zip(("logprob_basis_TH", "entropy_basis_TH"), wide, strict=False)))
    else:
        exponentials = None
        if setting.mode == "cache" and live.V:
            exponentials = Exponentials.empty(live, setting.stored_rows, backend_of(live).tile_columns(live))
            kept = kept._replace(value_NV=exponentials.value_NV, shift_NS=exponentials.shift_NS)
        sums_KN = sums_of(live, setting.shard, _leading(exponentials, live.T))
    if index is not None:
        sums_KN = neutral_sums(head.T, like=sums_KN, dtype=sums_KN.dtype).index_copy_(1, index, sums_KN)
    return finish(sums_KN), kept


def _leading(exponentials: Exponentials | None, T: int) -> Exponentials | None:
    """Room for no more rows than there are."""
    if exponentials is None or T == 0:
        return None
    return exponentials._replace(value_NV=exponentials.value_NV[:T], shift_NS=exponentials.shift_NS[:T])


def run_backward(head: Head, upstream: Upstream, values: RowValues, kept: Kept, setting: Setting, sinks: Sinks) -> None:
    """Put gradients into `sinks`, whose `hidden_NH` has all T rows; see the modes in `plan.py`."""
    valid_T = None if setting.ignore_index is None else head.target_T != setting.ignore_index
    index = active_rows(valid_T, *upstream)
    picked = [None if field is None else field if index is None else field[index] for field in upstream]
    live = local_head(head.rows(index), setting.shard)
    rows = coefficients(live, Upstream(*picked), values if index is None else _picked_values(values, index))
    if setting.mode == "frozen":
        return _frozen_backward(live, Upstream(*picked), rows, kept, setting, sinks, index)
    exponentials = None
    if len(kept.value_NV):
        columns = backend_of(live).tile_columns(live)
        stored = Exponentials(kept.value_NV, kept.shift_NS, columns)
        if index is None:
            exponentials = _leading(stored, live.T)
        else:
            # Exponentials are numbered over the rows that have a target.
            place_T = None if valid_T is None else valid_T.cumsum(0) - 1
            exponentials = stored.pick(index if place_T is None else place_T[index])
    # What the sink holds already must not be summed over the ranks, nor spread over the packed rows.
    if sinks.hidden_NH is None or (index is None and setting.shard.group is None):
        return add_gradients(live, rows, sinks, setting.shard, exponentials)
    packed_NH = sinks.hidden_NH.new_zeros((live.T, head.H))
    add_gradients(live, rows, sinks._replace(hidden_NH=packed_NH), setting.shard, exponentials)
    return _add_rows(sinks.hidden_NH, index, packed_NH)


def _add_rows(total_TH: Tensor, index: Tensor | None, part_NH: Tensor) -> None:
    if index is None:
        total_TH += part_NH
    else:
        total_TH.index_add_(0, index, part_NH)


def _picked_values(values: RowValues, index: Tensor) -> RowValues:
    return RowValues(*(field[index] if len(field) else field for field in values))


def coefficients(head: Head, upstream: Upstream, values: RowValues) -> RowCoefficients:
    """The coefficients of dz of these rows."""
    return row_coefficients(
        *upstream,
        shift_T=values.shift_T,
        log_s0_T=values.log_s0_T,
        entropy_T=values.entropy_T,
        logprob_T=values.logprob_T,
        inv_temperature=head.inv_temperature,
    )


def chunk_rows(head: Head, buffer_bytes: int, *, beside: int = 0) -> int:
    """Rows whose exponentials fit into `buffer_bytes`, with so many bytes beside them a row; at least one."""
    bytes_per_row = Exponentials.bytes_per_row(head, backend_of(head).tile_columns(head)) + beside
    return max(1, buffer_bytes // bytes_per_row)


def _frozen_forward(head: Head, setting: Setting) -> tuple[Tensor, Tensor, Tensor]:
    """Sums, and the derivatives of log-probability and entropy with respect to hidden, chunk by chunk of rows."""
    half = head.options.buffer_bytes // 2
    head = head._replace(options=head.options._replace(buffer_bytes=half))
    shape = head.hidden_TH.shape
    # Not rounded: the exponentials are, and so is the gradient in the end; a third time would show.
    sizes = (shape, shape if setting.entropy_gradient else 0)
    bases = [head.hidden_TH.new_empty(size, dtype=head.dtype) for size in sizes]
    sums_KT = neutral_sums(head.T, like=head.hidden_TH, dtype=head.dtype)
    gradient_bytes = head.H * head.dtype.itemsize  # of a row of hidden, summed before it is kept
    step = chunk_rows(head, half, beside=gradient_bytes) if head.V else max(1, head.T)
    step = agreed(step, setting.shard, head.hidden_TH.device)
    room = Exponentials.empty(head, min(step, head.T), backend_of(head).tile_columns(head)) if head.V else None
    for start in range(0, head.T, step):
        t = slice(start, min(start + step, head.T))
        chunk, exponentials = head.rows(t), _leading(room, min(step, head.T - start))
        sums_KT[:, t] = sums_of(chunk, setting.shard, exponentials)
        values = finish(sums_KT[:, t])
        one_N = torch.ones_like(values.logprob_T)
        for basis_TH, upstream in zip(bases, (Upstream(one_N, None, None), Upstream(None, one_N, None)), strict=True):
            if len(basis_TH):
                total_NH = one_N.new_zeros((len(one_N), head.H))
                rows = coefficients(chunk, upstream, values)
                add_gradients(chunk, rows, Sinks(total_NH, None, None), setting.shard, exponentials)
                basis_TH[t] = total_NH
    return sums_KT, bases[0], bases[1]


def _frozen_backward(
    head: Head,
    upstream: Upstream,
    rows: RowCoefficients,
    kept: Kept,
    setting: Setting,
    sinks: Sinks,
    index: Tensor | None,
) -> None:
    """dX from the two derivatives that the forward kept; lse = z_y - logprob has z_y's besides."""
    assert sinks.hidden_NH is not None, "a frozen head has the gradient of hidden alone"
    logprob_T, entropy_T, lse_T = upstream
    out_NH = sinks.hidden_NH.new_zeros((head.T, head.H))
    towards_T = logprob_T if lse_T is None else -lse_T if logprob_T is None else logprob_T - lse_T
    for grad_T, basis_TH in ((towards_T, kept.logprob_basis_TH), (entropy_T, kept.entropy_basis_TH)):
        if grad_T is not None:
            basis_NH = basis_TH if index is None else basis_TH[index]
            out_NH.addcmul_(basis_NH.to(out_NH.dtype), grad_T[:, None].to(out_NH.dtype))
    if lse_T is not None:
        out_NH += summed_over(_target_gradient(head, lse_T, rows), setting.shard)
    _add_rows(sinks.hidden_NH, index, out_NH)


def _target_gradient(head: Head, grad_T: Tensor, rows: RowCoefficients) -> Tensor:
    """grad_T * d z_y / d hidden, [T, H]; zeros where the target is on another rank."""
    if not head.V:  # a rank without columns still takes part in the sum that follows
        return grad_T.new_zeros((head.T, head.H), dtype=head.dtype)
    inside_T = (head.target_T >= 0) & (head.target_T < head.V)
    scale_T = torch.where(inside_T, grad_T, 0.0) * head.inv_temperature
    if head.options.softcap is not None:
        tanh_T = (rows.u_T + rows.shift_T) / (head.options.softcap * head.inv_temperature)
        scale_T = scale_T * (1.0 - tanh_T * tanh_T)
    picked_NH = head.weight_VH[torch.where(inside_T, head.target_T, 0)].to(head.dtype)
    return picked_NH.mul_(scale_T[:, None].to(head.dtype))
