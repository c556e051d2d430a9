"""The rules written out a second time, in NumPy, from their definitions; for `test_every_combination.py`."""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from combinations import GROUP_R, REWARD_R, ROLLOUT, SAMPLE_R, SEED, STEP, R

from entrocraft import rules


class Case(NamedTuple):
    """What a rule is asked, as it is needed to answer by hand; NumPy, A and D as in `rules`."""

    m: int
    a_R: np.ndarray
    change_T: np.ndarray
    change_R: np.ndarray
    want: float
    counted_T: np.ndarray

    def chance_R(self, gamma: float) -> np.ndarray:
        return np.exp(np.maximum(np.minimum(gamma * self.m * self.a_R, 0.0), -50.0))

    def drawn_R(self, gamma: float) -> np.ndarray:
        names = zip(GROUP_R.tolist(), SAMPLE_R.tolist(), self.chance_R(gamma).tolist(), strict=True)
        return np.array([chance == 1.0 or rules.uniform(SEED, STEP, g, s) <= chance for g, s, chance in names])

    def fewest(self, change_N: np.ndarray, order: list[tuple[int, ...]]) -> np.ndarray:
        """Drop the worst, one at a time, until what is left meets the want or nothing of the wrong sign is left."""
        total = math.fsum(self.change_R)
        up = 1.0 if total < self.want else -1.0
        harm = (-up * change_N).tolist()
        keep = np.ones(len(harm), dtype=bool)
        for k in sorted(range(len(harm)), key=lambda k: (-harm[k], order[k])):
            if up * total >= up * self.want or harm[k] <= 0:
                break
            keep[k] = False
            total += up * harm[k]
        return keep

    def fewest_tokens(self) -> np.ndarray:
        names = list(zip(GROUP_R.tolist(), SAMPLE_R.tolist(), strict=True))
        return self.fewest(self.change_T, [(*names[r], t) for t, r in enumerate(ROLLOUT)])

    def weighed(self, keep_T: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """`keep_T`, and by how much its advantages are made up for what was rejected, up to threefold."""
        kept, up = math.fsum(self.change_T[keep_T]), math.fsum(self.change_R) < self.want
        size_T = np.abs(self.a_R)[ROLLOUT] * self.counted_T
        falls_short = kept < self.want if up else kept > self.want
        weight = 1.0
        if falls_short and kept * self.want > 0 and size_T[keep_T].any():
            weight = max(1.0, min(self.want / kept, math.fsum(size_T) / math.fsum(size_T[keep_T]), 3.0))
        return keep_T, self.a_R * weight

    def scale_R(self, passes_R: np.ndarray, smooth: bool) -> np.ndarray:
        """c_x of every rollout, at most 4; 1 where a prompt has no advantage, 0 where none passes. Sums are over those
        of which a token counts."""
        scale_R, counted_R = np.ones(R), np.isin(np.arange(R), ROLLOUT[self.counted_T])
        for group in GROUP_R.unique().tolist():
            mine_R = GROUP_R.numpy() == group
            square_R, passed = np.where(mine_R & counted_R, self.a_R**2, 0.0), 0.0
            counts = [int((square_R[sign_R] > 0).sum()) for sign_R in (self.a_R > 0, self.a_R < 0)]
            for sign_R in (self.a_R > 0, self.a_R < 0):
                share = square_R[sign_R].sum() / max(square_R.sum(), 1e-300)
                if smooth and min(counts) > 0:
                    share = (sum(counts) * share + 1) / (sum(counts) + 2)
                passed += share * (passes_R * square_R)[sign_R].sum() / max(square_R[sign_R].sum(), 1e-300)
            if sum(counts):
                scale_R[mine_R] = min(4.0, 1.0 / passed) if passed > 0 else 0.0
        return scale_R

    def scaled(self, keep_R: np.ndarray, passes_R: np.ndarray, smooth: bool = False) -> tuple[np.ndarray, np.ndarray]:
        """What is left of `keep_R`, nothing of a prompt that has lost its advantages, and with which."""
        scale_R = self.scale_R(passes_R, smooth)
        return keep_R & (scale_R > 0), self.a_R * np.where(scale_R > 0, scale_R, 1.0)


def verdict_of(rule: str, case: Case) -> tuple[np.ndarray, np.ndarray]:
    """By the rule's definition: what is kept, a flag for each token or for each rollout, and the advantages."""
    m, a_R, everything_R, agrees_R = case.m, case.a_R, np.ones(R, dtype=bool), case.m * case.a_R >= 0
    names = list(zip(GROUP_R.tolist(), SAMPLE_R.tolist(), strict=True))
    raw_R, chance_R = REWARD_R.nan_to_num(0.0).double().numpy(), case.chance_R(1.5)
    tempered_R = np.minimum(chance_R**-0.5, 3.0)
    definitions: dict[str, Callable[[], tuple[np.ndarray, np.ndarray]]] = {
        "none": lambda: (everything_R, a_R),
        "soft": lambda: (case.drawn_R(1.5), a_R),
        "soft_expected": lambda: (everything_R, a_R * chance_R),
        "hard": lambda: (agrees_R, a_R),
        "switch": lambda: (everything_R, np.where(m * raw_R > 0, raw_R, 0.0) if m else a_R),
        "first_order": lambda: (m * case.change_R <= 0, a_R),
        "first_order token": lambda: (m * case.change_T <= 0, a_R),
        "budget": lambda: (case.fewest(case.change_R, names), a_R),
        "budget token": lambda: (case.fewest_tokens(), a_R),
        "budget token weighed": lambda: case.weighed(case.fewest_tokens()),
        "group_scale hard": lambda: case.scaled(agrees_R, agrees_R),
        "group_scale soft": lambda: case.scaled(case.drawn_R(1.5), chance_R),
        "group_scale hard smooth": lambda: case.scaled(agrees_R, agrees_R, smooth=True),
        "tempered soft": lambda: ((keep_R := case.drawn_R(1.5)), a_R * np.where(keep_R, tempered_R, 1.0)),
        "tempered soft_expected": lambda: (everything_R, a_R * chance_R * tempered_R),
    }
    return definitions[rule]()
