"""Bands: edges by hand, crossed or unreachable ones refused."""

import math

import pytest

from entrocraft import schedules
from entrocraft.bands import band, between


def test_edges_lie_half_a_width_from_the_target() -> None:
    made = band(schedules.linear(0.6, 0.2, 10), 0.1)
    for step in range(12):
        target = 0.6 - 0.4 * min(step / 10, 1.0)
        assert made(step) == pytest.approx((target - 0.05, target + 0.05))
        assert made.target(step) == schedules.linear(0.6, 0.2, 10)(step)


def test_no_width_is_a_line() -> None:
    assert band(schedules.constant(0.5), 0.0)(7) == (0.5, 0.5)


def test_an_edge_below_zero_is_zero() -> None:
    assert band(schedules.constant(0.02), 0.1)(0) == pytest.approx((0.0, 0.07))


def test_two_schedules_move_each_on_its_own() -> None:
    # The released linear run: (0.6, 0.7) -> (0.2, 0.4) here, so that the width changes too.
    made = between(schedules.linear(0.6, 0.2, 10), schedules.linear(0.7, 0.4, 10))
    assert [made(s) for s in (0, 5, 10)] == [pytest.approx(v) for v in ((0.6, 0.7), (0.4, 0.55), (0.2, 0.4))]
    assert [made.target(s) for s in (0, 5, 10)] == pytest.approx([0.65, 0.475, 0.3])


def test_anchoring_reaches_every_schedule_of_the_band() -> None:
    made = band(schedules.measured(lambda entropy: schedules.linear(entropy, 0.5, 10)), 0.2).anchored(0.9)
    assert made(5) == pytest.approx((0.6, 0.8))
    assert made.target(0) == 0.9
    pair = between(schedules.constant(0.1), schedules.measured(schedules.constant)).anchored(0.9)
    assert pair(3) == pytest.approx((0.1, 0.9))


def test_lo_above_hi() -> None:
    # The released code's default ranges, lower (1, 1) and upper (0, 0), end here and not in a strange run.
    with pytest.raises(ValueError, match=r"lo > hi at step 0: the band runs from lo = 1.0 to hi = 0.0"):
        between(schedules.constant(1.0), schedules.constant(0.0))
    later = between(schedules.constant(0.5), schedules.linear(0.6, 0.2, 10))
    with pytest.raises(ValueError, match="lo > hi at step 3"):
        later.check(10)
    # Compositions can be anchored, but need not wait for it.
    for high in (
        schedules.join([schedules.constant(0.0), schedules.constant(2.0)], [5]),
        schedules.oscillate(schedules.constant(0.1), 0.1, 10),
    ):
        with pytest.raises(ValueError, match="lo > hi at step 0"):
            between(schedules.constant(1.0), high)
    waiting = between(schedules.constant(1.0), schedules.join([schedules.measured(schedules.constant)], []))
    with pytest.raises(schedules.NotMeasured):
        waiting.target(0)
    with pytest.raises(ValueError, match="lo > hi at step 0"):
        waiting.anchored(0.9).target(0)

    def broken(step: float) -> float:
        raise ValueError("no such curve")

    with pytest.raises(ValueError, match="no such curve"):
        between(schedules.constant(0.0), schedules.join([broken], []))
    with pytest.raises(ValueError, match=r"width = -0.1: .* lo > hi"):
        band(schedules.constant(0.5), -0.1)


def test_values_no_entropy_can_have() -> None:
    with pytest.raises(ValueError, match=r"-0.5 nats at step 3: entropy is never negative"):
        band(lambda step: 1.0 - 0.5 * step, 0.1).check(5)
    with pytest.raises(ValueError, match="not finite"):
        band(lambda step: math.nan, 0.1)(0)
    made = band(schedules.linear(0.5, 2.5, 10), 0.1)
    made.check(6, vocab_size=8)  # 1.75 is below log 8 = 2.079
    with pytest.raises(ValueError, match=r"at step 8, above log\(vocab_size = 8\) = 2.0794"):
        made.check(10, vocab_size=8)


def test_a_number_is_no_schedule() -> None:
    with pytest.raises(ValueError, match=r"schedule = 0.5: expected a function"):
        band(0.5, 0.1)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"high = 0.5: expected a function"):
        between(schedules.constant(0.1), 0.5)  # type: ignore[arg-type]
