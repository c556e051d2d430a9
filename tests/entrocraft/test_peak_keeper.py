"""The peak of a curve made by hand, across a save and a load, and what is refused."""

import json
import math
from typing import Any

import pytest

from entrocraft.peak_keeper import PeakKeeper

CURVE = [(0, 0.10), (5, 0.30), (10, 0.28), (15, 0.30), (20, 0.24), (25, 0.26), (30, 0.24), (35, 0.23)]


@pytest.mark.parametrize("restart", [None, *range(1, len(CURVE))])
def test_a_curve_by_hand(restart: int | None) -> None:
    keeper, seen = PeakKeeper(delta=0.05, patience=2), []
    for k, (step, metric) in enumerate(CURVE):
        if k == restart:
            state = json.loads(json.dumps(keeper.state_dict()))
            keeper = PeakKeeper(delta=0.05, patience=2)
            keeper.load_state_dict(state)
        seen.append(keeper.observe(step, metric))
    # 0.30 at step 15 equals the peak: the first stays. 0.26 is within delta and starts the count anew.
    assert [peak.is_best for peak in seen] == [True, True] + [False] * 6
    assert [peak.stop for peak in seen] == [False] * 7 + [True]
    assert [(peak.best, peak.best_step, peak.next_budget) for peak in seen] == [(0.1, 0, 3)] + [(0.3, 5, 8)] * 7


def test_delta_is_exclusive_and_margin_is_used() -> None:
    keeper = PeakKeeper(delta=0.25, patience=1, margin=0)
    keeper.observe(3, 1.0)
    assert not keeper.observe(4, 0.75).stop
    assert keeper.observe(5, 0.5).stop
    assert keeper.observe(6, 2.0).next_budget == 6


@pytest.mark.parametrize(("name", "value"), [("delta", -0.1), ("delta", math.nan), ("patience", 0), ("margin", -1)])
def test_arguments_out_of_range(name: str, value: float) -> None:
    arguments: dict[str, Any] = {"delta": 0.1, "patience": 2, "margin": 3} | {name: value}
    with pytest.raises(ValueError, match=f"{name} = {value}"):
        PeakKeeper(**arguments)


def test_a_bad_evaluation_changes_nothing() -> None:
    keeper = PeakKeeper(delta=0.1, patience=1)
    keeper.observe(5, 0.5)
    before = keeper.state_dict()
    for step, metric, message in (
        (6, math.nan, "metric = nan at step 6"),
        (5, 0.6, "step = 5: expected an integer >= 0 and after the last, 5"),
    ):
        with pytest.raises(ValueError, match=message):
            keeper.observe(step, metric)
    assert keeper.state_dict() == before


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"step": 1}, "state of PeakKeeper has"),
        ({"step": -1, "best": 0.5, "best_step": 0, "below": 0}, "step = -1"),
        ({"step": 1, "best": None, "best_step": 0, "below": 0}, "best = None"),
        ({"step": 1, "best": 0.5, "best_step": 0, "below": 0.5}, "below = 0.5"),
    ],
)
def test_a_state_that_does_not_fit(state: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PeakKeeper(delta=0.1, patience=1).load_state_dict(state)
