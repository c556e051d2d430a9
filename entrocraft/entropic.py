"""EntroPIC: positive and negative rollouts weighed by a proportional-integral controller, as its authors have it and
as it was compared with."""

import math
from dataclasses import dataclass

import torch

from entrocraft.methods import PPO_CLIP, UNCLIPPED, MethodBase, Signal, State, Terms, Tokens, check_target, target_of
from entrocraft.objective import LossFn, Term


@dataclass(frozen=True, kw_only=True)
class Entropic(MethodBase):
    """Likely tokens are weighed 1 + alpha where A > 0 and 1 - alpha where A < 0, alpha from a PI controller on H.

        e = H - target        alpha = clip(kp e + ki I, -1, 1)        I <- I + e, once a step, unless clamped
        L = L_policy + alpha * mean over the counted tokens with p(y) > threshold of (-r |A|)

    Aggregation: any for L_policy; the second term is not clipped, and its mean is over its own tokens alone: all of
    them, also those that a rule rejects, which are 0 in its sum. Importance weights multiply both terms. Entropy:
    too high, alpha > 0, likely tokens gain mass and entropy falls; too low, the other way round. Here alpha moves once
    a step, not at each optimizer update, and is the same on every rank; the authors compute one a micro-batch and rank
    from that one's entropy, so that theirs depends on the split, and their integral moves at each update. Ours stands
    still while alpha is clamped (an addition, so that it does not wind up).

    target: nats; None: that of the schedule. p(y): under the policy that is about to change.

    State: "alpha", "integral". Experimental: the paper's equations were not seen; these are of its authors' code,
    which was read. Source: Yang et al. (arXiv 2511.15248) and that code; their target is 0.1.
    """

    target: float | None = None
    kp: float = 1.0
    ki: float = 0.01
    threshold: float = 0.95
    loss_fn: LossFn = PPO_CLIP
    needs_current = True

    def __post_init__(self) -> None:
        check_target(self.target)
        _check_gains(self.kp, self.ki)
        if not 0.0 <= self.threshold < 1.0:
            raise ValueError(f"threshold = {self.threshold!r}: expected a probability in [0, 1), such as 0.95")

    def observe(self, state: State, signal: Signal, /) -> State:
        """This step's alpha; the integral takes its error in afterwards."""
        error = signal.entropy - target_of(self.target, signal, "Entropic")
        integral = state.get("integral", 0.0)
        wanted = self.kp * error + self.ki * integral
        alpha = min(max(wanted, -1.0), 1.0)
        return {"alpha": alpha, "integral": integral + error if alpha == wanted else integral}

    def terms(self, tokens: Tokens, state: State, /) -> Terms:
        """The policy loss, and the term on the likely tokens."""
        likely_T = tokens.mask_T
        if self.threshold:
            likely_T = likely_T & (tokens.stats.logprob_T > math.log(self.threshold))
        weight_T = likely_T.float() * (state["alpha"] / max(int(likely_T.sum()), 1))
        for factor_T in (tokens.keep_T, tokens.importance_T):
            weight_T = weight_T if factor_T is None else weight_T * factor_T
        extra = Term(loss_fn=UNCLIPPED, advantage_T=tokens.advantage_T.abs(), weight_T=weight_T)
        return Terms(loss_fn=self.loss_fn, advantage_T=tokens.advantage_T, mask_T=tokens.mask_T, extra=(extra,))


@dataclass(frozen=True, kw_only=True)
class EntropicParity(MethodBase):
    """EntroPIC as the released code of arXiv 2604.26326 runs it as a rival: another algorithm.

        alpha = I + kp e,  then  I <- I + ki e        A' = A + alpha |A|   on every token

    Not clamped: |alpha| > 1 turns the sign of an advantage. There A is the raw reward of -1 or +1, so use it with the
    advantage `reinforce` on signed rewards. Aggregation: `token_mean`, as there. Entropy: meant as `Entropic`, but all
    tokens are weighed alike, and on policy and without clipping a weight on all tokens of one sign moves it by noise
    alone to first order.

    target: nats, 0.5 in their scripts; None: that of the schedule. State: "alpha", "integral". Source: that code.
    """

    target: float | None = None
    kp: float = 1.0
    ki: float = 0.01
    loss_fn: LossFn = PPO_CLIP

    def __post_init__(self) -> None:
        check_target(self.target)
        _check_gains(self.kp, self.ki)

    def observe(self, state: State, signal: Signal, /) -> State:
        """This step's alpha; the integral takes its error in afterwards."""
        error = signal.entropy - target_of(self.target, signal, "EntropicParity")
        integral = state.get("integral", 0.0)
        return {"alpha": integral + self.kp * error, "integral": integral + self.ki * error}

    def terms(self, tokens: Tokens, state: State, /) -> Terms:
        """The policy loss with the weighed advantages."""
        advantage_T = torch.add(tokens.advantage_T, tokens.advantage_T.abs(), alpha=state["alpha"])
        return Terms(loss_fn=self.loss_fn, advantage_T=advantage_T, mask_T=tokens.mask_T)


def _check_gains(kp: float, ki: float) -> None:
    for name, value, such_as in (("kp", kp, 1.0), ("ki", ki, 0.01)):
        if not 0.0 <= value < math.inf:
            raise ValueError(f"{name} = {value!r}: expected a finite gain >= 0, such as {such_as}")
