"""Two policy losses besides PPO-clip: GSPO, whose ratio is a sequence's, and CISPO, which caps a weight instead of
removing gradients."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from entrocraft.losses import LOG_RATIO_LIMIT, checked_log_ratio

# verl's bound on the mean log-ratio of a sequence.
SEQUENCE_LIMIT = 10.0


def check_clips(clip_low: float, clip_high: float, *, such_as: str) -> None:
    if not 0.0 < clip_low <= 1.0:
        raise ValueError(f"clip_low = {clip_low!r}: expected 0 < clip_low <= 1, such as {such_as.split()[0]}")
    if not 0.0 < clip_high < math.inf:
        raise ValueError(f"clip_high = {clip_high!r}: expected a finite clip_high > 0, such as {such_as.split()[1]}")


def sequence_mean(value_T: Tensor, lengths_R: Sequence[int], mask_T: Tensor | None) -> Tensor:
    """For each token the mean of `value_T` over its sequence's tokens in the mask, without gradient; 0 over none.

    Summed in fp64, so that a mean over thousands of tokens is known far better than a sequence's clips are wide.

    Raises:
        ValueError: lengths_R does not sum to T, or mask_T is not bool of that shape.
    """
    T = len(value_T)
    if sum(lengths_R) != T:
        raise ValueError(f"lengths_R sums to {sum(lengths_R)}; expected {T}, as many tokens as logprob_T has")
    if mask_T is not None and (mask_T.shape != value_T.shape or mask_T.dtype != torch.bool):
        raise ValueError(
            f"mask_T is {mask_T.dtype} {tuple(mask_T.shape)}; expected bool {tuple(value_T.shape)} like logprob_T"
        )
    counted_T = torch.ones_like(value_T, dtype=torch.float64) if mask_T is None else mask_T.double()
    summed_T = value_T.detach().double().where(counted_T > 0, 0.0)
    length_R = torch.tensor(lengths_R, dtype=torch.int64, device=value_T.device)
    total_R, count_R = (
        torch.segment_reduce(one_T, "sum", lengths=length_R, unsafe=True) for one_T in (summed_T, counted_T)
    )
    return (total_R / count_R.clamp(min=1.0)).repeat_interleave(length_R, output_size=T).to(value_T.dtype)


@dataclass(frozen=True, slots=True, kw_only=True)
class GSPO:
    """Group sequence policy optimization, to be minimised: one ratio a sequence, the geometric mean of its tokens'.

        s_i = exp(min(10, mean over the tokens t of sequence i of (logprob_t - old_logprob_t)))
        s_t = s_i exp(logprob_t - sg[logprob_t])                 the value of s_i, the gradient of token t
        l_t = max(-s_t A_t, -clip(s_t, 1 - clip_low, 1 + clip_high) A_t)

    Aggregation: `seq_mean_token_mean`; where A is the same for all tokens of a sequence, the sum is then the mean over
    sequences of max(-s_i A_i, -clip(s_i) A_i), in value and in gradient. A clip that binds removes the gradient of a
    whole sequence, as does the clamp.

    clip_low, clip_high: 0 < clip_low <= 1, clip_high > 0. Ratios of sequences lie far closer to 1 than those of tokens:
    the 0.2 of PPO-clip would never bind here, and the defaults are 3e-4 and 4e-4.

    Entropy: at s = 1 what the advantages do, no set-point. A clip silences whole sequences, and so does not single
    out rare tokens as those of PPO-clip do.

    Experimental: the paper's text was not at hand; the equations are verl's, and the clips those of its example, which
    may not be the paper's. Source: Zheng et al. (arXiv 2507.18071), as verl has it.
    """

    sequence_level: ClassVar[bool] = True

    clip_low: float = 3e-4
    clip_high: float = 4e-4

    def __post_init__(self) -> None:
        check_clips(self.clip_low, self.clip_high, such_as="3e-4 4e-4")

    def __call__(
        self,
        logprob_T: Tensor,
        old_logprob_T: Tensor,
        advantage_T: Tensor,
        lengths_R: Sequence[int],
        mask_T: Tensor | None = None,
    ) -> Tensor:
        """loss_T, differentiable with respect to logprob_T alone; in the widest dtype of the three arguments.

        Args:
            logprob_T: log-probabilities under the policy being trained, in fp32 at least: the clips are 3e-4 wide.
            old_logprob_T: under the policy at the start of the step.
            advantage_T: advantage of each token.
            lengths_R: how many of the tokens belong to each sequence, in order, as host integers.
            mask_T: bool, the tokens that the policy chose, rejected ones included: s_i is a mean over them. None: all.

        Raises:
            ValueError: shapes differ, or lengths_R does not sum to T.
        """
        ratio_T = self._log_ratio(logprob_T, old_logprob_T, advantage_T, lengths_R, mask_T)
        ratio_T = ratio_T.clamp(max=SEQUENCE_LIMIT).exp()
        advantage_T = advantage_T.detach()
        clipped_T = ratio_T.clamp(1.0 - self.clip_low, 1.0 + self.clip_high)
        return torch.maximum(-ratio_T * advantage_T, -clipped_T * advantage_T)

    def clipped(
        self,
        logprob_T: Tensor,
        old_logprob_T: Tensor,
        advantage_T: Tensor,
        lengths_R: Sequence[int],
        mask_T: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Where the gradient has been removed though A is not 0, as bool `[T]`; the two do not overlap.

        "high": A > 0, s above its clip, or log s above 10. "low": A < 0, s below its clip.
        """
        with torch.no_grad():
            log_T = self._log_ratio(logprob_T, old_logprob_T, advantage_T, lengths_R, mask_T)
            ratio_T = log_T.clamp(max=SEQUENCE_LIMIT).exp()
            return {
                "high": ((advantage_T > 0) & (ratio_T > 1.0 + self.clip_high))
                | ((advantage_T != 0) & (log_T > SEQUENCE_LIMIT)),
                "low": (advantage_T < 0) & (ratio_T < 1.0 - self.clip_low),
            }

    @staticmethod
    def _log_ratio(
        logprob_T: Tensor,
        old_logprob_T: Tensor,
        advantage_T: Tensor,
        lengths_R: Sequence[int],
        mask_T: Tensor | None,
    ) -> Tensor:
        """log s_t before the clamp."""
        log_ratio_T = checked_log_ratio(logprob_T, old_logprob_T, advantage_T)
        mean_T = sequence_mean(log_ratio_T, lengths_R, mask_T)
        return mean_T + (logprob_T - logprob_T.detach())


@dataclass(frozen=True, slots=True, kw_only=True)
class CISPO:
    """REINFORCE with a capped importance weight, to be minimised, token by token.

        r   = exp(clamp(logprob - old_logprob, -20, 20))
        l   = -sg[clip(r, 1 - clip_low, 1 + clip_high)] A logprob

    The gradient of every token stays, `-clip(r) A` times that of logprob: the cap bounds its size and never removes it.
    The value is no measure of progress, only the gradient is.

    clip_low: 0 < clip_low <= 1; 1, the default, is no lower bound, as in verl's example. clip_high: > 0; 0.2, that of
    the same example.

    Aggregation: `token_mean`. Entropy: what the advantages do, no set-point; rare tokens that the clips of PPO would
    silence go on moving, and clip_high acts on entropy through the weights alone.

    Experimental: the clip_high of the paper was not seen; equation and constants are verl's. Source: MiniMax-M1
    (arXiv 2506.13585), as verl has it.
    """

    clip_low: float = 1.0
    clip_high: float = 0.2

    def __post_init__(self) -> None:
        check_clips(self.clip_low, self.clip_high, such_as="1.0 0.2")

    def __call__(self, logprob_T: Tensor, old_logprob_T: Tensor, advantage_T: Tensor) -> Tensor:
        """loss_T, differentiable with respect to logprob_T alone; in the widest dtype of the three arguments.

        Args:
            logprob_T: log-probabilities under the policy being trained.
            old_logprob_T: under the policy at the start of the step.
            advantage_T: advantage of each token.

        Raises:
            ValueError: shapes differ.
        """
        log_ratio_T = checked_log_ratio(logprob_T, old_logprob_T, advantage_T).detach()
        ratio_T = log_ratio_T.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()
        weight_T = ratio_T.clamp(1.0 - self.clip_low, 1.0 + self.clip_high)
        return -weight_T * advantage_T.detach() * logprob_T

    def clipped(self, logprob_T: Tensor, old_logprob_T: Tensor, advantage_T: Tensor) -> dict[str, Tensor]:
        """Where the weight is a bound though A is not 0, as bool `[T]`: "high" and "low". Gradients remain there."""
        with torch.no_grad():
            ratio_T = checked_log_ratio(logprob_T, old_logprob_T, advantage_T).exp()
            present_T = advantage_T != 0
            return {
                "high": present_T & (ratio_T > 1.0 + self.clip_high),
                "low": present_T & (ratio_T < 1.0 - self.clip_low),
            }
