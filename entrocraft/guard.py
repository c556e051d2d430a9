"""When a controller must let go: control that rests on almost nothing does harm and must not be silent."""

from dataclasses import dataclass

import numpy as np

from entrocraft.batch import Batch
from entrocraft.rules import Verdict


@dataclass(frozen=True, slots=True, kw_only=True)
class Guard:
    """Limits below which a decision is set aside and everything is kept, for this step, with a reason.

    min_kept_fraction: share of all rollouts that must be kept with an advantage other than 0.
    min_groups: distinct prompts those must come from, at most a quarter of the batch's prompts, at least one.
    min_authority: share of all rollouts that must have an advantage other than 0 to begin with; without it there is
        nothing to accept or reject, and the entropy is out of the controller's hands.

    Source: the kept-sequence and group limits follow the failure that arXiv 2604.26326 reports in its appendix C.5,
    steps that rest on very few rollouts; authority is this project's.

    Raises:
        ValueError: a share outside [0, 1], or min_groups < 1.
    """

    min_kept_fraction: float = 0.02
    min_groups: int = 8
    min_authority: float = 0.02

    def __post_init__(self) -> None:
        for name in ("min_kept_fraction", "min_authority"):
            value = getattr(self, name)
            if not 0.0 <= value <= 1.0:
                raise ValueError(f"{name} = {value!r}: expected a share between 0 and 1, such as 0.02")
        if self.min_groups < 1:
            raise ValueError(f"min_groups = {self.min_groups!r}: expected a number of prompts >= 1, such as 8")

    def reason(self, batch: Batch, verdict: Verdict) -> str:
        """Why this verdict must be set aside, or "" where it may stand."""
        why = self._without_authority(carrying(batch, verdict))
        untouched = verdict.keep_R.all() and verdict.keep_T is None and (verdict.advantage_R == batch.advantage_R).all()
        if why or untouched:
            return why
        return self._starved(verdict.keep_R & (verdict.advantage_R != 0), batch.group_R)

    def _without_authority(self, carrying_R: np.ndarray) -> str:
        carry, rollouts = int(carrying_R.sum()), len(carrying_R)
        if carry > 0 and carry >= self.min_authority * rollouts:
            return ""
        return (
            f"no authority: {carry} of {rollouts} rollouts have an advantage other than 0, "
            f"at least {self.min_authority:.1%} must"
        )

    def _starved(self, learning_R: np.ndarray, group_R: np.ndarray) -> str:
        kept, rollouts = int(learning_R.sum()), len(learning_R)
        if kept == 0 or kept < self.min_kept_fraction * rollouts:
            return (
                f"starved: {kept} of {rollouts} rollouts are kept with an advantage other than 0, "
                f"at least {self.min_kept_fraction:.1%} must be"
            )
        groups, kept_groups = len(np.unique(group_R)), len(np.unique(group_R[learning_R]))
        least = min(self.min_groups, max(1, groups // 4))
        if kept_groups < least:
            return f"starved: what is kept comes from {kept_groups} of {groups} prompts, at least {least} are needed"
        return ""


def carrying(batch: Batch, verdict: Verdict) -> np.ndarray:
    """bool `[R]`: rollouts with an advantage other than 0, as given or as the rule replaced it."""
    return (batch.advantage_R != 0) | (verdict.advantage_R != 0)
