"""Weights that correct for a sampler whose probabilities differ from the trainer's: truncated, masked, rejected.

rho_t = exp(logprob_t - sampler_logprob_t), the trainer's policy at the start of the step over the sampler's; both at
the same temperature. Everything here is a constant of the loss: it multiplies a token's weight (`Tokens.importance_T`)
and has no gradient.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from entrocraft.rollouts import check_packing

LEVELS = ("token", "sequence", "geometric")
_LIMIT = 20.0  # of a log-ratio, summed or not: exp(20) still fits, and carries no information


class Importance(NamedTuple):
    """weight_T: fp32, 0 outside the mask. metrics: plain floats."""

    weight_T: Tensor
    metrics: dict[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class ImportanceWeights:
    """How ratios become weights.

        token       rho_t                       each token by itself: some bias, little variance
        sequence    prod over the rollout of rho_t    unbiased, wide
        geometric   exp(mean over the rollout of log rho_t)    a measure of how far off a rollout is

        truncate:   w = min(ratio, high)
        mask:       w = ratio where low <= ratio <= high, else 0
        reject:     w = 1     where low <= ratio <= high, else 0

    level, action: as above. low, high: bounds of the ratio, 0 <= low < high; 0 and 2 truncate tokens, 0.999 and 1.001
    reject by the geometric mean. normalise: divide by the mean weight of the tokens that count ("token") or of the
    rollouts ("sequence", "geometric"), so that the step keeps its size.

    Aggregation: any; what is masked or rejected stays in its denominator. Entropy: nothing by itself; without it a
    sampler that is a little sharper or flatter than the trainer's policy biases every update the same way. Source: Yao
    et al., Your efficient RL framework secretly brings you off-policy training (2025); the levels as in verl's rollout
    correction.
    """

    level: str = "token"
    action: str = "truncate"
    low: float = 0.0
    high: float = 2.0
    normalise: bool = False

    def __post_init__(self) -> None:
        if self.level not in LEVELS:
            raise ValueError(f"level = {self.level!r}: expected one of {', '.join(map(repr, LEVELS))}")
        if self.action not in ("truncate", "mask", "reject"):
            raise ValueError(f"action = {self.action!r}: expected 'truncate', 'mask' or 'reject'")
        if not 0.0 <= self.low < self.high < math.inf:
            raise ValueError(f"low, high = {self.low!r}, {self.high!r}: expected 0 <= low < high, such as 0 and 2")
        if self.action == "truncate" and self.low:
            raise ValueError(f"low = {self.low!r}: action 'truncate' has an upper bound alone; leave it at 0")

    def __call__(
        self, logprob_T: Tensor, sampler_logprob_T: Tensor, rollout_T: Tensor, mask_T: Tensor, rollouts: int
    ) -> Importance:
        """Weights of T packed tokens.

        Args:
            logprob_T, sampler_logprob_T: nats, of the trainer's policy and of the sampler; anything outside the mask.
            rollout_T: int64, non-decreasing. mask_T: bool, tokens the policy chose. rollouts: R.

        Raises:
            ValueError: shapes that do not fit, or a log-probability in the mask that is not finite.
        """
        check_packing(rollout_T, mask_T, rollouts)
        if not logprob_T.shape == sampler_logprob_T.shape == rollout_T.shape:
            raise ValueError(
                f"logprob_T {tuple(logprob_T.shape)} and sampler_logprob_T {tuple(sampler_logprob_T.shape)}: expected "
                f"{tuple(rollout_T.shape)} like rollout_T"
            )
        log_ratio_T = (logprob_T.detach().float() - sampler_logprob_T.detach().float()).where(mask_T, 0.0)
        if not bool(torch.isfinite(log_ratio_T).all()):
            where = int((~torch.isfinite(log_ratio_T)).nonzero()[0])
            raise ValueError(f"the log-probabilities of token {where} differ by {float(log_ratio_T[where])}")
        ratio_T = self._ratio(log_ratio_T, rollout_T, mask_T, rollouts)
        inside_T = (ratio_T >= self.low) & (ratio_T <= self.high)
        if self.action == "truncate":
            weight_T = ratio_T.clamp(max=self.high)
        else:
            weight_T = inside_T * (ratio_T if self.action == "mask" else 1.0)
        weight_T = weight_T * mask_T
        if self.normalise:
            weight_T = weight_T / self._mean(weight_T, rollout_T, mask_T, rollouts)
        return Importance(weight_T, self._metrics(ratio_T, inside_T, weight_T, mask_T))

    def _ratio(self, log_ratio_T: Tensor, rollout_T: Tensor, mask_T: Tensor, rollouts: int) -> Tensor:
        if self.level == "token":
            return log_ratio_T.clamp(-_LIMIT, _LIMIT).exp()
        total_R = log_ratio_T.new_zeros(rollouts, dtype=torch.float64).index_add_(0, rollout_T, log_ratio_T.double())
        if self.level == "geometric":
            total_R /= torch.bincount(rollout_T[mask_T], minlength=rollouts).clamp(min=1)
        return total_R.clamp(-_LIMIT, _LIMIT).exp().float()[rollout_T]

    def _mean(self, weight_T: Tensor, rollout_T: Tensor, mask_T: Tensor, rollouts: int) -> Tensor:
        """Mean weight, of tokens or of rollouts; 1 where all are 0, which leaves them so."""
        if self.level == "token":
            mean = weight_T[mask_T].double().mean()
        else:
            first = torch.full((rollouts,), -1.0, dtype=torch.float64, device=weight_T.device)
            first[rollout_T[mask_T]] = weight_T[mask_T].double()  # the same for all tokens of a rollout
            mean = first[first >= 0].mean()
        return torch.where(mean > 1e-8, mean, 1.0).float()

    def _metrics(self, ratio_T: Tensor, inside_T: Tensor, weight_T: Tensor, mask_T: Tensor) -> dict[str, float]:
        """importance_mean, _max: of the ratios. _outside: share of tokens beyond the bounds. _ess: effective sample
        size of the weights, as a share of the tokens."""
        if not bool(mask_T.any()):
            return {}
        ratio_N, weight_N = ratio_T[mask_T].double(), weight_T[mask_T].double()
        squares = float(weight_N.square().mean())
        return {
            "importance_mean": float(ratio_N.mean()),
            "importance_max": float(ratio_N.max()),
            "importance_outside": float((~inside_T[mask_T]).double().mean()),
            "importance_ess": float(weight_N.mean()) ** 2 / squares if squares else 0.0,
        }
