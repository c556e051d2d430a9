"""A rule of one's own: a verdict that fits is used, one that does not is named."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from entrocraft import EntropyController, schedules
from entrocraft.rules import RuleInputs, Verdict


@dataclass(frozen=True)
class mine:
    """Keeps everything but rollout 0, with some fields of the verdict replaced."""

    changes: Callable[[RuleInputs], Any]

    def __str__(self) -> str:
        return "mine()"

    def __call__(self, inputs: RuleInputs) -> Any:
        changes = self.changes(inputs)
        if not isinstance(changes, dict):
            return changes
        keep_R = np.arange(len(inputs.group_R)) > 0
        fields: dict[str, Any] = {"keep_R": keep_R, "advantage_R": inputs.advantage_R}
        return Verdict(**(fields | changes))


@pytest.mark.parametrize(
    "changes",
    [
        lambda inputs: {},
        lambda inputs: {"keep_T": inputs.rollout_T > 0},
        lambda inputs: {"keep_T": (inputs.rollout_T > 0) | ~inputs.mask_T},
        lambda inputs: {"probability_R": np.full(len(inputs.group_R), 0.5)},
    ],
)
def test_a_verdict_that_fits_is_used(changes: Callable[[RuleInputs], Any], scored_batch: Callable[..., Any]) -> None:
    scored = scored_batch(0)
    decision = scored.decide(EntropyController(schedules.constant(1.0), mine(changes)), 0)
    assert not decision.bypassed
    assert decision.keep_R.tolist() == [False] + [True] * 95


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (lambda inputs: None, "returned NoneType: expected an entrocraft.rules.Verdict"),
        (lambda inputs: {"keep_R": np.ones(96)}, "keep_R of shape (96,) and dtype float64: expected a NumPy array of"),
        (lambda inputs: {"keep_R": np.ones(95, dtype=bool)}, "of shape (96,) and dtype bool, one value for each roll"),
        (lambda inputs: {"keep_R": [True] * 96}, "keep_R of type list: expected a NumPy array of shape (96,)"),
        (lambda inputs: {"advantage_R": inputs.advantage_R.astype(np.float32)}, "advantage_R of shape (96,) and dtype"),
        (lambda inputs: {"advantage_R": inputs.advantage_R * np.nan}, "an advantage_R that is not finite"),
        (lambda inputs: {"keep_T": np.ones(96, dtype=bool)}, "keep_T of shape (96,) and dtype bool: expected a NumPy"),
        (lambda inputs: {"keep_T": np.ones(len(inputs.rollout_T))}, "dtype bool, one value for each token"),
        (lambda inputs: {"keep_T": np.ones(len(inputs.rollout_T), dtype=bool)}, "rejects its rollout 0 in keep_R"),
        (lambda inputs: {"probability_R": np.full(96, 1.5)}, "a probability_R outside [0, 1]"),
        (lambda inputs: {"probability_R": np.ones(3)}, "probability_R of shape (3,) and dtype float64"),
    ],
)
def test_a_verdict_that_does_not_fit_is_refused(
    changes: Callable[[RuleInputs], Any], message: str, scored_batch: Callable[..., Any]
) -> None:
    controller = EntropyController(schedules.constant(1.0), mine(changes))
    before = controller.state_dict()
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        scored_batch(0).decide(controller, 0)
    assert str(caught.value).startswith("rule mine() ")
    assert controller.state_dict() == before
