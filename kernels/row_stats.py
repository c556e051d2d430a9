"""The row algebra of a softmax: five sums a row that are enough, how they merge, and the gradient they give.

For one row of logits z (after softcap and temperature), maximum M and u = z - M:

    s0 = sum e^u      s1 = sum u e^u      q0 = sum e^2u      q1 = sum u e^2u

Then, with L = log s0 and log p = u - L:

    lse = M + L       log p_y = u_y - L       H = -sum p log p = L - s1 / s0
    sum p^2 = q0 / s0^2                       sum p^2 log p = (q1 - L q0) / s0^2

The sums are centred on M. Uncentred ones (sum z e^z) cancel: at |z| = 30 they cost 4e-6 nats in fp32. Since u <= 0
and s0 >= 1, both terms of H and both of -log p are non-negative in floating point too: no clamp is needed.

Two parts of a row merge by moving the sums to the common maximum M' = max(M_a, M_b), d = M - M' <= 0:

    s1' = e^d (s1 + d s0)    s0' = e^d s0    q1' = e^2d (q1 + d q0)    q0' = e^2d q0

Gradient with respect to z, for upstream gradients g_y (log p_y), g_H (H), g_L (lse):

    dz_i = g_y (1[i=y] - p_i) - g_H p_i (log p_i + H) + g_L p_i
         = g_y 1[i=y] - e^u_i (slope u_i + offset),  slope = g_H / s0,  offset = (g_y - g_L + g_H (H - L)) / s0

so two coefficients a row are enough, and one exponential an element. Entropy part: dH/dz_i = -p_i (log p_i + H), the
"entropy discriminator" of arXiv 2604.26326, appendix B, in closed form.

A logit of -inf has p = 0 and must give p log p = 0 and no gradient. u is therefore clamped at U_MIN, where e^u is
exactly 0 in fp32 and fp64 and u e^u is 0 instead of NaN. A NaN logit stays NaN throughout.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

# exp(-1e4) is 0 in fp64 as well; small enough a number that coefficient * U_MIN stays finite.
U_MIN = -1.0e4
# A part of a row in which every logit is -inf gets this finite maximum: merging scales it by exp(-1e30) = 0.
MAX_FLOOR = -1.0e30

# Rows of the sums tensor [K, T]; K = 4, or 6 with the collision sums.
MAX, TARGET, S0, S1, Q0, Q1 = range(6)


class RowValues(NamedTuple):
    """The finished values of T rows; `shift_T` + `log_s0_T` = lse_T, kept apart because the gradient needs both."""

    logprob_T: Tensor
    entropy_T: Tensor
    lse_T: Tensor
    p2_T: Tensor | None
    p2logp_T: Tensor | None
    shift_T: Tensor
    log_s0_T: Tensor


class RowCoefficients(NamedTuple):
    """dz_i = target 1[i=y] - e^(z_i - shift) (slope (z_i - shift) + offset); None means zero for every row."""

    shift_T: Tensor
    offset_T: Tensor
    slope_T: Tensor | None
    target_T: Tensor | None
    active_T: Tensor
    """bool: rows that have a gradient at all; the others are not computed."""

    def pick(self, rows: Tensor | slice) -> RowCoefficients:
        """The coefficients of some rows."""
        return RowCoefficients(
            self.shift_T[rows],
            self.offset_T[rows],
            None if self.slope_T is None else self.slope_T[rows],
            None if self.target_T is None else self.target_T[rows],
            self.active_T[rows],
        )


def neutral_sums(T: int, *, collision: bool, like: Tensor, dtype: torch.dtype) -> Tensor:
    """Sums [K, T] that finish as 0 in every field: what an ignored row holds."""
    sums_KT = like.new_zeros((6 if collision else 4, T), dtype=dtype)
    sums_KT[S0] = 1.0
    return sums_KT


def tile_sums(logit_TV: Tensor, scratch_TV: Tensor, target_T: Tensor, *, collision: bool) -> Tensor:
    """Sums [K, T] of a tile of logits; both arguments are overwritten. `target_T` counts from the tile's first column.

    A target outside the tile leaves NaN in TARGET, which merging replaces by the tile that has it.
    """
    inside_T = (target_T >= 0) & (target_T < logit_TV.shape[1])
    picked_T = logit_TV.gather(1, torch.where(inside_T, target_T, 0)[:, None])[:, 0]
    max_T = logit_TV.amax(1).clamp_min_(MAX_FLOOR)
    u_TV = logit_TV.sub_(max_T[:, None]).clamp_min_(U_MIN)
    e_TV = torch.exp(u_TV, out=scratch_TV)
    sums = [max_T, torch.where(inside_T, picked_T, torch.nan), e_TV.sum(1)]
    ue_TV = u_TV.mul_(e_TV)
    sums.append(ue_TV.sum(1))
    if collision:
        sums += [_rowwise_dot(e_TV, e_TV), _rowwise_dot(ue_TV, e_TV)]
    return torch.stack(sums)


def _rowwise_dot(left_TV: Tensor, right_TV: Tensor) -> Tensor:
    return torch.linalg.vecdot(left_TV, right_TV)


def merge_sums(left_KT: Tensor, right_KT: Tensor) -> Tensor:
    """Sums [K, T] of two disjoint parts of the same rows."""
    max_T = torch.maximum(left_KT[MAX], right_KT[MAX])
    merged_KT = torch.zeros_like(left_KT)
    for part_KT in (left_KT, right_KT):
        d_T = part_KT[MAX] - max_T
        scale_T = d_T.exp()
        # d * 0 stays 0: every sum is finite and d >= -2e30 is.
        merged_KT[S0] += scale_T * part_KT[S0]
        merged_KT[S1] += scale_T * (part_KT[S1] + d_T * part_KT[S0])
        if part_KT.shape[0] > Q0:
            merged_KT[Q0] += scale_T * scale_T * part_KT[Q0]
            merged_KT[Q1] += scale_T * scale_T * (part_KT[Q1] + d_T * part_KT[Q0])
    merged_KT[MAX] = max_T
    merged_KT[TARGET] = torch.where(left_KT[TARGET].isnan(), right_KT[TARGET], left_KT[TARGET])
    return merged_KT


def finish(sums_KT: Tensor) -> RowValues:
    """The values of T rows from their complete sums."""
    shift_T, s0_T = sums_KT[MAX], sums_KT[S0]
    log_s0_T = s0_T.log()
    p2_T = p2logp_T = None
    if sums_KT.shape[0] > Q0:
        q0_T, q1_T = sums_KT[Q0], sums_KT[Q1]
        p2_T = q0_T / (s0_T * s0_T)
        p2logp_T = (q1_T - log_s0_T * q0_T) / (s0_T * s0_T)
    return RowValues(
        # Centred before subtracting: z_y - lse would round at the size of the logits.
        logprob_T=(sums_KT[TARGET] - shift_T) - log_s0_T,
        entropy_T=log_s0_T - sums_KT[S1] / s0_T,
        lse_T=shift_T + log_s0_T,
        p2_T=p2_T,
        p2logp_T=p2logp_T,
        shift_T=shift_T,
        log_s0_T=log_s0_T,
    )


def row_coefficients(
    grad_logprob_T: Tensor | None,
    grad_entropy_T: Tensor | None,
    grad_lse_T: Tensor | None,
    *,
    shift_T: Tensor,
    log_s0_T: Tensor,
    entropy_T: Tensor,
    inv_temperature: float | Tensor,
    valid_T: Tensor,
) -> RowCoefficients:
    """The coefficients of dz, already times 1 / temperature, so that dz is the gradient before temperature.

    A gradient that is None was not asked for. `valid_T` is False where the target is `ignore_index`.
    """
    active_T = torch.zeros_like(valid_T)
    for grad_T in (grad_logprob_T, grad_entropy_T, grad_lse_T):
        if grad_T is not None:
            active_T |= grad_T != 0  # NaN != 0: a NaN gradient is computed, and seen
    offset_T = torch.zeros_like(shift_T)
    slope_T = target_T = None
    scale_T = (-log_s0_T).exp() * inv_temperature
    if grad_logprob_T is not None:
        target_T = grad_logprob_T * inv_temperature
        offset_T += grad_logprob_T
    if grad_lse_T is not None:
        offset_T -= grad_lse_T
    if grad_entropy_T is not None:
        slope_T = grad_entropy_T * scale_T
        offset_T += grad_entropy_T * (entropy_T - log_s0_T)
    return RowCoefficients(shift_T, offset_T * scale_T, slope_T, target_T, active_T & valid_T)


def tile_gradient(logit_TV: Tensor, scratch_TV: Tensor, target_T: Tensor, rows: RowCoefficients) -> Tensor:
    """dz of a tile of logits (after temperature), in the memory of one of the two arguments; both are overwritten."""
    u_TV = logit_TV.sub_(rows.shift_T[:, None]).clamp_min_(U_MIN)
    if rows.slope_T is None:
        dz_TV = u_TV.exp_().mul_(-rows.offset_T[:, None])
    else:
        e_TV = torch.exp(u_TV, out=scratch_TV)
        dz_TV = u_TV.mul_(-rows.slope_T[:, None]).sub_(rows.offset_T[:, None]).mul_(e_TV)
    if rows.target_T is not None:
        inside_T = (target_T >= 0) & (target_T < logit_TV.shape[1])
        dz_TV.scatter_add_(
            1, torch.where(inside_T, target_T, 0)[:, None], torch.where(inside_T, rows.target_T, 0.0)[:, None]
        )
    return dz_TV
