"""When the paper's two theorems say that an update lowers entropy, made exact for a row of independent logits.

A gradient step on log p_k moves p_k by dp_k and the others by dp_i. With LL_k = log p_k and the output-space baseline
OSB_k = -sum_{i != k} (dp_i / dp_k) log p_i, the entropy of the row changes by

    dH = -dp_k (LL_k - OSB_k)

For a softmax, dp_k = eta A p_k (1 - 2 p_k + Q2) with Q2 = sum p^2, and

    LL_k - OSB_k = (S_k - Sbar) / (p_k (1 - 2 p_k + Q2))        dH = -eta A (S_k - Sbar)

with S and Sbar of `prediction.entropy_discriminator`. The denominator is positive and goes to 0 as p_k -> 1, so signs
are taken from S_k - Sbar and never from the quotient. A sequence averages LL - OSB over its tokens with weights dp_t:

    (LL - OSB)_seq = sum_t (S_t - Sbar_t) / sum_t p_t (1 - 2 p_t + Q2_t)

Source: arXiv 2604.26326 v2, Theorems 1 and 2; the closed form is this project's.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from entrocraft.kernels.token_stats import TokenStats
from entrocraft.prediction import entropy_discriminator
from entrocraft.rollouts import check_packing

# Roundings that a numerator of a few terms carries, and the error, in nats or relative, that still counts as known.
_ROUNDINGS = 8.0
_KNOWN_TO = 1e-2


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TheoremCondition:
    """Where LL > OSB, the condition under which A > 0 lowers entropy and A < 0 raises it. float64, no gradient.

    score_T: S - Sbar; its sign is the condition's, in nats times a probability. 0 where the mask is False.
    denominator_T: p (1 - 2 p + Q2) > 0, dp for a unit step with A = 1; 0 where the mask is False.
    margin_T: LL - OSB in nats, their quotient. NaN where it is not representable: the rounding of the statistics alone
        would move it by more than 0.01 nats and by more than 1 %, as where p is within 1 % of 1 (fp32), or p = 0.
    score_R, margin_R: of each rollout, mean of score_T over its counted tokens and the weighted mean of LL - OSB; NaN
        without a counted token, and margin_R where it is not representable.
    holds_T, holds_R: bool, score > 0 (strictly: at 0 the entropy does not change); False where nothing counts.
    share_tokens, share_sequences: of the counted tokens, and of the rollouts that have some, where it holds.
    logprob_positive, logprob_negative: mean log-probability in nats of the counted tokens of rollouts with A > 0 and
        A < 0; NaN if there is none.
    """

    score_T: Tensor
    denominator_T: Tensor
    margin_T: Tensor
    score_R: Tensor
    margin_R: Tensor
    holds_T: Tensor
    holds_R: Tensor
    share_tokens: float
    share_sequences: float
    logprob_positive: float
    logprob_negative: float


def theorem_condition(
    stats: TokenStats, rollout_T: Tensor, mask_T: Tensor | None, advantage_R: Tensor
) -> TheoremCondition:
    """LL > OSB, the condition of both theorems, for every counted token and rollout of a batch; not differentiable.

        LL_k - OSB_k = (S_k - Sbar) / (p_k (1 - 2 p_k + Q2))        of a sequence: sum (S - Sbar) / sum p (1 - 2 p + Q2)

    Entropy: where it holds, a step on a token with A > 0 lowers the row's entropy and one with A < 0 raises it.
    Source: arXiv 2604.26326 v2, Theorems 1 and 2; the closed form is this project's.

    Exact for rows of independent logits and an on-policy gradient step. It is a property of a row and its token: the
    share of tokens where it holds is large for peaked rows and small for flat ones, and is no probability.

    Args:
        stats: `[T]`, with p2_T and p2logp_T.
        rollout_T: int64 `[T]`, non-decreasing. mask_T: bool `[T]`, tokens the loss counts; None for all.
        advantage_R: `[R]`, finite; its sign sorts the mean log-probabilities, the condition itself does not use it.

    Raises:
        ValueError: shapes or dtypes that do not fit, statistics without p2, or an advantage that is not finite.
    """
    check_packing(rollout_T, mask_T, len(advantage_R))
    if len(stats) != len(rollout_T):
        raise ValueError(f"stats holds {len(stats)} tokens and rollout_T {len(rollout_T)}: expected the same tokens")
    if advantage_R.ndim != 1 or not bool(torch.isfinite(advantage_R).all()):
        raise ValueError(
            f"advantage_R of shape {tuple(advantage_R.shape)} must be [R] and finite: a rollout without a verdict has "
            "advantage 0"
        )
    mask_T = torch.ones_like(rollout_T, dtype=torch.bool) if mask_T is None else mask_T
    score_T, denominator_T, error_T = (torch.where(mask_T, part_T, 0.0) for part_T in _parts(stats))
    counted_R, sum_R, denominator_R, error_R = (
        torch.zeros(len(advantage_R), dtype=torch.float64, device=part_T.device).index_add(0, rollout_T, part_T)
        for part_T in (mask_T.double(), score_T, denominator_T, error_T)
    )
    some_R = counted_R > 0
    holds_T, holds_R = mask_T & (score_T > 0), some_R & (sum_R > 0)
    logprob_T, sign_T = stats.logprob_T.detach().double(), advantage_R.sign()[rollout_T]
    return TheoremCondition(
        score_T=score_T,
        denominator_T=denominator_T,
        margin_T=_quotient(score_T, denominator_T, error_T),
        score_R=sum_R / counted_R,  # 0 / 0 = NaN where nothing counts
        margin_R=_quotient(sum_R, denominator_R, error_R),
        holds_T=holds_T,
        holds_R=holds_R,
        share_tokens=_mean(holds_T.double()[mask_T]),
        share_sequences=_mean(holds_R.double()[some_R]),
        logprob_positive=_mean(logprob_T[mask_T & (sign_T > 0)]),
        logprob_negative=_mean(logprob_T[mask_T & (sign_T < 0)]),
    )


def _parts(stats: TokenStats) -> tuple[Tensor, Tensor, Tensor]:
    """S - Sbar, p (1 - 2 p + Q2), and a bound on what rounding of the statistics does to the first."""
    fields = stats.detach().as_dict()
    wide = TokenStats(**{name: field.double() for name, field in fields.items() if field.is_floating_point()})
    s_T, sbar_T = entropy_discriminator(wide)
    assert wide.p2_T is not None, "entropy_discriminator asked for it"
    assert wide.p2logp_T is not None, "given together with p2_T"
    p_T, entropy_T = wide.logprob_T.exp(), wide.entropy_T
    # (1 - p)^2 + sum of the other p^2: both terms >= 0, where 1 - 2 p + Q2 as written cancels.
    others_T = (wide.p2_T - p_T.square()).clamp(min=0.0)
    denominator_T = p_T * (torch.expm1(wide.logprob_T).square() + others_T)
    surprise_T = wide.logprob_T.clamp(min=torch.finfo(torch.float64).min).abs()
    size_T = p_T * (surprise_T + entropy_T) + wide.p2logp_T.abs() + entropy_T * wide.p2_T
    return s_T - sbar_T, denominator_T, _ROUNDINGS * torch.finfo(stats.logprob_T.dtype).eps * (p_T + size_T)


def _quotient(numerator: Tensor, denominator: Tensor, error: Tensor) -> Tensor:
    """numerator / denominator, NaN where `error` in the numerator would be more than 1 % or 0.01 of the quotient."""
    known = (denominator > 0) & (error <= _KNOWN_TO * torch.maximum(numerator.abs(), denominator))
    return torch.where(known, numerator / denominator, math.nan)


def _mean(value_N: Tensor) -> float:
    return float(value_N.mean()) if len(value_N) else math.nan
