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


def _changes(inputs: RuleInputs) -> np.ndarray:
    if inputs.change_R is None:
        raise ValueError("these rules need the predicted entropy change: score the tokens with collision=True")
    return inputs.change_R
