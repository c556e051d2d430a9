"""One batch, and what every rule, advantage and loss makes of it; for `test_every_combination.py`.

Ragged, in fp64, away from the policy that drew it, with an empty rollout, one of which nothing counts, one without a
verdict, a prompt of one rollout and prompts whose rollouts all agree.
"""

import math
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
from acting_methods import OPTIONS, STATES
from torch import Tensor

from entrocraft import (
    EntropyController,
    PolicyObjective,
    TokenStats,
    advantages,
    corrections,
    methods,
    rules,
    schedules,
)
from entrocraft.decision import Decision
from entrocraft.methods import METHODS, Plain, State, Tokens, make_objective
from entrocraft.surrogates import LOSSES, build_loss

V, TEMPERATURE, SHIFT, STEP, SEED, GAIN, H = 7, 0.8, 0.2, 5, 3, 10.0, 1e-6

_DRAW = torch.Generator().manual_seed(23)
GROUP_R = torch.tensor([4] * 6 + [0] * 6 + [9] * 5 + [2] + [7] * 4 + [5] * 4)
_NONE = math.nan  # no verdict
REWARD_R = torch.tensor([1.0, -1, -1, 1, -1, -1, 1, 1, 1, 1, 1, -1, -1, 1, _NONE, -1, 1, 1, 1, 1, 1, 1, -1, -1, -1, -1])
R = len(GROUP_R)
SAMPLE_R = torch.cat([torch.arange(n) for n in (6, 6, 5, 1, 4, 4)])
LENGTH_R = torch.randint(1, 8, (R,), generator=_DRAW)
LENGTH_R[8] = 0
ROLLOUT_T = torch.repeat_interleave(torch.arange(R), LENGTH_R)
ROLLOUT, T = ROLLOUT_T.numpy(), len(ROLLOUT_T)
MASK_T = (torch.rand(T, generator=_DRAW) < 0.85) & (ROLLOUT_T != 13)
LOGITS_TV = 1.5 * torch.randn(T, V, generator=_DRAW, dtype=torch.float64)
TOKEN_T = torch.multinomial(LOGITS_TV.softmax(-1), 1, generator=_DRAW)[:, 0]
# A third of the rollouts on policy, a third within GSPO's narrow clips, a third beyond every clip here and there.
_DRIFT_R = torch.tensor([0.0, 2e-4, 0.5], dtype=torch.float64)[torch.arange(R) % 3]
_NOISE_T = torch.randn(T, generator=_DRAW, dtype=torch.float64)

RULES: dict[str, rules.Rule] = {
    "none": rules.none(),
    "soft": rules.soft(gamma=1.5),
    "soft_expected": rules.soft_expected(gamma=1.5),
    "hard": rules.hard(),
    "switch": rules.switch(),
    "first_order": rules.first_order(),
    "first_order token": rules.first_order(level="token"),
    "budget": rules.budget(),
    "budget token": rules.budget(level="token"),
    "budget token weighed": rules.budget(level="token", max_weight=3.0),
    "group_scale hard": corrections.group_scale(rule="hard", smooth=False),
    "group_scale soft": corrections.group_scale(rule=rules.soft(gamma=1.5), smooth=False),
    "group_scale hard smooth": corrections.group_scale(rule="hard"),
    "tempered soft": corrections.tempered(rule=rules.soft(gamma=1.5), kappa=0.5, w_max=3.0),
    "tempered soft_expected": corrections.tempered(rule=rules.soft_expected(gamma=1.5), kappa=0.5, w_max=3.0),
}


def gain_of(rule: str) -> float:
    """Realised over predicted change, so low for the rule that weighs what it keeps that rejecting falls short."""
    return 0.5 if rule.endswith("weighed") else GAIN


# Most of the batch is on policy or far off it: clips that bind between are narrow, or another line.
METHOD_STATES: dict[str, State] = STATES | {
    "adaptive_clip": {"clip_high": 5e-5},
    "flexible_clip": {"upper_share": 0.0, "lower_share": 1.0},
}
PAID_FOR_ENTROPY = ("entropy_bonus", "adaptive_bonus", "aent")
# A rule's weight multiplies the advantage. Of these the loss is not proportional to it.
NOT_PROPORTIONAL = ("repo", "clip_cov", "kl_cov")
METHOD_NAMES = [name for name in METHODS if name != "plain"]


def stats_at(logits_TV: Tensor) -> TokenStats:
    logp_TV = torch.log_softmax(logits_TV / TEMPERATURE, -1)
    p_TV = logp_TV.exp()
    return TokenStats(
        logprob_T=logp_TV.gather(1, TOKEN_T[:, None])[:, 0],
        entropy_T=-(p_TV * logp_TV).sum(-1),
        lse_T=torch.logsumexp(logits_TV / TEMPERATURE, -1),
        p2_T=p_TV.square().sum(-1).detach(),
        p2logp_T=(p_TV.square() * logp_TV).sum(-1).detach(),
    )


def entropy_for(method: str, logits_TV: Tensor) -> Tensor:
    """What the loss of this method is given for entropies: for AEnt, that of the six likeliest of the seven tokens."""
    if method != "aent":
        return stats_at(logits_TV).entropy_T
    likeliest_TK = (logits_TV / TEMPERATURE).sort(1, descending=True).values[:, :6]
    return torch.distributions.Categorical(logits=likeliest_TK).entropy()


STATS = stats_at(LOGITS_TV)
OLD_T = STATS.logprob_T - _DRIFT_R[ROLLOUT_T] * _NOISE_T
BASE, OLD = STATS.logprob_T.numpy(), OLD_T.numpy()


class Estimate(NamedTuple):
    """Advantages of one estimator, and the tokens that it leaves in the batch."""

    advantage_R: Tensor
    mask_T: Tensor

    @property
    def entropy(self) -> float:
        return float(STATS.entropy_T[self.mask_T].mean())


@cache
def estimate_of(name: str) -> Estimate:
    estimator: Any = advantages.build(name)
    counted_R = torch.bincount(ROLLOUT_T[MASK_T], minlength=R)
    advantage_R = estimator(REWARD_R, GROUP_R, counted_R)
    member_R = advantages.members(estimator, REWARD_R, GROUP_R)
    return Estimate(advantage_R, MASK_T if member_R is None else MASK_T & member_R[ROLLOUT_T])


def objective_of(
    loss: str, advantage_R: Tensor, mask_T: Tensor, keep_T: Tensor | None, aggregation: str = "token_mean"
) -> PolicyObjective:
    tokens = Tokens(
        stats=STATS, old_logprob_T=OLD_T, advantage_T=advantage_R[ROLLOUT_T], mask_T=mask_T, rollout_T=ROLLOUT_T,
        group_R=GROUP_R, keep_T=keep_T,
    )  # fmt: skip
    if loss in LOSSES:
        return make_objective(Plain(loss_fn=build_loss(loss)), tokens, {}, aggregation=aggregation)
    method = methods.build(loss, **OPTIONS.get(loss, {}))
    return make_objective(method, tokens, METHOD_STATES.get(loss, {}), aggregation=aggregation)


def everything_kept(loss: str, estimate: Estimate) -> Callable[[Tensor], Tensor]:
    """The scalar loss of the whole batch with everything kept, as a function of the log-probabilities."""
    objective = objective_of(loss, estimate.advantage_R, estimate.mask_T, None)
    return lambda logprob_T: objective(logprob_T, STATS.entropy_T, slice(0, T))


@cache
def decision_on(loss: str, advantage: str, rule: str, direction: int) -> Decision:
    estimate = estimate_of(advantage)
    schedule = schedules.constant(estimate.entropy - SHIFT * direction)
    controller = EntropyController(
        schedule, RULES[rule], seed=SEED, width=0.02, initial_gain=gain_of(rule),
        min_kept_fraction=0.0, min_groups=0, min_authority=0.0,
    )  # fmt: skip
    decision = controller.decide(
        step=STEP, stats=STATS, rollout_T=ROLLOUT_T, group_R=GROUP_R, advantage_R=estimate.advantage_R,
        reward_R=REWARD_R, mask_T=estimate.mask_T, sample_R=SAMPLE_R, loss_fn=everything_kept(loss, estimate),
        temperature=TEMPERATURE,
    )  # fmt: skip
    assert decision.direction == direction
    return decision


def asked() -> Iterator[tuple[str, int]]:
    """Advantage and direction; inside the band, where the sign rules do nothing, with one advantage."""
    for advantage in advantages.ADVANTAGES:
        yield from ((advantage, direction) for direction in (-1, 1))
    yield "grpo", 0


def combinations(loss: str) -> Iterator[tuple[str, str, int, Decision]]:
    for advantage, direction in asked():
        for rule in RULES:
            yield advantage, rule, direction, decision_on(loss, advantage, rule, direction)


def _nudged() -> tuple[np.ndarray, np.ndarray]:
    """Log-probability and entropy of each token, `[2, V, T]`, with one logit of its row H lower and H higher."""
    logits = LOGITS_TV.numpy() + np.array([-H, H])[:, None, None, None] * np.eye(V)[None, :, None, :]
    logits = logits / TEMPERATURE
    logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    return logp[..., np.arange(T), TOKEN_T.numpy()], -(np.exp(logp) * logp).sum(-1)


NUDGED_LOGP, NUDGED_ENTROPY = _nudged()


def slope_of(value: np.ndarray) -> np.ndarray:
    """`[T, V]`: central difference of each token's value in each logit of its row."""
    return ((value[1] - value[0]) / (2 * H)).T


ENTROPY_SLOPE_TV = slope_of(NUDGED_ENTROPY)
