"""The band of entropies around a schedule that a rule leaves alone."""

import contextlib
import math
from dataclasses import dataclass

from entrocraft.schedules import NotMeasured, Schedule, anchored


@dataclass(frozen=True, slots=True, kw_only=True)
class Band:
    """Two edges, in nats, that move with the step, and a target between them. Build with `band` or `between`.

    low, high: schedules of the edges. centre: schedule of the target; None takes their midpoint.
    Calling it with a step gives `(lo, hi)`. An edge that would lie below 0 is given as 0, which no entropy is below.
    """

    low: Schedule
    high: Schedule
    centre: Schedule | None = None

    def target(self, step: float) -> float:
        """Target entropy, nats.

        Raises:
            ValueError: the edges are crossed or not finite, or the target is negative.
        """
        low, high = _nats(self.low, step), _nats(self.high, step)
        if not (math.isfinite(low) and math.isfinite(high)):
            raise ValueError(f"the schedule gives a band from {low!r} to {high!r} nats at step {step!r}: not finite")
        if low > high:
            raise ValueError(
                f"lo > hi at step {step!r}: the band runs from lo = {low!r} to hi = {high!r} nats; swap the two "
                "schedules, or make the width >= 0"
            )
        target = (low + high) / 2.0 if self.centre is None else _nats(self.centre, step)
        if target < 0.0:
            raise ValueError(f"the schedule gives {target!r} nats at step {step!r}: entropy is never negative")
        return target

    def __call__(self, step: float) -> tuple[float, float]:
        """`(lo, hi)` in nats at this step; errors as `target`."""
        self.target(step)
        return max(_nats(self.low, step), 0.0), _nats(self.high, step)

    def anchored(self, entropy: float) -> "Band":
        """The same band with measured schedules anchored at `entropy` nats."""
        centre = None if self.centre is None else anchored(self.centre, entropy)
        return Band(low=anchored(self.low, entropy), high=anchored(self.high, entropy), centre=centre)

    def check(self, last_step: int, vocab_size: int | None = None) -> None:
        """Look at every step from 0 to `last_step` now, rather than fail in the middle of a run.

        Raises:
            NotMeasured: a step whose schedule waits for the first entropy; those before it are fine.
            ValueError: as `target`, or hi above log V, which no distribution over V tokens reaches.
        """
        for step in range(last_step + 1):
            check_reachable(self(step)[1], step, vocab_size)


def check_reachable(high: float, step: float, vocab_size: int | None) -> None:
    """Raise ValueError if `high` nats is more than a distribution over `vocab_size` tokens can have."""
    if vocab_size is not None and high > math.log(vocab_size):
        raise ValueError(
            f"the band reaches hi = {high!r} nats at step {step!r}, above log(vocab_size = {vocab_size}) = "
            f"{math.log(vocab_size):.4f}: no policy gets there; lower the schedule or the width"
        )


def band(schedule: Schedule, width: float) -> Band:
    """The band of `width` nats centred on `schedule`: lo, hi = schedule(step) -+ width / 2.

    Source: arXiv 2604.26326, where every range has width 0.1. Width 0 leaves nothing in between: each batch is too
    high or too low.

    Raises:
        ValueError: width < 0 (lo > hi) or not finite, or schedule is no function of the step.
    """
    if not 0.0 <= width < math.inf:
        raise ValueError(f"width = {width!r}: expected a finite number of nats >= 0 (below 0, lo > hi)")
    if not callable(schedule):
        raise ValueError(f"schedule = {schedule!r}: expected a function of the step, such as schedules.constant(0.5)")
    return Band(low=_Shifted(schedule, -width / 2.0), high=_Shifted(schedule, width / 2.0), centre=schedule)


def between(low: Schedule, high: Schedule) -> Band:
    """The band between two schedules that move each on its own, as the released code of the paper takes them.

    Raises:
        ValueError: lo > hi, at once where step 0 can be looked at, at the offending step otherwise.
    """
    for name, schedule in (("low", low), ("high", high)):
        if not callable(schedule):
            raise ValueError(f"{name} = {schedule!r}: expected a function of the step, such as schedules.constant(0.5)")
    made = Band(low=low, high=high)
    with contextlib.suppress(NotMeasured):
        made.target(0)
    return made


@dataclass(frozen=True, slots=True)
class _Shifted:
    schedule: Schedule
    offset: float

    def __call__(self, step: float) -> float:
        return _nats(self.schedule, step) + self.offset

    def anchored(self, entropy: float) -> "_Shifted":
        return _Shifted(anchored(self.schedule, entropy), self.offset)


def _nats(schedule: Schedule, step: float) -> float:
    """The schedule's value as a Python number, whatever scalar it gave: it goes into states and metrics."""
    value = schedule(step)
    if not hasattr(value, "__float__"):
        raise ValueError(f"the schedule gives {value!r} at step {step!r}: expected a number of nats")
    return float(value)
