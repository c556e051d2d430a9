"""Rules that wrap a rule and weigh what it keeps: what a filter does to the policy gradient, undone in part.

Both leave the wrapped rule's choice (keep_R, keep_T, advantage_R) as it is and set `weight_R`, which multiplies the
advantage of each rollout, and so its loss where that is proportional to it (`Verdict.weight_R`). a_i is the share of
rollout i's loss that the wrapped rule lets through: its chance of being kept where the rule draws, else 1 or 0; times
its weight, if it has one; where single tokens are judged, the share of its counted tokens that is kept.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from entrocraft import rules
from entrocraft.batch import per_rollout
from entrocraft.verdict import Rule, RuleInputs, Verdict, check_verdict


@dataclass(frozen=True, slots=True, kw_only=True)
class group_scale:
    """Weigh all rollouts of a prompt x by c_x, which gives its expected gradient back the size it has unfiltered.

        c_x = sum_i A_i^2 / sum_i a_i A'_i A_i        over the prompt's rollouts that have a token in the loss

    A' is the advantage the wrapped rule hands back, mostly A itself. With rewards of two values and a share q of
    correct rollouts: c_x = 1 / (a_+ (1 - q) + a_- q); 1 / (1 - q) where only correct ones pass, 1 / q where only wrong
    ones do. Without it a filter re-weighs prompts: positive-only by sqrt((1 - q) / q), negative-only by
    sqrt(q / (1 - q)).

    On policy, unclipped, with sums of log-probabilities over a sequence and two reward values, the expected gradient
    of every prompt is the unfiltered one, exactly. It raises the weight of rare signs, so the variance. Entropy: the
    filter then steers it only through clipping, re-used batches and noise. A prompt without advantage has c_x = 1, one
    of which nothing passes 0.

    Aggregation: `seq_mean_token_sum`, the sums of the equation; under `token_mean` the same but for the length of the
    rollouts. One whose denominator counts what is kept (`eq5`, `kept_tokens`) scales a second time.

    rule: a `Rule`, or the name of one, or a mapping with its "name" and arguments.
    c_max: >= 1, the largest c_x; inf for no limit.
    smooth: c_x from few samples is noisy. Shares of sum A^2 by sign, s, are drawn to one half, (n s + 1) / (n + 2)
        with n the rollouts of the prompt that have an advantage: q = (n_+ + 1) / (n + 2) for two reward values.
        False has the equation above to the letter.
    renormalise: scale all weights of the batch so that the sum of |A'| times weight over what is kept stays.

    Source: this project, in answer to the question whether a filtered policy gradient is biased.
    """

    rule: Rule | str | Mapping[str, Any]
    c_max: float = 4.0
    smooth: bool = True
    renormalise: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "rule", wrapped(self.rule))
        if not self.c_max >= 1.0:
            raise ValueError(f"c_max = {self.c_max!r}: expected >= 1, such as 4.0, or inf for no limit")

    def __call__(self, inputs: RuleInputs) -> Verdict:
        verdict, inner_R = _inner(self.rule, inputs)
        weight_R = inner_R * self.scale(inputs, verdict)
        if self.renormalise:
            size_R = np.abs(verdict.advantage_R) * (verdict.keep_R & (_counted(inputs) > 0))
            before, after = math.fsum(size_R * inner_R), math.fsum(size_R * weight_R)
            weight_R = weight_R * (before / after if after > 0 else 1.0)
        return _weighted(verdict, weight_R)

    def scale(self, inputs: RuleInputs, verdict: Verdict) -> np.ndarray:
        """c_x of each rollout's prompt, float64 `[R]`, for the verdict of the wrapped rule."""
        given_R = np.where(_counted(inputs) > 0, inputs.advantage_R, 0.0)
        full_R = given_R**2
        passed_R = let_through(inputs, verdict) * verdict.advantage_R * given_R
        scale_R = np.ones(len(given_R))
        for group in np.unique(inputs.group_R[given_R != 0]):
            member_R = (inputs.group_R == group) & (given_R != 0)
            total = math.fsum(full_R[member_R])
            passed = 0.0
            for sign_R in (given_R > 0, given_R < 0):
                part = math.fsum(full_R[member_R & sign_R])
                if part > 0:
                    share = self._share(part / total, int(member_R.sum()))
                    passed += share * math.fsum(passed_R[member_R & sign_R]) / part
            scale_R[inputs.group_R == group] = min(1.0 / passed, self.c_max) if passed > 0 else 0.0
        return scale_R

    def _share(self, share: float, rollouts: int) -> float:
        if not self.smooth or share == 1.0:  # one sign alone: there is nothing to weigh against
            return share
        return (rollouts * share + 1.0) / (rollouts + 2.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class tempered:
    """Weigh what passes by the inverse of its chance, tempered: kappa goes from control (0) to none (1).

        w_i = b_i min(a_i^-kappa, w_max)        b_i = 1 where the rollout was kept (its weight, under `soft_expected`)

    Entropy: at kappa = 1 without limit E[w A g] = E[A g], the filter's control of it is gone in expectation and only
    its noise stays. That is what unbiasedness costs here; `group_scale` keeps the filter instead.

    rule: as `group_scale`; one that gives every rollout a chance or a weight (`soft`, `soft_expected`). Under a rule
        that rejects for certain (`hard`) a = 0 and the weight is not defined.
    kappa: in [0, 1]. w_max: >= 1. self_normalised: divide by the mean of w over all rollouts, the rejected included,
        so that weights average 1.

    Aggregation: one whose denominator is that of the whole batch, as `token_mean`; else the weights are not relative to
    what was drawn from.

    Experimental: derived here, measured in no published run. Source: this project.
    """

    rule: Rule | str | Mapping[str, Any]
    kappa: float = 0.0
    w_max: float = 10.0
    self_normalised: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "rule", wrapped(self.rule))
        if not 0.0 <= self.kappa <= 1.0:
            raise ValueError(f"kappa = {self.kappa!r}: expected 0 (all control) to 1 (none)")
        if not self.w_max >= 1.0:
            raise ValueError(f"w_max = {self.w_max!r}: expected >= 1, such as 10.0, or inf for no limit")

    def __call__(self, inputs: RuleInputs) -> Verdict:
        verdict, inner_R = _inner(self.rule, inputs)
        if verdict.probability_R is None and verdict.weight_R is None:
            raise ValueError(
                f"tempered wraps {self.rule}, which gives no chance of being kept (probability_R) and no weight: use "
                "soft or soft_expected, or group_scale, which needs neither"
            )
        chance_R = np.ones(len(inner_R)) if verdict.probability_R is None else verdict.probability_R
        # What was kept had a chance; a smallest float stands for one that underflowed, w_max bounds the result.
        passed_R = np.maximum(chance_R * inner_R, np.finfo(np.float64).tiny)
        weight_R = verdict.keep_R * inner_R * np.minimum(passed_R**-self.kappa, self.w_max)
        if self.self_normalised:
            mean = math.fsum(weight_R) / max(len(weight_R), 1)
            weight_R = weight_R / mean if mean > 0 else weight_R
        return _weighted(verdict, weight_R)


def let_through(inputs: RuleInputs, verdict: Verdict) -> np.ndarray:
    """a_i, float64 `[R]`: the share of each rollout's loss that a verdict lets through, in expectation over draws."""
    if verdict.probability_R is not None:
        passed_R = verdict.probability_R.copy()
    elif verdict.keep_T is None:
        passed_R = verdict.keep_R.astype(np.float64)
    else:
        kept_R = per_rollout(inputs.mask_T & verdict.keep_T, inputs.rollout_T, len(inputs.group_R))
        passed_R = kept_R / np.maximum(_counted(inputs), 1.0)
    return passed_R if verdict.weight_R is None else passed_R * verdict.weight_R


def _counted(inputs: RuleInputs) -> np.ndarray:
    return per_rollout(inputs.mask_T, inputs.rollout_T, len(inputs.group_R))


def wrapped(rule: Rule | str | Mapping[str, Any]) -> Rule:
    """A rule as it is, built from its name, or from a mapping of its "name" and its arguments.

    Raises:
        ValueError: anything else, an unknown name, or arguments the rule refuses.
    """
    if isinstance(rule, str):
        return rules.build(rule)
    if isinstance(rule, Mapping):
        if "name" not in rule:
            raise ValueError(f"rule = {dict(rule)!r} has no 'name': expected such as {{'name': 'soft', 'gamma': 10.0}}")
        return rules.build(rule["name"], **{key: value for key, value in rule.items() if key != "name"})
    if isinstance(rule, type) or not callable(rule):
        raise ValueError(f"rule = {rule!r}: expected a rule such as rules.hard(), its name, or a mapping with its name")
    return rule


def _inner(rule: Any, inputs: RuleInputs) -> tuple[Verdict, np.ndarray]:
    verdict = rule(inputs)
    check_verdict(verdict, inputs, rule)
    return verdict, np.ones(len(verdict.keep_R)) if verdict.weight_R is None else verdict.weight_R


def _weighted(verdict: Verdict, weight_R: np.ndarray) -> Verdict:
    return Verdict(
        keep_R=verdict.keep_R,
        advantage_R=verdict.advantage_R,
        keep_T=verdict.keep_T,
        probability_R=verdict.probability_R,
        weight_R=weight_R,
    )
