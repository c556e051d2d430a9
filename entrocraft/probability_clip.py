"""Clips that depend on how likely the token was: wide for rare tokens, tight for common ones."""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from entrocraft.losses import LOG_RATIO_LIMIT, checked_log_ratio
from entrocraft.methods import MethodBase, Signal, State, Terms, Tokens

SCHEDULES = ("id", "did", "od")


@dataclass(frozen=True, slots=True, kw_only=True)
class ProbabilityClip:
    """PPO-clip whose bounds are lines in the token's old probability p = exp(old_logprob), to be minimised.

        upper: r <= 1 + e,  e = a r p + b  at the bound, so  r <= (1 + b) / (1 - a p)
        lower: r >= 1 - e,  likewise                     so  r >= (1 - b) / (1 + a p)
        bound used = share * that line + (1 - share) * (1 + clip_high, or 1 - clip_low)
        l = max(-r A, -clip(r, lower, upper) A)

    upper_a, upper_b, lower_a, lower_b: a in (-1, 0], b in (0, 1) for the lower line, b > 0 for the upper. -0.25 and 0.5
    give 1.5 for p near 0 and 1.2 at p = 1; -0.13 and 0.3 give 0.70 and 0.805. upper_share, lower_share: in [0, 1]; how
    much of each line there is, 1 for all of it, 0 for a plain clip.

    Aggregation: any. Entropy: a wide upper line lets rare tokens of good rollouts rise, which raises it; a wide lower
    line lets rare tokens of bad ones fall, which lowers it.

    Experimental: formulas of the authors' blog, constants of somebody's summary of the paper; their code is not out.
    Source: arXiv 2602.09782.
    """

    upper_a: float = -0.25
    upper_b: float = 0.5
    lower_a: float = -0.13
    lower_b: float = 0.3
    upper_share: float = 1.0
    lower_share: float = 1.0
    clip_low: float = 0.2
    clip_high: float = 0.2

    def __post_init__(self) -> None:
        for name in ("upper_a", "lower_a"):
            if not -1.0 < getattr(self, name) <= 0.0:
                raise ValueError(f"{name} = {getattr(self, name)!r}: expected a slope in (-1, 0], such as -0.25")
        if not 0.0 < self.upper_b < math.inf:
            raise ValueError(f"upper_b = {self.upper_b!r}: expected a finite number > 0, such as 0.5")
        for name in ("lower_b", "clip_low"):
            if not 0.0 < getattr(self, name) < 1.0:
                raise ValueError(f"{name} = {getattr(self, name)!r}: expected a number in (0, 1), such as 0.3")
        if not 0.0 < self.clip_high < math.inf:
            raise ValueError(f"clip_high = {self.clip_high!r}: expected a finite number > 0, such as 0.2")
        for name in ("upper_share", "lower_share"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(f"{name} = {getattr(self, name)!r}: expected a share in [0, 1], such as 0.5")

    def bounds(self, old_logprob_T: Tensor) -> tuple[Tensor, Tensor]:
        """The least and the largest ratio whose gradient remains, `[T]`, without gradient."""
        p_T = old_logprob_T.detach().exp()
        upper_T = (1.0 + self.upper_b) / (1.0 - self.upper_a * p_T)
        lower_T = (1.0 - self.lower_b) / (1.0 + self.lower_a * p_T)
        return (
            self.lower_share * lower_T + (1.0 - self.lower_share) * (1.0 - self.clip_low),
            self.upper_share * upper_T + (1.0 - self.upper_share) * (1.0 + self.clip_high),
        )

    def __call__(self, logprob_T: Tensor, old_logprob_T: Tensor, advantage_T: Tensor) -> Tensor:
        """loss_T, differentiable with respect to logprob_T alone; arguments and errors as `PPOClip`."""
        advantage_T = advantage_T.detach()
        ratio_T = self._ratio(logprob_T, old_logprob_T, advantage_T)
        lower_T, upper_T = self.bounds(old_logprob_T)
        clipped_T = torch.minimum(torch.maximum(ratio_T, lower_T), upper_T)
        return torch.maximum(-ratio_T * advantage_T, -clipped_T * advantage_T)

    def clipped(self, logprob_T: Tensor, old_logprob_T: Tensor, advantage_T: Tensor) -> dict[str, Tensor]:
        """Where the gradient has been removed though A is not 0, as bool `[T]`: "high" and "low", by what the clamp of
        the log-ratio alone removes too, where it lies."""
        with torch.no_grad():
            ratio_T = self._ratio(logprob_T, old_logprob_T, advantage_T)
            lower_T, upper_T = self.bounds(old_logprob_T)
            some_T, log_ratio_T = advantage_T != 0, logprob_T - old_logprob_T
            high_T = (advantage_T > 0) & (ratio_T > upper_T) | some_T & (log_ratio_T > LOG_RATIO_LIMIT)
            low_T = (advantage_T < 0) & (ratio_T < lower_T) | some_T & (log_ratio_T < -LOG_RATIO_LIMIT)
            return {"high": high_T, "low": low_T}

    @staticmethod
    def _ratio(logprob_T: Tensor, old_logprob_T: Tensor, advantage_T: Tensor) -> Tensor:
        log_ratio_T = checked_log_ratio(logprob_T, old_logprob_T, advantage_T)
        return log_ratio_T.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()


PROBABILITY_CLIP = ProbabilityClip()


@dataclass(frozen=True, kw_only=True)
class FlexibleClip(MethodBase):
    """Which of the two lines of `ProbabilityClip` is in force over the run: up first, then down, or by the entropy.

    With k the step, S the steps of the run, lam = 1 - 2 k / S, and shares of the upper and the lower line:

        id   k <= S/2: upper lam, lower 0              k > S/2: upper 0, lower 1 + lam
        did  k <= S/2: upper 1 - lam, lower 0          k > S/2: upper 1, lower 1 + lam
        od   upper line alone, or lower line alone, by a switch with memory: up from H <= 0.2 H_0 until
             H > 0.2 H_0 + 0.8 H_0 (1 - k / S), H_0 being the entropy of the first step

    Aggregation: any. Entropy: id up and then down, did down, up, down, od to and fro between two bounds that come
    together; no set-point but the bounds of od.

    State: "upper_share", "lower_share", and for od "entropy_start", "raising". Experimental, as `ProbabilityClip`; in
    the second half the authors' text and a summary of it disagree, and this follows the text. Source: arXiv 2602.09782.
    """

    schedule: str = "id"
    clip: ProbabilityClip = PROBABILITY_CLIP

    def __post_init__(self) -> None:
        if self.schedule not in SCHEDULES:
            raise ValueError(f"schedule = {self.schedule!r}: expected one of {', '.join(map(repr, SCHEDULES))}")

    def observe(self, state: State, signal: Signal, /) -> State:
        """The shares of this step."""
        progress = min(signal.step / max(signal.steps, 1), 1.0)
        lam, late = 1.0 - 2.0 * progress, progress > 0.5
        if self.schedule == "id":
            return _shares(0.0 if late else lam, 1.0 + lam if late else 0.0)
        if self.schedule == "did":
            return _shares(1.0 if late else 1.0 - lam, 1.0 + lam if late else 0.0)
        start = state.get("entropy_start", signal.entropy)
        low = 0.2 * start
        high = low + (start - low) * (1.0 - progress)
        raising = state.get("raising", 0.0)
        if signal.entropy <= low:
            raising = 1.0
        elif signal.entropy > high:
            raising = 0.0
        return {**_shares(raising, 1.0 - raising), "entropy_start": start, "raising": raising}

    def terms(self, tokens: Tokens, state: State, /) -> Terms:
        """The policy loss with the shares of this step."""
        shares = {name: state[name] for name in ("upper_share", "lower_share")}
        loss_fn = replace(self.clip, **shares)
        return Terms(loss_fn=loss_fn, advantage_T=tokens.advantage_T, mask_T=tokens.mask_T)


def _shares(upper: float, lower: float) -> dict[str, float]:
    return {"upper_share": upper, "lower_share": lower}
