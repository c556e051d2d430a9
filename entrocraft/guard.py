"""When a controller must let go for a step: control that rests on almost nothing does harm and must not be silent."""

from dataclasses import dataclass

import numpy as np

from entrocraft.batch import Batch, per_rollout
from entrocraft.verdict import Verdict

# Of the largest predicted change of the batch: below it a change is rounding of a token the policy is certain of.
_ROUNDING_SHARE = 1e-6


@dataclass(frozen=True, slots=True, kw_only=True)
class Guard:
    """Limits below which a decision is set aside and everything is kept, for this step, with a reason.

    min_kept_fraction: share of all rollouts that must be kept with a token that counts, and an advantage and a weight
        (`Verdict.weight_R`) other than 0. Where single tokens are judged, a rollout counts only if it keeps one whose
        predicted change is not 0 (beyond rounding): tokens the policy is certain of always pass and teach nothing.
    min_groups: distinct prompts those must come from, at most a quarter of the batch's prompts, at least one.
    min_authority: share of all rollouts that must have a token that counts and an advantage other than 0 to begin
        with; without it there is nothing to accept or reject, and the entropy is out of the controller's hands.

    Some rollout must be kept with an advantage, and some must have one, however low the limits, unless all three are
    0: that switches the guard off, for runs that must train on whatever is left as the released code of arXiv
    2604.26326 does, even if that is an update of nothing. Only a verdict that rejects everything is then set aside,
    if the controller's `release` is None too.

    It forgets each batch. Whether control costs the reward, or is out of reach of its aim, takes longer to see:
    `Release`.

    Source: the kept-sequence and group limits follow the failure that arXiv 2604.26326 reports in its appendix C.5,
    steps that rest on very few rollouts; authority is this project's.

    Raises:
        ValueError: a share outside [0, 1], or min_groups < 0.
    """

    min_kept_fraction: float = 0.02
    min_groups: int = 8
    min_authority: float = 0.02

    def __post_init__(self) -> None:
        for name in ("min_kept_fraction", "min_authority"):
            value = getattr(self, name)
            if not 0.0 <= value <= 1.0:
                raise ValueError(f"{name} = {value!r}: expected a share between 0 and 1, such as 0.02")
        if self.min_groups < 0:
            raise ValueError(f"min_groups = {self.min_groups!r}: expected a number of prompts >= 0, such as 8")

    def reason(self, batch: Batch, verdict: Verdict, change_T: np.ndarray | None = None) -> str:
        """Why this verdict must be set aside, or "" where it may stand.

        change_T: predicted change of each token; looked at only where single tokens are judged. None where the
        statistics lack it: then every kept token of the loss counts.
        """
        if self.min_kept_fraction == self.min_groups == self.min_authority == 0:
            return "" if _kept(batch, verdict, None).any() else "starved: nothing at all is kept"
        why = self._without_authority(carrying(batch, verdict))
        if why or not rejects(batch, verdict):
            return why
        moved = "" if verdict.keep_T is None or change_T is None else " and a token that moves entropy"
        return self._starved(_kept(batch, verdict, change_T) & (verdict.advantage_R != 0), batch.group_R, moved)

    def _without_authority(self, carrying_R: np.ndarray) -> str:
        carry, rollouts = int(carrying_R.sum()), len(carrying_R)
        if carry > 0 and carry >= self.min_authority * rollouts:
            return ""
        return (
            f"no authority: {carry} of {rollouts} rollouts have an advantage other than 0, "
            f"at least {self.min_authority:.1%} must"
        )

    def _starved(self, learning_R: np.ndarray, group_R: np.ndarray, moved: str) -> str:
        kept, rollouts = int(learning_R.sum()), len(learning_R)
        if kept == 0 or kept < self.min_kept_fraction * rollouts:
            return (
                f"starved: {kept} of {rollouts} rollouts are kept with an advantage other than 0{moved}, "
                f"at least {self.min_kept_fraction:.1%} must be"
            )
        groups, kept_groups = len(np.unique(group_R)), len(np.unique(group_R[learning_R]))
        least = min(self.min_groups, max(1, groups // 4))
        if kept_groups < least:
            return f"starved: what is kept comes from {kept_groups} of {groups} prompts, at least {least} are needed"
        return ""


def rejects(batch: Batch, verdict: Verdict) -> bool:
    """Whether a verdict takes out a rollout or a token, or replaces an advantage."""
    everything = taught(verdict).all() and (verdict.keep_T is None or verdict.keep_T.all())
    return not (everything and np.array_equal(verdict.advantage_R, batch.advantage_R))


def taught(verdict: Verdict) -> np.ndarray:
    """bool `[R]`: rollouts that are kept with a weight other than 0."""
    return verdict.keep_R if verdict.weight_R is None else verdict.keep_R & (verdict.weight_R != 0)


def carrying(batch: Batch, verdict: Verdict) -> np.ndarray:
    """bool `[R]`: rollouts with a token that counts, and an advantage other than 0, given or put in its place."""
    return (batch.counted_R > 0) & ((batch.advantage_R != 0) | (verdict.advantage_R != 0))


def _kept(batch: Batch, verdict: Verdict, change_T: np.ndarray | None) -> np.ndarray:
    """bool `[R]`: rollouts that keep a token of the loss; where single tokens are judged, one that moves entropy."""
    if verdict.keep_T is None:
        return taught(verdict) & (batch.counted_R > 0)
    useful_T = verdict.keep_T & batch.mask_T
    if change_T is not None:
        size_T = np.abs(change_T)
        useful_T &= size_T > _ROUNDING_SHARE * size_T.max()
    return taught(verdict) & (per_rollout(useful_T, batch.rollout_T, len(verdict.keep_R)) > 0)
