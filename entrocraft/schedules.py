"""Schedules: functions from the step to a target entropy in nats, and the band around one.

Any callable of one step is a schedule; those here are checked when they are built and hold their end value for
ever after, so nothing else needs to know how many steps there are. `f` is the share of the way gone,
`clamp((step - begin) / steps, 0, 1)`. Entropy: what it is asked to be; getting there is the controller's, or a
method's. Source: linear and cosine are forms of the released code of arXiv 2604.26326; the others are known as
schedules of learning rates, and their use for entropy is this project's.
"""

import bisect
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from entrocraft.registry import resolve

Schedule = Callable[[float], float]

# Nats; above the log of any vocabulary, so that nothing is too large beside it.
_ANY_ENTROPY = 1e6


def constant(value: float) -> Schedule:
    """`value` nats at every step."""
    _entropy("value", value)
    return lambda step: value


def linear(start: float, end: float, steps: float, *, begin: float = 0) -> Schedule:
    """`start + (end - start) f`: from `start` at `begin` to `end`, `steps` steps later."""
    _entropy("start", start)
    _entropy("end", end)
    progress = _progress(steps, begin)
    # Written as a mixture so that both ends are met exactly, without rounding.
    return lambda step: start * (1.0 - progress(step)) + end * progress(step)


def cosine(start: float, end: float, steps: float, *, begin: float = 0) -> Schedule:
    """`start + (end - start) (1 - cos(pi f)) / 2`: level at both ends."""
    _entropy("start", start)
    _entropy("end", end)
    progress = _progress(steps, begin)

    def at(step: float) -> float:
        share = (1.0 - math.cos(math.pi * progress(step))) / 2.0
        return start * (1.0 - share) + end * share

    return at


def exponential(start: float, end: float, steps: float, *, begin: float = 0) -> Schedule:
    """`start (end / start)^f`: the same factor at every step; both ends > 0."""
    for name, value in (("start", start), ("end", end)):
        _entropy(name, value)
        if value == 0:
            raise ValueError(f"{name} = {value!r}: an exponential schedule needs > 0 nats; use linear to reach 0")
    progress = _progress(steps, begin)
    return lambda step: start ** (1.0 - progress(step)) * end ** progress(step)


def piecewise(points: Sequence[Sequence[float]]) -> Schedule:
    """Straight lines through `points`, pairs (step, nats) in order of step; level before the first, after the last."""
    if len(points) == 0:
        raise ValueError("points is empty: expected at least one pair (step, nats)")
    for point in points:
        if len(point) != 2:
            raise ValueError(f"points holds {point!r}: expected pairs (step, nats)")
    steps = [float(step) for step, _ in points]
    values = [float(value) for _, value in points]
    for value in values:
        _entropy("points", value)
    _increasing("points", steps)

    def at(step: float) -> float:
        right = bisect.bisect_right(steps, step)
        if right == 0 or right == len(steps):
            return values[max(right - 1, 0)]
        share = (step - steps[right - 1]) / (steps[right] - steps[right - 1])
        return values[right - 1] * (1.0 - share) + values[right] * share

    return at


@dataclass(frozen=True, slots=True)
class join:
    """One schedule after another: `schedules[k]` from step `boundaries[k-1]` on, counting its own steps from there."""

    schedules: Sequence[Schedule]
    boundaries: Sequence[float]

    def __post_init__(self) -> None:
        if len(self.schedules) == 0 or len(self.boundaries) != len(self.schedules) - 1:
            raise ValueError(
                f"join got {len(self.schedules)} schedules and {len(self.boundaries)} boundaries: expected one "
                "boundary (a step) between each two schedules"
            )
        for schedule in self.schedules:
            _callable("schedules", schedule)
        _increasing("boundaries", [0.0, *map(float, self.boundaries)])

    def __call__(self, step: float) -> float:
        index = bisect.bisect_right(self.boundaries, step)
        begin = self.boundaries[index - 1] if index else 0
        return self.schedules[index](step - begin)

    def anchored(self, entropy: float) -> "join":
        """The same with every part anchored at `entropy` nats."""
        return replace(self, schedules=[anchored(schedule, entropy) for schedule in self.schedules])


@dataclass(frozen=True, slots=True)
class oscillate:
    """`around + amplitude sin(2 pi step / period)`; `around` is a schedule or a number of nats."""

    around: Schedule | float
    amplitude: float
    period: float

    def __post_init__(self) -> None:
        if not 0 <= self.amplitude < math.inf:
            raise ValueError(f"amplitude = {self.amplitude!r}: expected a finite number of nats >= 0")
        if not 0 < self.period < math.inf:
            raise ValueError(f"period = {self.period!r}: expected a finite number of steps > 0")
        if not callable(self.around):
            _entropy("around", self.around)
            if self.amplitude > self.around:
                raise ValueError(
                    f"amplitude = {self.amplitude!r} is more than around = {self.around!r}: the schedule would "
                    "fall below 0 nats"
                )

    def __call__(self, step: float) -> float:
        centre = self.around(step) if callable(self.around) else self.around
        return centre + self.amplitude * math.sin(2.0 * math.pi * step / self.period)

    def anchored(self, entropy: float) -> "oscillate":
        """The same around a schedule anchored at `entropy` nats."""
        return replace(self, around=anchored(self.around, entropy)) if callable(self.around) else self


class NotMeasured(ValueError):
    """A schedule that begins at the first measured entropy was asked for a value before there was one."""


@dataclass(frozen=True, slots=True)
class measured:
    """A schedule that begins where the model stands: `build(first measured entropy)`, once that is known.

    `measured(lambda entropy: linear(entropy, 0.5, 300))`. The controller anchors it at the first entropy it sees;
    asked for a value before that, it raises `NotMeasured`.
    """

    build: Callable[[float], Schedule]

    def __post_init__(self) -> None:
        _callable("build", self.build)

    def __call__(self, step: float) -> float:
        raise NotMeasured(
            f"a measured schedule was asked for step {step!r} before any entropy was measured: anchor it first "
            "with schedules.anchored(schedule, entropy)"
        )

    def anchored(self, entropy: float) -> Schedule:
        """`build(entropy)`."""
        made = self.build(entropy)
        _callable(f"build({entropy!r})", made)
        return made


def anchored(schedule: Schedule, entropy: float) -> Schedule:
    """`schedule` with every measured part of it built from `entropy` nats; others come back as they are."""
    _entropy("entropy", entropy)
    anchor = getattr(schedule, "anchored", None)
    return schedule if anchor is None else anchor(entropy)


SCHEDULES: dict[str, Callable[..., Schedule]] = {
    "constant": constant,
    "linear": linear,
    "cosine": cosine,
    "exponential": exponential,
    "piecewise": piecewise,
    "join": join,
    "oscillate": oscillate,
}


def build(name: str, **arguments: Any) -> Schedule:
    """The schedule of that name, or of the import path `package.module:name`.

    `start="measured"` (or `value=`, `around=`) anchors it at the first measured entropy.

    Raises:
        ValueError: unknown name, arguments it does not take, or values it refuses; when it is anchored, values that
            the measured entropy does not allow.
    """
    make = resolve(SCHEDULES, name, "schedule")
    awaited = [key for key, value in arguments.items() if isinstance(value, str) and value == "measured"]

    def made(values: Mapping[str, Any]) -> Schedule:
        try:
            return make(**values)
        except TypeError as error:
            raise ValueError(f"schedule {name!r} was given {sorted(values)}: {error}") from error

    if not awaited:
        return made(arguments)
    # A trial, so that a bad argument shows now and not after the first rollouts. What depends on the entropy itself,
    # such as an amplitude of at most `around`, must wait for it.
    made(arguments | dict.fromkeys(awaited, _ANY_ENTROPY))
    return measured(lambda entropy: made(arguments | dict.fromkeys(awaited, entropy)))


def _entropy(name: str, value: float) -> None:
    if isinstance(value, str) or not 0.0 <= value < math.inf:
        raise ValueError(f"{name} = {value!r}: expected a finite entropy in nats, >= 0")


def _callable(name: str, value: object) -> None:
    if not callable(value):
        raise ValueError(f"{name} holds {value!r}: expected a function of the step, such as schedules.constant(0.5)")


def _increasing(name: str, steps: Sequence[float]) -> None:
    for before, after in itertools.pairwise(steps):
        if not before < after:
            raise ValueError(f"{name}: step {after!r} follows {before!r}; expected strictly increasing steps")


def _progress(steps: float, begin: float) -> Schedule:
    if not 0 < steps < math.inf:
        raise ValueError(f"steps = {steps!r}: expected a finite number of steps > 0; use constant for no change")
    if not 0 <= begin < math.inf:
        raise ValueError(f"begin = {begin!r}: expected a finite step >= 0")
    return lambda step: min(max((step - begin) / steps, 0.0), 1.0)
