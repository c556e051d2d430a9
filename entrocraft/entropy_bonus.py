"""Methods that reward entropy itself: a fixed bonus, one that adapts to a target, and AEnt's clamped one."""

import math
from dataclasses import dataclass

from entrocraft.methods import PPO_CLIP, MethodBase, Signal, State, Stateless, Terms, Tokens, check_target, target_of
from entrocraft.objective import LossFn


@dataclass(frozen=True, kw_only=True)
class EntropyBonus(Stateless):
    """L = L_policy - coefficient * mean entropy.

    Aggregation: any; the mean of the entropy is the same one, over all tokens that count, rejected ones included.
    Gradient of L per logit coefficient S_i / temperature (`prediction`). Entropy: up for a positive coefficient, down
    for a negative one, without a set-point: the same coefficient can leave it falling or make it run away.

    Source: Williams & Peng 1991; the released code of arXiv 2604.26326 compares itself with 0.003.
    """

    coefficient: float = 0.003
    loss_fn: LossFn = PPO_CLIP

    def __post_init__(self) -> None:
        if not math.isfinite(self.coefficient):
            raise ValueError(f"coefficient = {self.coefficient!r}: expected a finite number, such as 0.003")

    def terms(self, tokens: Tokens, state: State, /) -> Terms:
        """The policy loss, and a nat of entropy at its price."""
        return _bonus(self.loss_fn, tokens, self.coefficient)


@dataclass(frozen=True, kw_only=True)
class AdaptiveBonus(MethodBase):
    """An entropy bonus whose coefficient c moves by `delta` a step, and which is paid only below the target.

        L = L_policy - used * mean entropy
        first   c <- c + delta where H <= target, else c - delta, kept within [minimum, maximum]
        then    used = c where H <= target, else 0

    H is that of the step before, as its source has it; at the first step c stays and nothing is used. Here c moves
    once a step; in TRL at each optimizer update.
    Aggregation: as `EntropyBonus`. Entropy: pushed up to the target, never down to it.

    target: nats; None: that of the schedule. initial, delta, minimum, maximum: coefficients, >= 0.

    State: "coefficient", "last_entropy". Source: Skywork-OR1 (arXiv 2505.22312); constants of TRL 1.16.
    """

    target: float | None = None
    initial: float = 0.0
    delta: float = 0.005
    minimum: float = 0.0
    maximum: float = 1.0
    loss_fn: LossFn = PPO_CLIP

    def __post_init__(self) -> None:
        check_target(self.target)
        if not 0.0 <= self.minimum <= self.initial <= self.maximum < math.inf:
            raise ValueError(
                f"minimum, initial, maximum = {self.minimum!r}, {self.initial!r}, {self.maximum!r}: expected "
                "0 <= minimum <= initial <= maximum, such as 0, 0, 1"
            )
        if not 0.0 < self.delta < math.inf:
            raise ValueError(f"delta = {self.delta!r}: expected a finite step > 0, such as 0.005")

    def observe(self, state: State, signal: Signal, /) -> State:
        """What is used at this step follows from the entropy of the one before, the coefficient's move too."""
        target = target_of(self.target, signal, "AdaptiveBonus")
        coefficient, last = state.get("coefficient", self.initial), state.get("last_entropy", math.inf)
        moved = coefficient
        if "last_entropy" in state:
            moved += self.delta if last <= target else -self.delta
            moved = min(max(moved, self.minimum), self.maximum)
        return {"coefficient": moved, "last_entropy": signal.entropy, "used": moved if last <= target else 0.0}

    def terms(self, tokens: Tokens, state: State, /) -> Terms:
        """The policy loss, and a nat of entropy at the present price."""
        return _bonus(self.loss_fn, tokens, state["used"])


@dataclass(frozen=True, kw_only=True)
class AEnt:
    """A bonus on the entropy of the likelier tokens of each row, with a coefficient kept between two bounds.

        L = L_policy - c * mean clamped entropy
        c <- clip(c - rate (min(0, H - low) + max(0, H - high)), minimum, maximum)      once a step

    The clamped entropy is that of the row's distribution without the least likely `share` of the vocabulary,
    renormalised, so that nothing is paid for mass on tokens that are never right. H is the batch's mean of it
    (`Signal.clamped_entropy`; without one, that of the whole vocabulary). Aggregation: as `EntropyBonus`. Entropy: held
    between the bounds as far as the box of c reaches; c >= 0, so it is never pushed down.

    low, high: nats; None: both are the schedule's target. share: of the vocabulary, in (0, 1).

    State: "coefficient". The clamped entropy needs every row's ranking of the vocabulary: `kernels.clamped_entropy`,
    slower than the fused op.

    Experimental: the paper's text was not seen; the equations are from the README of its recipe and from a digest of
    the paper. Source: Shen et al. (arXiv 2509.03493); constants of its recipe for AReaL.
    """

    initial: float = 1e-3
    share: float = 0.2
    low: float | None = 0.1
    high: float | None = 0.5
    rate: float = 1e-3
    minimum: float = 1e-5
    maximum: float = 1e-2
    loss_fn: LossFn = PPO_CLIP
    needs_current = False
    needs_collision = False

    def __post_init__(self) -> None:
        if not 0.0 < self.share < 1.0:
            raise ValueError(f"share = {self.share!r}: expected a part of the vocabulary in (0, 1), such as 0.2")
        if (self.low is None) != (self.high is None) or not (self.low or 0.0) <= (self.high or 0.0):
            raise ValueError(f"low, high = {self.low!r}, {self.high!r}: expected low <= high, or None for both")
        if not 0.0 <= self.minimum <= self.initial <= self.maximum < math.inf:
            raise ValueError(
                f"minimum, initial, maximum = {self.minimum!r}, {self.initial!r}, {self.maximum!r}: expected "
                "0 <= minimum <= initial <= maximum, such as 1e-5, 1e-3, 1e-2"
            )
        if not 0.0 < self.rate < math.inf:
            raise ValueError(f"rate = {self.rate!r}: expected a finite number > 0, such as 1e-3")

    @property
    def clamped_share(self) -> float:
        """What is left out of the entropy that `observe` is to see."""
        return self.share

    def observe(self, state: State, signal: Signal, /) -> State:
        """The coefficient after this step's entropy."""
        entropy = signal.entropy if signal.clamped_entropy is None else signal.clamped_entropy
        low = target_of(self.low, signal, "AEnt")
        high = target_of(self.high, signal, "AEnt")
        excess = min(0.0, entropy - low) + max(0.0, entropy - high)
        coefficient = state.get("coefficient", self.initial) - self.rate * excess
        return {"coefficient": min(max(coefficient, self.minimum), self.maximum)}

    def terms(self, tokens: Tokens, state: State, /) -> Terms:
        """The policy loss, and a nat of clamped entropy at the present price."""
        bonus = _bonus(self.loss_fn, tokens, state["coefficient"])
        return Terms(
            loss_fn=bonus.loss_fn,
            advantage_T=bonus.advantage_T,
            mask_T=bonus.mask_T,
            entropy_coefficient=bonus.entropy_coefficient,
            clamped_share=self.share,
        )


def _bonus(loss_fn: LossFn, tokens: Tokens, coefficient: float) -> Terms:
    return Terms(loss_fn=loss_fn, advantage_T=tokens.advantage_T, mask_T=tokens.mask_T, entropy_coefficient=coefficient)
