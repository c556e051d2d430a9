"""ADAPO: the upper clip of PPO as the knob that entropy is steered by."""

import math
from dataclasses import dataclass, replace

from entrocraft.losses import PPOClip
from entrocraft.methods import PPO_CLIP, MethodBase, Signal, State, Terms, Tokens, check_target


@dataclass(frozen=True, kw_only=True)
class AdaptiveClip(MethodBase):
    """clip_high <- clip(clip_high * factor^sign(target - H), minimum, maximum), once a step.

    Aggregation: any. Entropy: a wider upper clip lets rare tokens of good rollouts rise further, which raises it; a
    narrower one does the contrary. It acts through clipped tokens alone: a step of one update clips none, and is not
    steered at all.

    target: nats; None: that of the schedule, or without one the entropy of the first step. initial: None for the
    `clip_high` of loss_fn, a `PPOClip`.

    State: "clip_high", "reference". Experimental: the direction is the paper's, whose text was not at hand; the
    multiplicative rule and its constants are ours. Source: arXiv 2603.11682.
    """

    target: float | None = None
    initial: float | None = None
    factor: float = 1.1
    minimum: float = 0.1
    maximum: float = 0.5
    loss_fn: PPOClip = PPO_CLIP

    def __post_init__(self) -> None:
        check_target(self.target)
        if not isinstance(self.loss_fn, PPOClip):
            raise ValueError(f"loss_fn = {self.loss_fn!r}: AdaptiveClip moves the upper clip of a PPOClip (ppo_clip)")
        if not 0.0 < self.minimum <= self._initial <= self.maximum < math.inf:
            raise ValueError(
                f"minimum, initial, maximum = {self.minimum!r}, {self._initial!r}, {self.maximum!r}: expected "
                "0 < minimum <= initial <= maximum, such as 0.1, 0.2, 0.5"
            )
        if not 1.0 < self.factor < math.inf:
            raise ValueError(f"factor = {self.factor!r}: expected > 1, such as 1.1")

    @property
    def _initial(self) -> float:
        return self.loss_fn.clip_high if self.initial is None else self.initial

    def observe(self, state: State, signal: Signal, /) -> State:
        """The clip after this step's entropy."""
        reference = state.get("reference", signal.entropy)
        target = next(value for value in (self.target, signal.target, reference) if value is not None)
        sign = (signal.entropy < target) - (signal.entropy > target)
        clip_high = state.get("clip_high", self._initial) * self.factor**sign
        return {"clip_high": min(max(clip_high, self.minimum), self.maximum), "reference": reference}

    def terms(self, tokens: Tokens, state: State, /) -> Terms:
        """PPO-clip with the present clip."""
        loss_fn = replace(self.loss_fn, clip_high=state["clip_high"])
        return Terms(loss_fn=loss_fn, advantage_T=tokens.advantage_T, mask_T=tokens.mask_T)
