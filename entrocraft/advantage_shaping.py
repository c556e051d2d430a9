"""Methods that change the advantage of single tokens by how likely they are: REPO, REPO-R, and entropy polarity."""

import math
from dataclasses import dataclass

from entrocraft.methods import PPO_CLIP, MethodBase, Signal, State, Stateless, Terms, Tokens, check_target, target_of
from entrocraft.objective import LossFn
from entrocraft.prediction import entropy_discriminator


@dataclass(frozen=True, kw_only=True)
class REPO(Stateless):
    """A' = A - beta (log p(y) + H): what is likelier than the policy is on average loses, what is rarer gains.

    The second term has mean 0 under the policy, so it is no bias on the reward but an entropy gradient estimated
    from the sampled token. log p and H are those of the policy that is about to change, without gradient. Aggregation:
    any. Entropy: up for beta > 0, without a set-point.

    Experimental: the paper's text was not at hand; the formula is from notes on it, and the default beta, of which they
    say nothing, is ours. Source: arXiv 2603.11682.
    """

    beta: float = 0.003
    loss_fn: LossFn = PPO_CLIP
    needs_current = True

    def __post_init__(self) -> None:
        if not math.isfinite(self.beta):
            raise ValueError(f"beta = {self.beta!r}: expected a finite number, such as 0.003")

    def terms(self, tokens: Tokens, state: State, /) -> Terms:
        """The policy loss with the changed advantages."""
        stats = tokens.stats
        shaped_T = tokens.advantage_T - self.beta * (stats.logprob_T + stats.entropy_T)
        return Terms(loss_fn=self.loss_fn, advantage_T=shaped_T, mask_T=tokens.mask_T)


@dataclass(frozen=True, kw_only=True)
class REPOR(MethodBase):
    """REPO-R: the advantage rescaled by the log-probability, and zeta steered towards a target.

        A > 0:  A' = max(A (1 - zeta log p(y)), 0)         A < 0:  A' = min(A (1 + zeta log p(y)), 0)

    Aggregation: any. Entropy: zeta > 0 rewards rare right tokens more and punishes rare wrong ones less, so that it
    rises; zeta < 0 the other way round. Once a step |zeta| doubles where entropy is on the wrong side for its sign and
    halves where it is on the right one; at `minimum` it changes sign instead of shrinking on. log p is that of the
    policy that is about to change, without gradient.

    target: nats; None: that of the schedule. `adaptive=False` keeps zeta. initial, minimum, maximum: of |zeta|.

    State: "zeta". Experimental: the paper's text was not at hand; formula and constants are from notes on it and from a
    recipe in somebody's fork of SkyRL. Source: arXiv 2603.11682.
    """

    target: float | None = None
    initial: float = 1e-3
    minimum: float = 1e-4
    maximum: float = 0.05
    adaptive: bool = True
    loss_fn: LossFn = PPO_CLIP
    needs_current = True

    def __post_init__(self) -> None:
        check_target(self.target)
        if not 0.0 < self.minimum <= abs(self.initial) <= self.maximum < math.inf:
            raise ValueError(
                f"minimum, initial, maximum = {self.minimum!r}, {self.initial!r}, {self.maximum!r}: expected "
                "0 < minimum <= |initial| <= maximum, such as 1e-4, 1e-3, 0.05"
            )

    def observe(self, state: State, signal: Signal, /) -> State:
        """zeta after this step's entropy."""
        zeta = state.get("zeta", self.initial)
        if not self.adaptive:
            return {"zeta": zeta}
        target = target_of(self.target, signal, "REPOR")
        if signal.entropy == target:
            return {"zeta": zeta}
        wanted = 1.0 if signal.entropy < target else -1.0
        if zeta * wanted > 0:
            return {"zeta": wanted * min(2.0 * abs(zeta), self.maximum)}
        smaller = 0.5 * abs(zeta)
        return {"zeta": -wanted * smaller if smaller >= self.minimum else wanted * self.minimum}

    def terms(self, tokens: Tokens, state: State, /) -> Terms:
        """The policy loss with the rescaled advantages."""
        advantage_T, bend_T = tokens.advantage_T, state["zeta"] * tokens.stats.logprob_T
        raised_T = (advantage_T * (1.0 - bend_T)).clamp(min=0.0)
        lowered_T = (advantage_T * (1.0 + bend_T)).clamp(max=0.0)
        shaped_T = raised_T.where(advantage_T > 0, lowered_T)
        return Terms(loss_fn=self.loss_fn, advantage_T=shaped_T, mask_T=tokens.mask_T)


@dataclass(frozen=True, kw_only=True)
class Polarity(MethodBase):
    """A' = A (1 + strength phi sign(D)): tokens that move entropy the wanted way weigh more, the others less.

        phi = clip((target - H) / target, -1, 1)        D = -A (S_y - S_bar)       (`prediction`)

    Aggregation: any. Entropy: towards the target, by at most `strength` of every advantage.

    target: nats > 0; None: that of the schedule. strength: in [0, 0.5]. State: "phase".

    Experimental: the paper's text was not at hand. That it reweights both signs of a token's polarity by a phase taken
    from the entropy's course is known; this form of it is ours. Source: arXiv 2605.11775.
    """

    target: float | None = None
    strength: float = 0.5
    loss_fn: LossFn = PPO_CLIP
    needs_current = True
    needs_collision = True

    def __post_init__(self) -> None:
        check_target(self.target)
        if not 0.0 <= self.strength <= 0.5:
            raise ValueError(f"strength = {self.strength!r}: expected a share of the advantage in [0, 0.5]")

    def observe(self, state: State, signal: Signal, /) -> State:
        """How far below (or above) the target entropy is, as a share of it."""
        target = target_of(self.target, signal, "Polarity")
        if target <= 0:
            raise ValueError(f"target = {target!r} nats: Polarity divides by it; expected > 0")
        return {"phase": min(max((target - signal.entropy) / target, -1.0), 1.0)}

    def terms(self, tokens: Tokens, state: State, /) -> Terms:
        """The policy loss with the reweighted advantages."""
        s_T, sbar_T = entropy_discriminator(tokens.stats)
        raises_T = (-tokens.advantage_T * (s_T - sbar_T)).sign()
        shaped_T = tokens.advantage_T * (1.0 + self.strength * state["phase"] * raises_T)
        return Terms(loss_fn=self.loss_fn, advantage_T=shaped_T, mask_T=tokens.mask_T)
