"""What a controller remembers from one decision to the next."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from entrocraft.release import Memory

_WHOLE = ("decided", "step", "batches", "falling", "stuck", "since")
_COUNTS = ("decided", "denominator", "batches", "variance", "falling", "stuck")
_ALWAYS_KNOWN = ("decided", "gain", "numerator", "denominator", "batches", "variance", "falling", "stuck")


@dataclass(frozen=True, slots=True, kw_only=True)
class ControllerState:
    """All that a controller remembers; plain numbers, so that JSON keeps it exactly. None: not known yet.

    decided: decisions made. step: of the last one. entropy: then, nats. predicted: P(kept), nats for a unit step, of
    the last decision. gain, numerator, denominator: see `Gain`. anchor: first entropy measured, nats. excess: first
    target minus that, nats. kept_fraction: share of rollouts kept by the last decision. release: see `Memory`; in
    `as_dict` a mapping of its own.
    """

    decided: int = 0
    step: int | None = None
    entropy: float | None = None
    predicted: float | None = None
    gain: float = 10.0
    numerator: float = 0.0
    denominator: float = 0.0
    anchor: float | None = None
    excess: float | None = None
    kept_fraction: float | None = None
    release: Memory = field(default_factory=Memory)

    def as_dict(self) -> dict[str, Any]:
        """Plain Python numbers and None, in a mapping, and a mapping in it."""
        return asdict(self)

    @staticmethod
    def of(state: Mapping[str, Any]) -> "ControllerState":
        """The inverse of `as_dict`. A state that an older version wrote, without `release`, is refused like any other.

        Raises:
            ValueError: entries missing or unknown, or values of another type than `as_dict` gives.
        """
        _check_names(state, ControllerState, "controller state")
        release, numbers = state["release"], {name: value for name, value in state.items() if name != "release"}
        if not isinstance(release, Mapping):
            raise ValueError(f"controller state has release = {release!r}: expected a mapping")
        _check_names(release, Memory, "controller state's release")
        for name, value in (*numbers.items(), *release.items()):
            _check_number(name, value)
        for name, value in (*numbers.items(), *release.items()):
            if name in _COUNTS and value < 0:
                raise ValueError(f"controller state has {name} = {value!r}: expected >= 0")
        if not numbers["gain"] > 0:
            raise ValueError(f"controller state has gain = {numbers['gain']!r}: expected > 0")
        if (numbers["anchor"] is None) != (numbers["excess"] is None):
            raise ValueError(
                f"controller state has anchor = {numbers['anchor']!r} and excess = {numbers['excess']!r}: expected two "
                "numbers, or None before the first batch"
            )
        return ControllerState(**numbers, release=Memory(**release))


def _check_names(state: Mapping[str, Any], kind: type[ControllerState | Memory], what: str) -> None:
    known = {entry.name for entry in fields(kind)}
    if set(state) != known:
        raise ValueError(
            f"{what} lacks {sorted(known - set(state))} and has unknown {sorted(set(state) - known)}: "
            "expected what state_dict() of this version returned"
        )


def _check_number(name: str, value: object) -> None:
    kind = int if name in _WHOLE else (int, float)
    fits = isinstance(value, kind) and not isinstance(value, bool) and math.isfinite(value)
    if not fits and (value is not None or name in _ALWAYS_KNOWN):
        expected = "an integer" if name in _WHOLE else "a finite number"
        also = "" if name in _ALWAYS_KNOWN else " or None"
        raise ValueError(f"controller state has {name} = {value!r}: expected {expected}{also}")
