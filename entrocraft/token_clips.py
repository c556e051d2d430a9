"""Clip_B and Clip_V: leave penalties out that fall on tokens far from where a penalty raises entropy.

S_t = p (log p + H) of the sampled token under the policy that is about to change, and S_bar its mean under that policy
(`prediction`). A penalty (A < 0) on a token with S above S_bar raises entropy, one on a token below lowers it. Both
methods take tokens out of the mask and leave all tokens with A >= 0 alone.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from entrocraft.methods import PPO_CLIP, State, Stateless, Terms, Tokens
from entrocraft.objective import LossFn
from entrocraft.prediction import entropy_discriminator

_FLAT = 1e-12  # nats: a spread below it is rounding, and nothing is an outlier of it


@dataclass(frozen=True, kw_only=True)
class ClipB(Stateless):
    """Where A < 0, keep a token only if S_t - mean S >= -mu sigma, both over the counted tokens of the update.

        S_t = p (log p + H)        of the sampled token

    sigma: population standard deviation. What goes are penalties on tokens far rarer than the batch's. mu: > 0; 2.5.

    Aggregation: any, what goes being out of its denominator too. Entropy: falls more slowly; no set-point.
    Experimental: the paper's definition was not seen; this is its authors' code, which was read, but for p, which there
    is the sampler's. Source: Wang et al. (arXiv 2602.03392) and that code.
    """

    mu: float = 2.5
    loss_fn: LossFn = PPO_CLIP
    needs_current = True

    def __post_init__(self) -> None:
        _check_mu(self.mu)

    def terms(self, tokens: Tokens, state: State, /) -> Terms:
        """The policy loss on what is kept."""
        stats = tokens.stats
        # A token the policy cannot emit: p log p -> 0, where 0 * -inf would make the mean NaN.
        logprob_T = stats.logprob_T.clamp(min=torch.finfo(stats.logprob_T.dtype).min)
        s_T = logprob_T.exp() * (stats.entropy_T + logprob_T)
        counted_S = s_T[tokens.mask_T].double()
        if not len(counted_S):
            return _masked(self.loss_fn, tokens, tokens.mask_T)
        mean, sigma = counted_S.mean(), counted_S.std(correction=0)
        outlier_T = (s_T - mean < -self.mu * sigma) & (tokens.advantage_T < 0)
        return _masked(self.loss_fn, tokens, tokens.mask_T & ~(outlier_T & (sigma > _FLAT)))


@dataclass(frozen=True, kw_only=True)
class ClipV(Stateless):
    """Where A < 0, keep a token only if S_bar_t - S_t <= mu sigma; at most `most` of the tokens go, the largest first.

        S_t = p (log p + H)        of the sampled token        S_bar_t = sum_i p_i S_i

    sigma: population standard deviation of S_bar - S over the counted tokens of the update. mu: > 0; 8.5 is the
    authors' registered default (their class has 2). most: share of the counted tokens, rounded up; 1e-4.

    Aggregation: any, what goes being out of its denominator too. Entropy: falls more slowly; no set-point.
    Experimental: the paper's definition was not seen, but its authors' code was read, whose p is that of the step's
    start; that their quantity "nec" is S_bar follows from the theory and a chart of theirs, the file that computes it
    could not be read. Source: Wang et al. (arXiv 2602.03392) and their code.
    """

    mu: float = 8.5
    most: float = 1e-4
    loss_fn: LossFn = PPO_CLIP
    needs_current = True
    needs_collision = True

    def __post_init__(self) -> None:
        _check_mu(self.mu)
        if not 0.0 < self.most <= 1.0:
            raise ValueError(f"most = {self.most!r}: expected a share of the tokens in (0, 1], such as 1e-4")

    def terms(self, tokens: Tokens, state: State, /) -> Terms:
        """The policy loss on what is kept."""
        s_T, sbar_T = entropy_discriminator(tokens.stats)
        below_T = (sbar_T - s_T).double()
        counted = int(tokens.mask_T.sum())
        if not counted:
            return _masked(self.loss_fn, tokens, tokens.mask_T)
        sigma = below_T[tokens.mask_T].std(correction=0)
        outlier_T = (below_T > self.mu * sigma) & (tokens.advantage_T < 0) & tokens.mask_T & (sigma > _FLAT)
        limit = math.ceil(self.most * counted)
        if int(outlier_T.sum()) > limit:
            farthest = below_T.masked_fill(~outlier_T, -math.inf).topk(limit).indices
            outlier_T = torch.zeros_like(outlier_T)
            outlier_T[farthest] = True
        return _masked(self.loss_fn, tokens, tokens.mask_T & ~outlier_T)


def _masked(loss_fn: LossFn, tokens: Tokens, mask_T: Tensor) -> Terms:
    return Terms(loss_fn=loss_fn, advantage_T=tokens.advantage_T, mask_T=mask_T)


def _check_mu(mu: float) -> None:
    if not 0.0 < mu < math.inf:
        raise ValueError(f"mu = {mu!r}: expected a finite number of standard deviations > 0, such as 2.5")
