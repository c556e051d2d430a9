"""Further policy losses: the geometric mean, the soft gate, plain policy gradient; and all of them by name."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from entrocraft.losses import LOG_RATIO_LIMIT, PPOClip, checked_log_ratio
from entrocraft.objective import LossFn
from entrocraft.policy_losses import CISPO, GSPO, sequence_mean
from entrocraft.probability_clip import ProbabilityClip
from entrocraft.registry import build_from


@dataclass(frozen=True, slots=True, kw_only=True)
class GeoMean:
    """Geometric-mean policy optimization, to be minimised: the mean of the clipped log-ratios of a sequence.

        d_t = clamp(logprob_t - old_logprob_t, -inf, clip_high)   where A > 0
              clamp(logprob_t - old_logprob_t, -clip_low, inf)    where A < 0
        s_i = exp(min(20, mean over the tokens t of sequence i of d_t))          l_t = -s_i A

    The gradient of token t is -s_i A times that of its logprob, or 0 where its own log-ratio is clipped, so one far
    token silences itself and not its sequence. Aggregation: `seq_mean_token_mean`, with whose weights the sum is the
    paper's objective, in value and gradient. A must be the same for all tokens of a sequence.

    clip_low, clip_high: > 0, of the log-ratio; the paper's 0.4 on both sides. Entropy: as PPO-clip, with a wider clip
    that both signs meet alike. Source: Zhao et al. (arXiv 2507.20673).
    """

    sequence_level: ClassVar[bool] = True

    clip_low: float = 0.4
    clip_high: float = 0.4

    def __post_init__(self) -> None:
        for name in ("clip_low", "clip_high"):
            if not 0.0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} = {getattr(self, name)!r}: expected a finite log-ratio > 0, such as 0.4")

    def __call__(
        self,
        logprob_T: Tensor,
        old_logprob_T: Tensor,
        advantage_T: Tensor,
        lengths_R: Sequence[int],
        mask_T: Tensor | None = None,
    ) -> Tensor:
        """loss_T, differentiable with respect to logprob_T alone; arguments and errors as `GSPO`."""
        advantage_T = advantage_T.detach()
        bounded_T = self._bounded(checked_log_ratio(logprob_T, old_logprob_T, advantage_T), advantage_T)
        mean_T = sequence_mean(bounded_T, lengths_R, mask_T)
        ratio_T = (mean_T + (bounded_T - bounded_T.detach())).clamp(max=LOG_RATIO_LIMIT).exp()
        return -ratio_T * advantage_T

    def clipped(
        self,
        logprob_T: Tensor,
        old_logprob_T: Tensor,
        advantage_T: Tensor,
        lengths_R: Sequence[int],
        mask_T: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Where the gradient has been removed though A is not 0, as bool `[T]`; the two may overlap.

        "high": A > 0, a log-ratio above its clip, or a sequence whose mean is above 20. "low": A < 0, one below.
        """
        with torch.no_grad():
            log_ratio_T = checked_log_ratio(logprob_T, old_logprob_T, advantage_T)
            mean_T = sequence_mean(self._bounded(log_ratio_T, advantage_T), lengths_R, mask_T)
            return {
                "high": ((advantage_T > 0) & (log_ratio_T > self.clip_high))
                | ((advantage_T != 0) & (mean_T > LOG_RATIO_LIMIT)),
                "low": (advantage_T < 0) & (log_ratio_T < -self.clip_low),
            }

    def _bounded(self, log_ratio_T: Tensor, advantage_T: Tensor) -> Tensor:
        """d_T; where A = 0 it does not matter."""
        return log_ratio_T.clamp(max=self.clip_high).where(advantage_T > 0, log_ratio_T.clamp(min=-self.clip_low))


@dataclass(frozen=True, slots=True, kw_only=True)
class SAPO:
    """Soft adaptive policy optimization, to be minimised: a sigmoid of the ratio instead of a clip.

        r = exp(clamp(logprob - old_logprob, -20, 20))        tau = tau_positive where A > 0, else tau_negative
        l = -(4 / tau) sigmoid(tau (r - 1)) A

    The gradient with respect to logprob is -4 s (1 - s) r A, s being the sigmoid: -A at r = 1, fading on both sides,
    the faster the larger tau. Aggregation: `seq_mean_token_mean` is recommended. Entropy: no hard clip whose side
    depends on the sign of A; a larger tau for A < 0 damps the tokens that negative rollouts push about.

    tau_positive, tau_negative: > 0; 1 and 1.05. Source: arXiv 2511.20347, section 3.
    """

    tau_positive: float = 1.0
    tau_negative: float = 1.05

    def __post_init__(self) -> None:
        for name in ("tau_positive", "tau_negative"):
            if not 0.0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} = {getattr(self, name)!r}: expected a finite number > 0, such as 1.0")

    def __call__(self, logprob_T: Tensor, old_logprob_T: Tensor, advantage_T: Tensor) -> Tensor:
        """loss_T, differentiable with respect to logprob_T alone; arguments and errors as `PPOClip`."""
        advantage_T = advantage_T.detach()
        log_ratio_T = checked_log_ratio(logprob_T, old_logprob_T, advantage_T)
        ratio_T = log_ratio_T.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()
        positive_T = torch.full_like(ratio_T, self.tau_positive)
        tau_T = positive_T.masked_fill(advantage_T <= 0, self.tau_negative)
        return -(4.0 / tau_T) * torch.sigmoid(tau_T * (ratio_T - 1.0)) * advantage_T


@dataclass(frozen=True, slots=True, kw_only=True)
class GPG:
    """Plain policy gradient, to be minimised: l = -A logprob, without a ratio.

    What RAFT and REINFORCE take as their loss too. On a policy that has moved since the rollouts were drawn it is
    biased. The value is no measure of progress. Aggregation: any. Entropy: whatever the advantages do, no clip adds to
    it.

    Source: Chu et al. (arXiv 2504.02546), section 3; Williams 1992.
    """

    def __call__(self, logprob_T: Tensor, old_logprob_T: Tensor, advantage_T: Tensor) -> Tensor:
        """loss_T, differentiable with respect to logprob_T alone; arguments and errors as `PPOClip`."""
        checked_log_ratio(logprob_T, old_logprob_T, advantage_T)
        return -advantage_T.detach() * logprob_T


def clip_higher(clip_low: float = 0.2, clip_high: float = 0.28, dual_clip: float | None = 3.0) -> PPOClip:
    """PPO-clip with the upper clip of DAPO, which lets rare tokens rise further.

        l = max(-r A, -clip(r, 1 - clip_low, 1 + clip_high) A)        and the dual clip of `PPOClip`

    Aggregation: `token_mean`, as DAPO has it. Entropy: meant to stay higher than under PPO-clip; without a set-point,
    and only where a batch is used more than once. Source: Yu et al., DAPO (arXiv 2503.14476), section 3.1.
    """
    return PPOClip(clip_low=clip_low, clip_high=clip_high, dual_clip=dual_clip)


def unclipped() -> PPOClip:
    """l = -r A: the importance-weighted policy gradient, which no clip bounds but the clamp of log r of `PPOClip`.

    Aggregation: any. Entropy: whatever the advantages do, no clip adds to it. Source: Schulman et al. (arXiv
    1707.06347), section 3, the surrogate before it is clipped.
    """
    return PPOClip(clip_low=1.0, clip_high=1e30, dual_clip=None)


LOSSES: dict[str, Callable[..., LossFn]] = {
    "ppo_clip": PPOClip,
    "clip_higher": clip_higher,
    "unclipped": unclipped,
    "gspo": GSPO,
    "cispo": CISPO,
    "geo_mean": GeoMean,
    "sapo": SAPO,
    "gpg": GPG,
    "probability_clip": ProbabilityClip,
}


def build_loss(name: str, **arguments: Any) -> LossFn:
    """The policy loss of that name, or of the import path `package.module:name`.

    Raises:
        ValueError: unknown name, a path that cannot be imported, arguments it does not take, values it refuses.
    """
    return build_from(LOSSES, name, arguments, "policy loss")
