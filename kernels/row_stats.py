"""The row algebra of a softmax: the few sums a row that are enough, how they merge, and the gradient they give.

For one row of logits z (after softcap and temperature), maximum M and u = z - M:

    s0 = sum e^u      s1 = sum u e^u      q0 = sum e^2u      q1 = sum u e^2u      s2 = sum u^2 e^u

Then, with L = log s0 and log p = u - L:

    lse = M + L       log p_y = u_y - L       H = -sum p log p = L - s1 / s0
    sum p^2 = q0 / s0^2                       sum p^2 log p = (q1 - L q0) / s0^2
    varentropy = sum p (log p + H)^2 = s2 / s0 - (s1 / s0)^2

The sums are centred on M. Uncentred ones (sum z e^z) cancel: at |z| = 30 they cost 4e-6 nats in fp32. Since u <= 0
and s0 >= 1, both terms of H and both of -log p are non-negative in floating point too: no clamp is needed.

Two parts of a row merge by moving the sums to the common maximum M' = max(M_a, M_b), d = M - M' <= 0:

    s0' = e^d s0      s1' = e^d (s1 + d s0)      s2' = e^d (s2 + 2 d s1 + d^2 s0)
    q0' = e^2d q0     q1' = e^2d (q1 + d q0)

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

from entrocraft.kernels.token_stats import TokenStats

# exp(-1e4) is 0 in fp64 as well; small enough a number that coefficient * U_MIN stays finite.
U_MIN = -1.0e4
# A part of a row in which every logit is -inf gets this finite maximum: merging scales it by exp(-1e30) = 0.
MAX_FLOOR = -1.0e30

# MKL prepares a vector function at its first call, and not safely: where several threads make that call at once, one of
# them may round otherwise than ever after (seen in 8 of 60 fresh processes). One element is one thread's call, so that
# the first tile of a process, and with it a resumed run, has the bits of every later one (0 of 60).
for _dtype in (torch.float32, torch.float64):
    torch.exp(torch.ones(1, dtype=_dtype, device="cpu"))
    torch.log(torch.ones(1, dtype=_dtype, device="cpu"))

# Rows of the sums tensor [8, T]. Q0 and Q1, S2, ARGMAX stay 0 where they were not asked for. ARGMAX is the column of
# the maximum, the first of several, as a floating point number: exact below 2^24 columns.
MAX, TARGET, S0, S1, Q0, Q1, S2, ARGMAX = SUMS = range(8)


class RowValues(NamedTuple):
    """The finished values of T rows; `shift_T` + `log_s0_T` = lse_T, kept apart because the gradient needs both.

    Values whose sums were not asked for are meaningless.
    """

    logprob_T: Tensor
    entropy_T: Tensor
    lse_T: Tensor
    p2_T: Tensor
    p2logp_T: Tensor
    varentropy_T: Tensor
    argmax_T: Tensor
    shift_T: Tensor
    log_s0_T: Tensor


class RowCoefficients(NamedTuple):
    """dz_i = target 1[i=y] - e^(z_i - shift) (slope (z_i - shift) + offset); None means zero for every row."""

    shift_T: Tensor
    offset_T: Tensor
    slope_T: Tensor | None
    target_T: Tensor | None
    u_T: Tensor
    """z_y - shift: what the target's own column needs where the logits are known only by rounded exponentials."""

    def pick(self, rows: Tensor | slice | None) -> RowCoefficients:
        """The coefficients of some rows; None is all of them."""
        if rows is None:
            return self
        return RowCoefficients(
            self.shift_T[rows],
            self.offset_T[rows],
            None if self.slope_T is None else self.slope_T[rows],
            None if self.target_T is None else self.target_T[rows],
            self.u_T[rows],
        )


def neutral_sums(T: int, *, like: Tensor, dtype: torch.dtype) -> Tensor:
    """Sums [8, T] that finish as 0 in every field: what an ignored row holds."""
    sums_KT = like.new_zeros((len(SUMS), T), dtype=dtype)
    sums_KT[S0] = 1.0
    return sums_KT


def tile_sums(
    logit_TV: Tensor,
    scratch_TV: Tensor,
    target_T: Tensor,
    *,
    collision: bool = False,
    varentropy: bool = False,
    argmax: bool = False,
) -> Tensor:
    """Sums [8, T] of a tile of logits, whose exponentials e^u are left in `scratch_TV`; both arguments are overwritten.

    `target_T` and ARGMAX count from the tile's first column. A target outside the tile leaves NaN in TARGET, which
    merging replaces by the tile that has it.
    """
    sums_KT = logit_TV.new_zeros((len(SUMS), logit_TV.shape[0]))
    inside_T = (target_T >= 0) & (target_T < logit_TV.shape[1])
    picked_T = logit_TV.gather(1, torch.where(inside_T, target_T, 0)[:, None])[:, 0]
    sums_KT[TARGET] = torch.where(inside_T, picked_T, torch.nan)
    if argmax:
        sums_KT[ARGMAX] = logit_TV.argmax(1).to(logit_TV.dtype)
    max_T = logit_TV.amax(1).clamp_min_(MAX_FLOOR)
    u_TV = logit_TV.sub_(max_T[:, None]).clamp_min_(U_MIN)
    e_TV = torch.exp(u_TV, out=scratch_TV)
    sums_KT[MAX] = max_T
    sums_KT[S0] = e_TV.sum(1)
    if varentropy:
        sums_KT[S2] = (u_TV * u_TV).mul_(e_TV).sum(1)
    ue_TV = u_TV.mul_(e_TV)
    sums_KT[S1] = ue_TV.sum(1)
    if collision:
        sums_KT[Q0] = torch.linalg.vecdot(e_TV, e_TV)
        sums_KT[Q1] = torch.linalg.vecdot(ue_TV, e_TV)
    return sums_KT


def merge_sums(left_KT: Tensor, right_KT: Tensor) -> Tensor:
    """Sums [8, T] of two disjoint parts of the same rows; on a tie of the maximum, ARGMAX is the left one's."""
    max_T = torch.maximum(left_KT[MAX], right_KT[MAX])
    merged_KT = torch.zeros_like(left_KT)
    for part_KT in (left_KT, right_KT):
        d_T = part_KT[MAX] - max_T
        scale_T = d_T.exp()
        # d * 0 stays 0: every sum is finite and d >= -2e30 is.
        merged_KT[S0] += scale_T * part_KT[S0]
        merged_KT[S1] += scale_T * (part_KT[S1] + d_T * part_KT[S0])
        merged_KT[S2] += scale_T * (part_KT[S2] + d_T * (2.0 * part_KT[S1] + d_T.clamp_min(U_MIN) * part_KT[S0]))
        merged_KT[Q0] += scale_T * scale_T * part_KT[Q0]
        merged_KT[Q1] += scale_T * scale_T * (part_KT[Q1] + d_T * part_KT[Q0])
    merged_KT[MAX] = max_T
    merged_KT[TARGET] = torch.where(left_KT[TARGET].isnan(), right_KT[TARGET], left_KT[TARGET])
    merged_KT[ARGMAX] = torch.where(right_KT[MAX] > left_KT[MAX], right_KT[ARGMAX], left_KT[ARGMAX])
    return merged_KT


def finish(sums_KT: Tensor) -> RowValues:
    """The values of T rows from their complete sums."""
    shift_T, s0_T = sums_KT[MAX], sums_KT[S0]
    log_s0_T = s0_T.log()
    mean_u_T = sums_KT[S1] / s0_T
    return RowValues(
        # Centred before subtracting: z_y - lse would round at the size of the logits.
        logprob_T=(sums_KT[TARGET] - shift_T) - log_s0_T,
        entropy_T=log_s0_T - mean_u_T,
        lse_T=shift_T + log_s0_T,
        p2_T=sums_KT[Q0] / (s0_T * s0_T),
        p2logp_T=(sums_KT[Q1] - log_s0_T * sums_KT[Q0]) / (s0_T * s0_T),
        # Two numbers of one size are subtracted; rounding could leave less than nothing.
        varentropy_T=(sums_KT[S2] / s0_T - mean_u_T * mean_u_T).clamp_min(0.0),
        argmax_T=sums_KT[ARGMAX].long(),
        # Copies: views would keep all sums of the rows alive until the backward.
        shift_T=shift_T.clone(),
        log_s0_T=log_s0_T,
    )


def as_token_stats(
    values: RowValues, target_T: Tensor, *, collision: bool, varentropy: bool, argmax: bool, ignored_T: Tensor | None
) -> TokenStats:
    """The fields that were asked for; only the first three carry gradients. An ignored row has no top-1 match."""
    fields = {"logprob_T": values.logprob_T, "entropy_T": values.entropy_T, "lse_T": values.lse_T}
    if collision:
        fields |= {"p2_T": values.p2_T.detach(), "p2logp_T": values.p2logp_T.detach()}
    if varentropy:
        fields["varentropy_T"] = values.varentropy_T.detach()
    if argmax:
        top1_T = values.argmax_T == target_T
        fields |= {"argmax_T": values.argmax_T, "top1_T": top1_T if ignored_T is None else top1_T & ~ignored_T}
    return TokenStats(**fields)


def row_coefficients(
    grad_logprob_T: Tensor | None,
    grad_entropy_T: Tensor | None,
    grad_lse_T: Tensor | None,
    *,
    shift_T: Tensor,
    log_s0_T: Tensor,
    entropy_T: Tensor,
    logprob_T: Tensor,
    inv_temperature: float | Tensor,
) -> RowCoefficients:
    """The coefficients of dz, already times 1 / temperature, so that dz is the gradient before temperature.

    A gradient that is None was not asked for.
    """
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
    return RowCoefficients(shift_T, offset_T * scale_T, slope_T, target_T, logprob_T + log_s0_T)


def active_rows(valid_T: Tensor | None, *grads: Tensor | None) -> Tensor | None:
    """The rows that have an upstream gradient, int64 and ascending; None for every row. Waits for the device once.

    `valid_T` is False where a row has no target, None where all have one. NaN != 0: a NaN gradient is computed, and
    seen.
    """
    present = [grad_T != 0 for grad_T in grads if grad_T is not None]
    active_T = torch.stack(present).any(0) if len(present) > 1 else present[0]
    index = (active_T if valid_T is None else active_T & valid_T).nonzero()[:, 0]
    return None if len(index) == len(active_T) else index


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


def stored_gradient(
    e_TV: Tensor, scratch_TV: Tensor, shift_T: Tensor, target_T: Tensor, rows: RowCoefficients
) -> tuple[Tensor, Tensor]:
    """dz of a tile from stored exponentials e^(z - shift), and u = z - rows.shift; both arguments are overwritten.

    The target's own element is made from `rows.u_T` instead: at p_y near 1 its gradient g (1 - p_y) is a difference
    that a rounded p_y would drown.
    """
    d_T = shift_T - rows.shift_T
    u_TV = torch.log(e_TV, out=scratch_TV).add_(d_T[:, None]).clamp_min_(U_MIN)
    dz_TV = e_TV.mul_(-d_T.exp()[:, None])
    if rows.slope_T is None:
        dz_TV.mul_(rows.offset_T[:, None])
    else:
        dz_TV.mul_(torch.addcmul(rows.offset_T[:, None], u_TV, rows.slope_T[:, None]))
    inside_T = (target_T >= 0) & (target_T < e_TV.shape[1])
    factor_T = rows.offset_T if rows.slope_T is None else rows.slope_T * rows.u_T + rows.offset_T
    exact_T = -rows.u_T.clamp_min(U_MIN).exp() * factor_T
    if rows.target_T is not None:
        exact_T = exact_T + rows.target_T
    column_T1 = torch.where(inside_T, target_T, 0)[:, None]
    dz_TV.scatter_(1, column_T1, torch.where(inside_T[:, None], exact_T[:, None], dz_TV.gather(1, column_T1)))
    return dz_TV, u_TV
