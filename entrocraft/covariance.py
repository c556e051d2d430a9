"""Clip-Cov and KL-Cov: hold back the few tokens whose advantage and log-probability go together most.

    c_t = (A_t - mean A) (log p_t - mean log p)         means over the tokens of the update in the mask

Under a softmax the change of entropy in a policy gradient step is minus the covariance of advantage and log-probability
(`prediction` has it exactly), so the tokens with the largest c are those that lower it most. log p is that of the
policy that is about to change. The published code takes mean and selection inside each micro-batch; here they are the
update's, so that no split changes the result; and those of all its tokens, whatever a rule rejects, so that what one
token contributes does not depend on which others are rejected.

The constants come in three spellings, the authors', verl's configuration and verl's functions, which the classes name;
here `fraction` is always the plain share of the tokens.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from entrocraft.losses import PPOClip
from entrocraft.methods import UNCLIPPED, State, Stateless, Terms, Tokens
from entrocraft.objective import LossFn, Term

WIDE = PPOClip(clip_low=1.0, clip_high=1.0, dual_clip=None)


@dataclass(frozen=True, kw_only=True)
class ClipCov(Stateless):
    """Silence a few tokens, drawn at random among those with lower < c < upper that no clip has silenced.

        c_t = (A_t - mean A) (log p_t - mean log p)

    Their number is max(1, int(fraction * tokens in the mask)), or all there are. The draw depends on (seed, step) and
    the tokens alone.

    Aggregation: `token_mean`, in whose denominator they stay. Entropy: falls more slowly; no set-point.

    fraction: in (0, 1]; 2e-4 in the authors' code (`clip_ratio`) and in verl (`clip_cov_ratio`). lower < upper: of c.
    loss_fn: the authors clip at 1 on both sides, verl without a dual clip.
    Source: Cui et al. (arXiv 2505.22617), section 4; the authors' code and verl's.
    """

    fraction: float = 2e-4
    lower: float = 1.0
    upper: float = 5.0
    loss_fn: LossFn = WIDE
    needs_current = True

    def __post_init__(self) -> None:
        _check_fraction(self.fraction)
        if not self.lower < self.upper:
            raise ValueError(f"lower, upper = {self.lower!r}, {self.upper!r}: expected lower < upper, such as 1 and 5")

    def terms(self, tokens: Tokens, state: State, /) -> Terms:
        """The policy loss without the gradient of the tokens that were drawn."""
        covariance_T = covariances(tokens)
        candidate_T = (covariance_T > self.lower) & (covariance_T < self.upper) & tokens.mask_T
        candidate_T &= ~_clipped(self.loss_fn, tokens)
        candidates = candidate_T.nonzero()[:, 0]
        count = max(1, int(self.fraction * int(tokens.mask_T.sum())))
        order = np.random.default_rng([tokens.seed, tokens.step]).permutation(len(candidates))[:count]
        gradient_T = torch.ones_like(tokens.mask_T)
        gradient_T[candidates[torch.from_numpy(order).to(candidates.device)]] = False
        return Terms(loss_fn=self.loss_fn, advantage_T=tokens.advantage_T, mask_T=tokens.mask_T, gradient_T=gradient_T)


@dataclass(frozen=True, kw_only=True)
class KLCov(Stateless):
    """Add coefficient |logprob - old_logprob| to the loss of the tokens with the largest c; nothing is clipped.

        l = -r A  (+ coefficient |logprob - old_logprob| on the max(1, int(fraction * tokens in the mask)) largest c)

    At the first update after sampling both log-probabilities agree, and where they do to the last bit the penalty's
    gradient is 0 (that of |.| at 0). Where the update scores tokens in other micro-batches or by other kernels than
    the scoring did, they differ by rounding, and each chosen token gets a full coefficient of random sign: noise, not
    pressure. It acts where a batch is used again. Aggregation: any, the penalty being a part of the same mean.
    Entropy: falls more slowly; no set-point.

    fraction: in (0, 1]; the authors' 2e-3, which their scripts spell `k_percent = 0.2`, per cent; verl's `kl_cov_ratio`
    is 2e-4, a tenth of it. coefficient: finite, >= 0; the authors' 1; verl's `ppo_kl_coef` is 0.1 in its configuration
    and 1 in its function. Source: as `ClipCov`: Cui et al.
    (arXiv 2505.22617), the authors' code and verl's.
    """

    fraction: float = 2e-3
    coefficient: float = 1.0
    needs_current = True

    def __post_init__(self) -> None:
        _check_fraction(self.fraction)
        if not 0.0 <= self.coefficient < math.inf:
            raise ValueError(f"coefficient = {self.coefficient!r}: expected a finite number >= 0, such as 1.0")

    def terms(self, tokens: Tokens, state: State, /) -> Terms:
        """Unclipped policy gradient, and the penalty on the chosen tokens."""
        covariance_T = covariances(tokens).masked_fill(~tokens.mask_T, -math.inf)
        counted = int(tokens.mask_T.sum())
        chosen_T = torch.zeros_like(tokens.advantage_T)
        if counted:
            chosen_T[covariance_T.topk(max(1, int(counted * self.fraction))).indices] = self.coefficient
        penalty = Term(loss_fn=absolute_log_ratio, advantage_T=tokens.advantage_T, weight_T=chosen_T)
        return Terms(loss_fn=UNCLIPPED, advantage_T=tokens.advantage_T, mask_T=tokens.mask_T, extra_of_mean=(penalty,))


def covariances(tokens: Tokens) -> Tensor:
    """c_T of the equation above, without gradient; meaningless outside of the mask."""
    logprob_T, advantage_T = tokens.stats.logprob_T.detach(), tokens.advantage_T

    def centred(value_T: Tensor) -> Tensor:
        return value_T - value_T[tokens.mask_T].double().mean().to(value_T.dtype)

    return centred(advantage_T) * centred(logprob_T)


def absolute_log_ratio(logprob_N: Tensor, old_logprob_N: Tensor, advantage_N: Tensor) -> Tensor:
    """|logprob - old_logprob|, differentiable with respect to the first; the advantage is not looked at."""
    return (logprob_N - old_logprob_N.detach()).abs()


def _clipped(loss_fn: LossFn, tokens: Tokens) -> Tensor:
    """bool: tokens that the policy loss itself clips."""
    clipped_T = torch.zeros_like(tokens.mask_T)
    of_loss = getattr(loss_fn, "clipped", None)
    if of_loss is None:
        return clipped_T
    sequences = (tokens.lengths_R, tokens.mask_T) if getattr(loss_fn, "sequence_level", False) else ()
    for one_T in of_loss(tokens.stats.logprob_T, tokens.old_logprob_T, tokens.advantage_T, *sequences).values():
        clipped_T |= one_T
    return clipped_T


def _check_fraction(fraction: float) -> None:
    if not 0.0 < fraction <= 1.0:
        raise ValueError(f"fraction = {fraction!r}: expected a share of the tokens in (0, 1], such as 2e-4")
