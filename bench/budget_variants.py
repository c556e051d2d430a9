"""Other ways to spend a budget, tried on the benchmark beside `budget`; its docstring says what is common to all.

Rules by import path for `bench_entropy_tracking.py --methods try_...`. What they measured is in `results/`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np

from entrocraft.batch import per_rollout
from entrocraft.predictive import budget
from entrocraft.verdict import RuleInputs, Verdict


@dataclass(frozen=True, slots=True)
class per_token:
    """Reject rollouts in the order of D / |y|, |y| the counted tokens: least loss of data for a change, not fewest."""

    def __call__(self, inputs: RuleInputs) -> Verdict:
        change_R = _changes(inputs)
        counted_R = per_rollout(inputs.mask_T, inputs.rollout_T, len(change_R))
        total = math.fsum(change_R)
        way = 1.0 if total < inputs.want else -1.0
        keep_R, left = np.ones(len(change_R), dtype=bool), way * (inputs.want - total)
        names = np.lexsort((inputs.sample_R, inputs.group_R, way * change_R / np.maximum(counted_R, 1.0)))
        for rollout in names[(way * change_R < 0)[names]]:
            if left <= 0.0:
                break
            keep_R[rollout] = False
            left -= abs(change_R[rollout])
        return Verdict(keep_R=keep_R, advantage_R=inputs.advantage_R)


@dataclass(frozen=True, slots=True)
class fractional:
    """`budget` by rollouts; the last rejected one is kept in part, so that P(K) is what is wanted to the digit."""

    def __call__(self, inputs: RuleInputs) -> Verdict:
        verdict, change_R = budget()(inputs), _changes(inputs)
        total, kept = math.fsum(change_R), math.fsum(change_R[verdict.keep_R])
        rejected = np.flatnonzero(~verdict.keep_R)
        if (kept - inputs.want) * (total - inputs.want) >= 0.0 or len(rejected) == 0:  # short of it, or exact
            return verdict
        least = np.abs(change_R[rejected]) == np.abs(change_R[rejected]).min()
        last = rejected[least][np.lexsort((inputs.sample_R[rejected[least]], inputs.group_R[rejected[least]]))[-1]]
        keep_R, weight_R = verdict.keep_R.copy(), np.ones(len(change_R))
        keep_R[last], weight_R[last] = True, (inputs.want - kept) / change_R[last]
        return replace(verdict, keep_R=keep_R, weight_R=weight_R)


@dataclass(frozen=True, slots=True)
class dead_band:
    """`budget`, but everything is kept while the entropy is inside the band."""

    level: str = "token"

    def __call__(self, inputs: RuleInputs) -> Verdict:
        if inputs.direction == 0:
            return Verdict(keep_R=np.ones(len(inputs.group_R), dtype=bool), advantage_R=inputs.advantage_R)
        return budget(level=self.level)(inputs)


@dataclass(frozen=True, slots=True)
class shuffled:
    """`budget` by tokens, but what is adverse goes in an order that is drawn, not the most adverse first.

    More goes, and over the steps no kind of token is always what goes. The draw depends on (seed, step) alone.
    """

    def __call__(self, inputs: RuleInputs) -> Verdict:
        adverse_T, short = _adverse(inputs)
        named = _named(inputs)
        adverse = named[adverse_T[named]]
        adverse = adverse[_order(inputs, len(adverse))]
        gained = np.cumsum(np.abs(_token_changes(inputs)[adverse]), dtype=np.float64)
        keep_T = np.ones(len(adverse_T), dtype=bool)
        keep_T[adverse[: int(np.searchsorted(gained, short)) + 1 if short > 0.0 else 0]] = False
        return _by_token(inputs, keep_T)


@dataclass(frozen=True, slots=True)
class by_group:
    """Of prompts in an order that is drawn, all adverse tokens go, until `want` is reached; the others stay whole."""

    def __call__(self, inputs: RuleInputs) -> Verdict:
        adverse_T, short = _adverse(inputs)
        groups, group_R = np.unique(inputs.group_R, return_inverse=True)
        lost_T = np.where(adverse_T, np.abs(_token_changes(inputs)), 0.0)
        lost_P = np.array([math.fsum(lost_T[group_R[inputs.rollout_T] == group]) for group in range(len(groups))])
        order = _order(inputs, len(groups))
        count = int(np.searchsorted(np.cumsum(lost_P[order]), short)) + 1 if short > 0.0 else 0
        return _by_token(inputs, ~(adverse_T & np.isin(group_R[inputs.rollout_T], order[:count])))


@dataclass(frozen=True, slots=True)
class all_or_nothing:
    """By tokens, either everything adverse goes or nothing, whichever ends nearer to `want`."""

    def __call__(self, inputs: RuleInputs) -> Verdict:
        adverse_T, short = _adverse(inputs)
        gained = math.fsum(np.abs(_token_changes(inputs)[adverse_T]))
        return _by_token(inputs, ~adverse_T if abs(gained - short) < short else np.ones(len(adverse_T), dtype=bool))


def _adverse(inputs: RuleInputs) -> tuple[np.ndarray, float]:
    """Tokens against the way to go, and how far the whole batch ends from `want`."""
    change_T = _token_changes(inputs)
    total = math.fsum(change_T)
    way = 1.0 if total < inputs.want else -1.0
    return way * change_T < 0, way * (inputs.want - total)


def _named(inputs: RuleInputs) -> np.ndarray:
    """Tokens in the order of their names, so that no draw depends on how they were arranged."""
    rollout_T = inputs.rollout_T
    return np.lexsort((np.arange(len(rollout_T)), inputs.sample_R[rollout_T], inputs.group_R[rollout_T]))


def _order(inputs: RuleInputs, count: int) -> np.ndarray:
    return np.random.default_rng([inputs.seed, inputs.step, 6]).permutation(count)


def _by_token(inputs: RuleInputs, keep_T: np.ndarray) -> Verdict:
    kept_R, counted_R = (
        per_rollout(mask_T, inputs.rollout_T, len(inputs.group_R)) for mask_T in (inputs.mask_T & keep_T, inputs.mask_T)
    )
    return Verdict(keep_R=(kept_R > 0) | (counted_R == 0), advantage_R=inputs.advantage_R, keep_T=keep_T)


def _token_changes(inputs: RuleInputs) -> np.ndarray:
    _changes(inputs)
    assert inputs.change_T is not None, "known where change_R is"
    return inputs.change_T


def _changes(inputs: RuleInputs) -> np.ndarray:
    if inputs.change_R is None:
        raise ValueError("these rules need the predicted entropy change: score the tokens with collision=True")
    return inputs.change_R
