"""What a rule is asked, what it answers, and the check that the answer fits the batch."""

from dataclasses import dataclass
from typing import Protocol

import numpy as np


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RuleInputs:
    """What a rule may look at. NumPy arrays on the host, so that every process decides the same, bit for bit.

    direction: m. want: the predicted change, in nats for a unit step, that would meet the schedule's next value.
    rollout_T: int64, whose token it is. mask_T: bool, tokens the loss counts.
    group_R, sample_R: int64, the name of a rollout.
    advantage_R: float64. reward_R: float64 or None; NaN means no verdict.
    change_T: predicted change of each token under the loss with everything kept, 0 where the mask is False; None
        where the statistics lack p2.
    change_R: its float64 sum over each rollout, D; None likewise.
    seed, step: what randomness may depend on, besides the name of the rollout.
    """

    direction: int
    want: float
    rollout_T: np.ndarray
    mask_T: np.ndarray
    group_R: np.ndarray
    sample_R: np.ndarray
    advantage_R: np.ndarray
    reward_R: np.ndarray | None
    change_T: np.ndarray | None
    change_R: np.ndarray | None
    seed: int
    step: int


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Verdict:
    """keep_R: bool, rollouts that keep any token. keep_T: bool, or None for all tokens of the kept rollouts.

    advantage_R: float64, what the loss must use instead of the given advantages.
    probability_R: float64, the chance each rollout had of being kept, where the rule draws; None where it does not.
    weight_R: float64 >= 0, what the advantage of each rollout is multiplied by, and so its loss, which is proportional
        to it in every policy loss and method here but `repo`, `clip_cov` and `kl_cov`. 0 rejects it; None: 1.

    The controller checks it against the batch (`check_verdict`) before it is used.
    """

    keep_R: np.ndarray
    advantage_R: np.ndarray
    keep_T: np.ndarray | None = None
    probability_R: np.ndarray | None = None
    weight_R: np.ndarray | None = None


class Rule(Protocol):
    """Anything that turns `RuleInputs` into a `Verdict`."""

    def __call__(self, inputs: RuleInputs, /) -> Verdict: ...


def check_verdict(verdict: Verdict, inputs: RuleInputs, rule: Rule) -> None:
    """Raise ValueError, naming the rule and the field, unless `verdict` fits the batch that `inputs` describes."""
    if not isinstance(verdict, Verdict):
        raise ValueError(f"rule {rule} returned {type(verdict).__name__}: expected an entrocraft.rules.Verdict")
    R, T = len(inputs.group_R), len(inputs.rollout_T)
    _check_array(rule, "keep_R", verdict.keep_R, R, "rollout", np.bool_)
    _check_array(rule, "advantage_R", verdict.advantage_R, R, "rollout", np.float64)
    if not np.isfinite(verdict.advantage_R).all():
        raise ValueError(f"rule {rule} returned an advantage_R that is not finite: give 0 to what teaches nothing")
    if verdict.probability_R is not None:
        _check_array(rule, "probability_R", verdict.probability_R, R, "rollout", np.float64)
        if not ((verdict.probability_R >= 0.0) & (verdict.probability_R <= 1.0)).all():
            raise ValueError(f"rule {rule} returned a probability_R outside [0, 1]: expected chances of being kept")
    if verdict.weight_R is not None:
        _check_array(rule, "weight_R", verdict.weight_R, R, "rollout", np.float64)
        if not ((verdict.weight_R >= 0.0) & (verdict.weight_R < np.inf)).all():
            raise ValueError(f"rule {rule} returned a weight_R that is negative or not finite: 0 takes a rollout out")
    if verdict.keep_T is None:
        return
    _check_array(rule, "keep_T", verdict.keep_T, T, "token", np.bool_)
    orphan_T = verdict.keep_T & inputs.mask_T & ~verdict.keep_R[inputs.rollout_T]
    if orphan_T.any():
        where = int(np.flatnonzero(orphan_T)[0])
        raise ValueError(
            f"rule {rule} keeps token {where} in keep_T and rejects its rollout {int(inputs.rollout_T[where])} in "
            "keep_R: expected keep_R True for every rollout that keeps a counted token"
        )


def _check_array(rule: Rule, name: str, value: object, size: int, noun: str, dtype: type[np.generic]) -> None:
    expected = f"expected a NumPy array of shape ({size},) and dtype {np.dtype(dtype)}, one value for each {noun}"
    if not isinstance(value, np.ndarray):
        raise ValueError(f"rule {rule} returned {name} of type {type(value).__name__}: {expected}")
    if value.shape != (size,) or value.dtype != dtype:
        raise ValueError(f"rule {rule} returned {name} of shape {value.shape} and dtype {value.dtype}: {expected}")
