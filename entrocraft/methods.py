"""What makes the loss of an update: a policy loss and whatever a method of the literature adds to it.

A `Method` is a frozen value. Once a step it looks at the entropy (`observe`) and may move a few numbers of its own,
its state: a bonus coefficient, a clip. For each optimizer update it then says what the loss is made of (`terms`):
the advantages, the tokens that count, the policy loss, further terms, and what a nat of entropy is worth. Whatever
averages the tokens (`losses.token_weights`) and whichever rollouts a rule rejects stay the same for all of them.

    method = methods.build("entropic", target=0.5)
    state = method.observe({}, Signal(step=s, steps=S, entropy=H, target=schedule(s + 1)))
    objective = make_objective(method, tokens, state, aggregation="token_mean", keep_T=decision.keep_T)
    loss, stats = linear_policy_loss(hidden_TH, weight_VH, target_T, loss=objective)
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from entrocraft.kernels.token_stats import TokenStats
from entrocraft.losses import PPOClip, token_weights
from entrocraft.objective import LossFn, PolicyObjective, Term
from entrocraft.registry import build_from

State = Mapping[str, float]

PPO_CLIP = PPOClip()
# -r A: no clip of this width ever binds, and a lower one of 1 is none.
UNCLIPPED = PPOClip(clip_low=1.0, clip_high=1e30, dual_clip=None)

METHODS: dict[str, str] = {
    "plain": "entrocraft.methods:Plain",
    "entropy_bonus": "entrocraft.entropy_bonus:EntropyBonus",
    "adaptive_bonus": "entrocraft.entropy_bonus:AdaptiveBonus",
    "aent": "entrocraft.entropy_bonus:AEnt",
    "entropic": "entrocraft.entropic:Entropic",
    "entropic_parity": "entrocraft.entropic:EntropicParity",
    "repo": "entrocraft.advantage_shaping:REPO",
    "repo_r": "entrocraft.advantage_shaping:REPOR",
    "polarity": "entrocraft.advantage_shaping:Polarity",
    "adaptive_clip": "entrocraft.adaptive_clip:AdaptiveClip",
    "clip_cov": "entrocraft.covariance:ClipCov",
    "kl_cov": "entrocraft.covariance:KLCov",
    "clip_b": "entrocraft.token_clips:ClipB",
    "clip_v": "entrocraft.token_clips:ClipV",
    "flexible_clip": "entrocraft.probability_clip:FlexibleClip",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Signal:
    """What is known once a step, before its updates: what an adaptive method steers by.

    step, steps: the present optimizer round and their number, from 0. entropy: of the batch under the policy that is
    about to change, nats a token. target: what the schedule asks for after this step's updates, nats; None without one.
    clamped_entropy: the same without each row's least likely tokens, of a method that asks for it (`clamped_share`).

    Raises:
        ValueError: a step below 0, or nats that are not finite.
    """

    step: int
    steps: int
    entropy: float
    target: float | None = None
    clamped_entropy: float | None = None

    def __post_init__(self) -> None:
        if self.step < 0:
            raise ValueError(f"step = {self.step!r}: expected an integer >= 0")
        for name in ("entropy", "target", "clamped_entropy"):
            value = getattr(self, name)
            if value is None and name != "entropy":
                continue
            if value is None or not math.isfinite(value):
                raise ValueError(f"{name} = {value!r}: expected finite nats; a method would remember it for good")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Tokens:
    """The T packed tokens of one optimizer update, scored by the policy that it is about to change; no gradients.

    stats: log-probability, entropy and, where a method asks for them, collision statistics, of the current policy.
    old_logprob_T: under the policy at the start of the step; equal to stats.logprob_T in the first update.
    advantage_T: fp32. mask_T: bool, tokens the policy chose. rollout_T: int64, non-decreasing. group_R: int64.
    keep_T: bool, False where a rule has rejected a token, which is then out of the sums; a method counts and chooses by
        the mask, so that what one token contributes does not depend on which others are rejected.
    importance_T: what each token's loss is multiplied by, such as the weights of `importance`; None: 1.
    step, seed: what a draw may depend on.
    """

    stats: TokenStats
    old_logprob_T: Tensor
    advantage_T: Tensor
    mask_T: Tensor
    rollout_T: Tensor
    group_R: Tensor
    keep_T: Tensor | None = None
    importance_T: Tensor | None = None
    seed: int = 0
    step: int = 0

    @property
    def lengths_R(self) -> list[int]:
        """Tokens of each rollout, as host integers."""
        return torch.bincount(self.rollout_T, minlength=len(self.group_R)).tolist()


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Terms:
    """What the loss of an update is made of.

    loss_fn: the policy loss. advantage_T: what it uses. mask_T: tokens that count, in the denominators too.
    gradient_T: bool, tokens that teach; the others stay in the denominators. None: all.
    extra: further terms, whose weights are complete. extra_of_mean: terms whose weights are still to be multiplied by
        those of the aggregation (a penalty on some of the tokens of the same mean).
    entropy_coefficient: what a nat of mean entropy is worth. clamped_share: the entropy is that of each row without
        its least likely tokens, this share of the vocabulary (AEnt); 0: the whole vocabulary's.
    """

    loss_fn: LossFn
    advantage_T: Tensor
    mask_T: Tensor
    gradient_T: Tensor | None = None
    extra: Sequence[Term] = ()
    extra_of_mean: Sequence[Term] = ()
    entropy_coefficient: float = 0.0
    clamped_share: float = 0.0


class Method(Protocol):
    """Anything that turns the tokens of an update into `Terms`.

    `needs_current`: whether `terms` looks at `Tokens.stats`, so that a trainer must score the tokens again where the
    policy has moved since the step began. `needs_collision`: whether it reads p2_T and p2logp_T. `clamped_share`: the
    share of the vocabulary without which the entropy of `Signal.clamped_entropy` is to be measured; 0: it is not read.
    """

    @property
    def needs_current(self) -> bool: ...

    @property
    def needs_collision(self) -> bool: ...

    @property
    def clamped_share(self) -> float: ...

    def observe(self, state: State, signal: Signal, /) -> State: ...

    def terms(self, tokens: Tokens, state: State, /) -> Terms: ...


class MethodBase:
    """Base of a method, with what it reads beside the advantages: nothing, unless it says otherwise."""

    needs_current: bool = False
    needs_collision: bool = False
    clamped_share: float = 0.0


class Stateless(MethodBase):
    """Base of the methods that steer by nothing."""

    def observe(self, state: State, signal: Signal, /) -> State:
        """No state: returns what it was given."""
        return state


@dataclass(frozen=True, kw_only=True)
class Plain(Stateless):
    """A policy loss and nothing else: PPO-clip, clip-higher, GSPO, CISPO and the like (`surrogates.LOSSES`).

        L = sum_t w_t l_t

    Aggregation: any, it gives w. Entropy: what advantages and clips do, no set-point. Source: that of the loss.
    """

    loss_fn: LossFn = PPO_CLIP

    def terms(self, tokens: Tokens, state: State, /) -> Terms:
        """The loss with the advantages and the mask as they are."""
        return Terms(loss_fn=self.loss_fn, advantage_T=tokens.advantage_T, mask_T=tokens.mask_T)


def build(name: str, **arguments: Any) -> Method:
    """The method of that name, or of the import path `package.module:name`.

    Raises:
        ValueError: unknown name, a path that cannot be imported, arguments it does not take, values it refuses.
    """
    return build_from(METHODS, name, arguments, "method")


def check_target(target: float | None) -> None:
    """Raise ValueError unless target is None or a finite number of nats >= 0."""
    if target is not None and not 0.0 <= target < math.inf:
        raise ValueError(f"target = {target!r}: expected nats >= 0, such as 0.5, or None for the schedule's")


def target_of(target: float | None, signal: Signal, who: str) -> float:
    """The method's own target, or that of the schedule.

    Raises:
        ValueError: neither is given.
    """
    if target is not None:
        return target
    if signal.target is None:
        raise ValueError(f"{who} needs a target and there is no schedule; give it target = ..., nats")
    return signal.target


def make_objective(
    method: Method,
    tokens: Tokens,
    state: State,
    *,
    aggregation: str,
    advantage_R: Tensor | None = None,
    scale: float | None = None,
) -> PolicyObjective:
    """The loss of an update, as the closure that any run of its rows can be asked for its share of.

        sum_t w_t l_t  +  sum over extra terms  -  c sum_t w^H_t H_t

    w from `token_weights` with the mask of the terms, `tokens.keep_T` and `aggregation`; 0 where gradient_T is False.
    w^H is that of the mask with everything kept: a rejected rollout teaches nothing, but its entropy counts.

    Raises:
        ValueError: as `token_weights` and `PolicyObjective`; a state that lacks what the method keeps in it.
    """
    try:
        terms = method.terms(tokens, state)
    except KeyError as error:
        raise ValueError(
            f"state = {dict(state)!r} has no {error}, which {method!r} reads: give what its `observe` returned"
        ) from error

    def weights(keep_T: Tensor | None, advantage_R: Tensor | None) -> Tensor:
        return token_weights(
            tokens.rollout_T, terms.mask_T, tokens.group_R,
            aggregation=aggregation, keep_T=keep_T, advantage_R=advantage_R, scale=scale,
        )  # fmt: skip

    weight_T = weights(tokens.keep_T, advantage_R)
    if tokens.importance_T is not None:
        weight_T = weight_T * tokens.importance_T
    of_mean = tuple(replace(term, weight_T=term.weight_T * weight_T) for term in terms.extra_of_mean)
    if terms.gradient_T is not None:
        weight_T = weight_T * terms.gradient_T
    return PolicyObjective(
        loss_fn=terms.loss_fn,
        old_logprob_T=tokens.old_logprob_T,
        advantage_T=terms.advantage_T,
        weight_T=weight_T,
        lengths_R=tokens.lengths_R,
        mask_T=tokens.mask_T,
        entropy_coefficient=terms.entropy_coefficient,
        # Of all rollouts: eq5 would leave those without an advantage out, which have an entropy nevertheless.
        entropy_weight_T=weights(None, torch.ones_like(tokens.group_R)) if terms.entropy_coefficient else None,
        extra=(*terms.extra, *of_mean),
        clamped_share=terms.clamped_share if terms.entropy_coefficient else 0.0,
    )
