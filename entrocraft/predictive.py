"""The two rules that go by predicted entropy changes and by nothing else.

D is the predicted change of a rollout, or of a token, under the configured loss with everything kept, for a unit step
(`prediction.py`). D of what has A = 0 is 0, and is never a reason to reject it.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from entrocraft.batch import per_rollout
from entrocraft.verdict import RuleInputs, Verdict

LEVELS = ("sequence", "token")


@dataclass(frozen=True, slots=True)
class first_order:
    """Accept when `m D <= 0`: above the band what lowers entropy to first order, below it what raises it.

    level: "sequence" judges a rollout by the sum D over its tokens; "token" judges each token by its own.
    A = 0 has D = 0 and always passes. Aggregation: any but `losses.KEPT_DENOMINATORS`, as for `budget`. Entropy: moves
    towards the band by construction, with all there is; far out of band it may keep a few per cent of the rollouts.
    By tokens it gave up least reward of all that held falling curves as closely, on both of the benchmark's tasks
    (bench/results/entropy_tracking/table.md): inside the band it rejects nothing.
    Source: this project.
    """

    level: str = "sequence"

    def __post_init__(self) -> None:
        _check_level(self.level)

    def __call__(self, inputs: RuleInputs) -> Verdict:
        change_N = _change(inputs, self.level)
        return _verdict(inputs, self.level, inputs.direction * change_N <= 0)


@dataclass(frozen=True, slots=True)
class budget:
    """Reject the fewest whose removal makes the predicted change meet the schedule's next value.

        P(K) = sum of D over the kept           want = (target(step + 1) - H) / gain

    P(all) < want: reject the most negative D first until P(K) >= want or no negative D is left. P(all) > want: the
    most positive first until P(K) <= want. Equal ones go in the order of (group, sample, position). It looks
    at neither the band nor the sign of an advantage, and A = 0 (D = 0) is never rejected.

    With max_weight > 1, where nothing adverse is left and P(K), of the sign of want, still falls short, the advantage
    of all that is kept is multiplied by

        w = min(want / P(K), sum of |A| over the batch / sum of |A| over the kept, max_weight)

    so that what is left of a batch moves the policy as far as the whole batch would have, and no further.

    Aggregation: D comes from the loss with everything kept. P(K) is therefore the change of the update only if the
    denominator of the loss stays when something is rejected, as in `token_mean`; under `losses.KEPT_DENOMINATORS`
    (`kept_tokens`, `eq5`) what is kept weighs more than P(K) says, and the aim is missed.

    level: "sequence" rejects rollouts, "token" single tokens, which reaches further: the two signs are mixed within
    most rollouts. max_weight: >= 1; at 1 nothing is weighed. Experimental above 1: meant to meet jumps of the schedule
    sooner. With 4, by tokens, it is `budget_weighed` in bench/results/entropy_tracking/table.md: over three seeds no
    nearer to falling curves than without, nearer on the wave, further on a constant with re-used batches; the only
    form that met the step up in every seed, on one pass.
    Entropy: as near to the schedule as first order and the batch allow, in both directions. Source: this project.
    """

    level: str = "sequence"
    max_weight: float = 1.0

    def __post_init__(self) -> None:
        _check_level(self.level)
        if not 1.0 <= self.max_weight < math.inf:
            raise ValueError(f"max_weight = {self.max_weight!r}: expected finite and >= 1, such as 4, or 1 for none")

    def __call__(self, inputs: RuleInputs) -> Verdict:
        change_N = _change(inputs, self.level)
        total = math.fsum(_change(inputs, "sequence"))
        rank_R = np.empty(len(inputs.group_R), dtype=np.int64)
        rank_R[np.lexsort((inputs.sample_R, inputs.group_R))] = np.arange(len(rank_R))

        def in_order(tied: np.ndarray) -> np.ndarray:
            if self.level == "sequence":
                return tied[np.argsort(rank_R[tied])]
            return tied[np.lexsort((tied, rank_R[inputs.rollout_T[tied]]))]

        keep_N = keep_fewest_rejected(change_N, total, inputs.want, in_order)
        verdict = _verdict(inputs, self.level, keep_N)
        kept = math.fsum(change_N[keep_N])
        short = kept != inputs.want and (kept < inputs.want) == (total < inputs.want)
        weight = self._weight(inputs, keep_N, kept) if short and kept * inputs.want > 0.0 else 1.0
        return verdict if weight <= 1.0 else replace(verdict, weight_R=np.full(len(verdict.keep_R), weight))

    def _weight(self, inputs: RuleInputs, keep_N: np.ndarray, kept: float) -> float:
        """w for what is kept, with P(K) = `kept` on the way to what is wanted and short of it."""
        size_T = np.abs(inputs.advantage_R)[inputs.rollout_T] * inputs.mask_T
        keep_T = keep_N if self.level == "token" else keep_N[inputs.rollout_T]
        left = math.fsum(size_T[keep_T])
        if left == 0.0:  # D without an advantage, from a method that adds to it: a weight on A would do nothing
            return 1.0
        return min(inputs.want / kept, math.fsum(size_T) / left, self.max_weight)


def keep_fewest_rejected(
    change_N: np.ndarray, total: float, want: float, in_order: Callable[[np.ndarray], np.ndarray]
) -> np.ndarray:
    """bool `[N]`: all but the fewest that must go, most adverse first, for the sum of the kept to reach `want`.

    change_N: predicted changes. total: their sum. in_order: puts the indices of equally adverse ones in the order in
    which they go. Values are sorted, not indices: one sort, one cumulative sum, and sums that do not depend on how
    the candidates were arranged.
    """
    keep_N = np.ones(len(change_N), dtype=bool)
    if total > want:  # turn both signs, so that the way to go is up
        change_N, total, want = -change_N, -total, -want
    adverse = np.sort(-change_N[change_N < 0])[::-1]
    if total >= want or len(adverse) == 0:
        return keep_N
    reached = int(np.searchsorted(np.cumsum(adverse, dtype=np.float64), want - total))
    count = min(reached + 1, len(adverse))
    last = -adverse[count - 1]
    keep_N[change_N < last] = False
    tied = np.flatnonzero(change_N == last)
    left = count - (len(keep_N) - int(np.count_nonzero(keep_N)))
    keep_N[in_order(tied)[:left]] = False
    return keep_N


def _check_level(level: str) -> None:
    if level not in LEVELS:
        raise ValueError(f"level = {level!r}: expected one of {', '.join(map(repr, LEVELS))}")


def _change(inputs: RuleInputs, level: str) -> np.ndarray:
    change_N = inputs.change_R if level == "sequence" else inputs.change_T
    if change_N is None:
        raise ValueError(
            "this rule needs the predicted entropy change: score the tokens with collision=True, so that stats has "
            "p2_T and p2logp_T"
        )
    return change_N


def _verdict(inputs: RuleInputs, level: str, keep_N: np.ndarray) -> Verdict:
    if level == "sequence":
        return Verdict(keep_R=keep_N, advantage_R=inputs.advantage_R)
    rollouts = len(inputs.advantage_R)
    counted_R = per_rollout(inputs.mask_T, inputs.rollout_T, rollouts)
    kept_R = per_rollout(inputs.mask_T & keep_N, inputs.rollout_T, rollouts)
    return Verdict(keep_R=(kept_R > 0) | (counted_R == 0), advantage_R=inputs.advantage_R, keep_T=keep_N)
