"""Whole trajectories against closed forms, ends met exactly, composition, and what is refused."""

import math
import re
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from entrocraft import schedules
from entrocraft.schedules import Schedule

STEPS = 40

CLOSED_FORMS: dict[str, Callable[[float, float, float], float]] = {
    "linear": lambda start, end, f: start + (end - start) * f,
    "cosine": lambda start, end, f: start + (end - start) * (1 - math.cos(math.pi * f)) / 2,
    "exponential": lambda start, end, f: start * math.exp(f * math.log(end / start)),
}


@pytest.mark.parametrize("name", CLOSED_FORMS)
@pytest.mark.parametrize(("start", "end"), [(1.1, 0.5), (0.1, 0.7), (0.3, 0.3)])
@pytest.mark.parametrize("begin", [0, 1, 15])
def test_whole_trajectory(name: str, start: float, end: float, begin: int) -> None:
    schedule = schedules.build(name, start=start, end=end, steps=STEPS, begin=begin)
    for step in range(begin + STEPS + 20):
        f = min(max((step - begin) / STEPS, 0.0), 1.0)
        assert schedule(step) == pytest.approx(CLOSED_FORMS[name](start, end, f), rel=1e-12)
    assert schedule(begin) == start
    assert schedule(begin + STEPS) == end
    assert schedule(10**9) == end


@given(
    name=st.sampled_from(sorted(CLOSED_FORMS)),
    start=st.floats(0.01, 5.0),
    end=st.floats(0.01, 5.0),
    steps=st.integers(1, 500),
)
def test_ends_are_met_and_values_lie_between(name: str, start: float, end: float, steps: int) -> None:
    schedule = schedules.build(name, start=start, end=end, steps=steps)
    values = [schedule(step) for step in range(steps + 2)]
    assert values[0] == start
    assert values[steps] == values[steps + 1] == end
    assert min(values) >= min(start, end) * (1 - 1e-12)
    assert max(values) <= max(start, end) * (1 + 1e-12)


def test_schedules_of_the_released_runs() -> None:
    # Linear 0.6 -> 0.4 and cosine 0.6 -> 0.1 over 444 steps, at the quarter points.
    linear, cosine = schedules.linear(0.6, 0.4, 444), schedules.cosine(0.6, 0.1, 444)
    assert [linear(s) for s in (0, 111, 222, 333, 444)] == pytest.approx([0.6, 0.55, 0.5, 0.45, 0.4])
    half = math.sqrt(0.5)
    expected = [0.6, 0.6 - 0.25 * (1 - half), 0.35, 0.6 - 0.25 * (1 + half), 0.1]
    assert [cosine(s) for s in (0, 111, 222, 333, 444)] == pytest.approx(expected)


def test_constant() -> None:
    assert [schedules.constant(0.5)(step) for step in (0, 1, 10**6)] == [0.5] * 3
    assert schedules.constant(0.0)(3) == 0.0


def test_piecewise() -> None:
    schedule = schedules.piecewise([(10, 1.0), (20, 0.5), (40, 0.9)])
    expected = {0: 1.0, 10: 1.0, 15: 0.75, 20: 0.5, 30: 0.7, 35: 0.8, 40: 0.9, 99: 0.9}
    assert {step: schedule(step) for step in expected} == pytest.approx(expected)
    assert [schedules.piecewise([(5, 0.3)])(step) for step in (0, 5, 9)] == [0.3] * 3


def test_join_counts_steps_from_each_boundary() -> None:
    schedule = schedules.join(
        [schedules.constant(1.0), schedules.linear(1.0, 0.5, 10), schedules.constant(0.2)], [5, 20]
    )
    expected = [1.0] * 5 + [1.0 - 0.05 * k for k in range(10)] + [0.5] * 5 + [0.2] * 4
    assert [schedule(step) for step in range(24)] == pytest.approx(expected)


def test_oscillate() -> None:
    schedule = schedules.oscillate(schedules.linear(1.0, 0.6, 40), amplitude=0.1, period=8)
    for step in range(60):
        centre = 1.0 - 0.4 * min(step / 40, 1.0)
        assert schedule(step) == pytest.approx(centre + 0.1 * math.sin(math.pi * step / 4), rel=1e-12)
    around_number = schedules.oscillate(0.5, amplitude=0.5, period=4)
    assert [around_number(s) for s in range(5)] == pytest.approx([0.5, 1.0, 0.5, 0.0, 0.5], abs=1e-12)


def test_measured_waits_for_the_first_entropy() -> None:
    schedule = schedules.measured(lambda entropy: schedules.linear(entropy, 0.5, 300))
    with pytest.raises(ValueError, match="before any entropy was measured"):
        schedule(0)
    anchored = schedules.anchored(schedule, 0.9)
    assert [anchored(s) for s in (0, 150, 300)] == pytest.approx([0.9, 0.7, 0.5])


def test_measured_inside_compositions() -> None:
    inner = schedules.build("linear", start="measured", end=0.5, steps=10)
    joined = schedules.join([inner, schedules.oscillate(inner, 0.05, 4)], [10])
    anchored = schedules.anchored(joined, 0.8)
    expected = [0.8 - 0.03 * s for s in range(10)] + [0.8, 0.77 + 0.05, 0.74, 0.71 - 0.05]
    assert [anchored(s) for s in range(14)] == pytest.approx(expected)


def test_anything_callable_is_a_schedule_and_needs_no_anchor() -> None:
    def mine(step: float) -> float:
        return 0.5 + step

    assert schedules.anchored(mine, 0.3) is mine


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: schedules.linear(1.0, 0.5, 0), "steps = 0: expected a finite number of steps > 0"),
        (lambda: schedules.cosine(1.0, 0.5, -3), "steps = -3"),
        (lambda: schedules.linear(1.0, 0.5, 5, begin=-1), "begin = -1: expected a finite step >= 0"),
        (lambda: schedules.linear(-0.1, 0.5, 5), "start = -0.1: expected a finite entropy in nats, >= 0"),
        (lambda: schedules.linear(0.1, math.nan, 5), "end = nan"),
        (lambda: schedules.constant(math.inf), "value = inf"),
        (lambda: schedules.exponential(1.0, 0.0, 5), "end = 0.0: an exponential schedule needs > 0 nats"),
        (lambda: schedules.piecewise([]), "points is empty"),
        (lambda: schedules.piecewise([(0, 1.0), (0, 0.5)]), "step 0.0 follows 0.0"),
        (lambda: schedules.piecewise([(3, 1.0), (1, 0.5)]), "strictly increasing"),
        (lambda: schedules.piecewise([(0, -1.0)]), "points = -1.0"),
        (lambda: schedules.piecewise([(0, 1.0, 2.0)]), "expected pairs (step, nats)"),
        (lambda: schedules.join([], []), "join got 0 schedules and 0 boundaries"),
        (lambda: schedules.join([schedules.constant(1.0)], [5]), "join got 1 schedules and 1 boundaries"),
        (lambda: schedules.join([schedules.constant(1.0)] * 2, []), "join got 2 schedules and 0 boundaries"),
        (lambda: schedules.join([schedules.constant(1.0)] * 3, [5, 5]), "step 5.0 follows 5.0"),
        (lambda: schedules.join([schedules.constant(1.0)] * 2, [0]), "step 0.0 follows 0.0"),
        (lambda: schedules.join([schedules.constant(1.0), 0.5], [3]), "schedules holds 0.5"),  # type: ignore[list-item]
        (lambda: schedules.oscillate(0.2, 0.3, 10), "amplitude = 0.3 is more than around = 0.2"),
        (lambda: schedules.oscillate(0.2, -0.1, 10), "amplitude = -0.1"),
        (lambda: schedules.oscillate(0.2, 0.1, 0), "period = 0"),
        (lambda: schedules.measured(0.5), "build holds 0.5"),  # type: ignore[arg-type]
        (lambda: schedules.anchored(schedules.constant(1.0), math.nan), "entropy = nan"),
        (
            lambda: schedules.build("liner", start=1.0, end=0.5, steps=5),
            "unknown schedule 'liner': did you mean 'linear'",
        ),
        (lambda: schedules.build("linear", start=1.0, stop=0.5, steps=5), "unexpected keyword argument 'stop'"),
        (lambda: schedules.build("linear", start=1.0), "missing"),
        (lambda: schedules.build("linear", start="measured", end=0.5, steps=0), "steps = 0"),
        (lambda: schedules.build("linear", start="mesured", end=0.5, steps=5), "start = 'mesured'"),
    ],
)
def test_refused(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        make()


def test_registry_builds_what_the_functions_build() -> None:
    pairs: list[tuple[Schedule, Schedule]] = [
        (schedules.build("constant", value=0.4), schedules.constant(0.4)),
        (schedules.build("piecewise", points=[[0, 1.0], [9, 0.1]]), schedules.piecewise([(0, 1.0), (9, 0.1)])),
        (
            schedules.build("oscillate", around="measured", amplitude=0.1, period=7).anchored(0.6),  # type: ignore[attr-defined]
            schedules.oscillate(0.6, 0.1, 7),
        ),
    ]
    for built, made in pairs:
        assert [built(s) for s in range(12)] == [made(s) for s in range(12)]


def test_what_depends_on_the_measured_entropy_waits_for_it() -> None:
    wave = schedules.build("oscillate", around="measured", amplitude=1.2, period=4)
    anchored = schedules.anchored(wave, 1.5)
    assert [anchored(step) for step in range(4)] == pytest.approx([1.5, 2.7, 1.5, 0.3])
    with pytest.raises(ValueError, match=r"amplitude = 1.2 is more than around = 0.9"):
        schedules.anchored(wave, 0.9)
    with pytest.raises(ValueError, match="period = 0"):
        schedules.build("oscillate", around="measured", amplitude=1.2, period=0)
