"""How far the sampler's probabilities are from the policy's, measured each step on the tokens that were drawn.

Two programs compute the same model: other kernels, other types, perhaps older weights. With d = log p_policy - log
p_sampler of each drawn token:

    mismatch_mean, _max     |d|, nats
    mismatch_kl             mean of exp(d) - 1 - d, which is KL(sampler || policy) in expectation (Schulman 2020, k3)
    mismatch_ratio_pXX      quantiles of exp(d), what importance weights are made of

What it should be: 1e-5 nats in float32, 1e-2 with a sampler in bfloat16. A jump means that a publication went wrong, or
that the two no longer compute the same model.
"""

import math
import statistics
from collections import deque
from typing import Any

import torch
from torch import Tensor

from entrocraft import ImportanceWeights, Rollouts
from entrocraft.train.config_engine import ImportanceConfig, MismatchConfig
from entrocraft.train.errors import TrainingStopped

_QUANTILES = (0.01, 0.5, 0.99)
_REMEMBERED, _FEWEST = 20, 3
_LIMIT = 20.0  # of a log-ratio: its exponential still fits, and more says nothing


def mismatch_metrics(logprob_T: Tensor, rollouts: Rollouts) -> dict[str, float]:
    """The numbers above over the tokens the policy chose; empty where the sampler gave no log-probabilities.

    logprob_T: nats, of the policy at the start of the step, in the rollouts' order.
    """
    if rollouts.sampler_logprob_T is None or not bool(rollouts.mask_T.any()):
        return {}
    difference_N = (logprob_T.double() - rollouts.sampler_logprob_T.double())[rollouts.mask_T]
    log_ratio_N = difference_N.clamp(-_LIMIT, _LIMIT)
    ratio_N = log_ratio_N.exp().sort().values
    quantiles = {
        f"mismatch_ratio_p{round(100 * q):02d}": float(ratio_N[round(q * (len(ratio_N) - 1))]) for q in _QUANTILES
    }
    return {
        "mismatch_mean": float(difference_N.abs().mean()),
        "mismatch_max": float(difference_N.abs().max()),
        "mismatch_kl": float((torch.expm1(log_ratio_N) - log_ratio_N).mean()),
        **quantiles,
    }


class MismatchWatch:
    """Says when the mean mismatch of a step is out of the ordinary, and stops the run when it is out of the question.

    What is ordinary is the median of the last 20 steps without an alarm; after an alarm that lasts as long, the new
    level is ordinary.
    """

    def __init__(self, config: MismatchConfig) -> None:
        self.config = config
        self.usual: deque[float] = deque(maxlen=_REMEMBERED)
        self.unusual: deque[float] = deque(maxlen=_REMEMBERED)

    def observe(self, step: int, metrics: dict[str, float]) -> str | None:
        """The reason for an alarm, or None.

        Raises TrainingStopped beyond `mismatch.stop`.
        """
        if "mismatch_mean" not in metrics:
            return None
        mean, config = metrics["mismatch_mean"], self.config
        told = (
            f"sampler and policy differ by {mean:.3g} nats a token on average (at most {metrics['mismatch_max']:.3g})"
        )
        if config.stop is not None and not mean <= config.stop:
            raise TrainingStopped(
                f"step {step}: {told}, more than mismatch.stop = {config.stop:g}: what was sampled is not the policy. "
                "The weights did not arrive, or the sampler computes another model (temperature, type, a stale head)"
            )
        level = max(config.alarm_factor * statistics.median(self.usual), config.alarm_floor) if self.usual else math.inf
        if len(self.usual) < _FEWEST or mean <= level:
            self.usual.append(mean)
            self.unusual.clear()
            return None
        usual = statistics.median(self.usual)
        self.unusual.append(mean)
        if len(self.unusual) == _REMEMBERED:
            self.usual, self.unusual = self.unusual, self.usual
            self.unusual.clear()
        return f"{told}; usual is {usual:.3g}"

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"usual": list(self.usual), "unusual": list(self.unusual)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from what `state_dict` gave."""
        self.usual, self.unusual = (deque(state[name], maxlen=_REMEMBERED) for name in ("usual", "unusual"))


def build_importance(config: ImportanceConfig) -> ImportanceWeights | None:
    """The configured correction, or None. Raises ValueError for bounds that make no sense."""
    if not config.correct:
        return None
    return ImportanceWeights(
        level=config.level, action=config.action, low=config.low, high=config.high, normalise=config.normalise
    )
