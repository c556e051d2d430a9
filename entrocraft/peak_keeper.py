"""Stop while it is good: keep the best checkpoint by a validation metric, and how long the next run should be."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Peak:
    """What one evaluation says.

    is_best: the highest metric so far, the first of equal ones: save this checkpoint over the one kept.
    stop: the metric has been more than delta below the best for `patience` evaluations in a row.
    best, best_step: the kept checkpoint's metric and step, the one to roll forward from.
    next_budget: best_step + margin, steps to give the next run from the same start.
    """

    is_best: bool
    stop: bool
    best: float
    best_step: int
    next_budget: int


class PeakKeeper:
    """Follows a validation metric (higher is better), names its peak, and stops once it is clearly past it.

    It keeps numbers, not weights: the trainer saves its checkpoint whenever `is_best`, and goes back to it on `stop`.
    Stopping at the peak ends a run before its entropy and its metric collapse; it does nothing to either.

    Experimental: known from its paper's abstract alone. The next budget of peak step + 3 is the paper's; delta and
    patience are this project's, and so is reading a peak off a noisy metric, which favours lucky evaluations.
    Source: arXiv 2606.21090, early stop.

    Args:
        delta: >= 0, in units of the metric; a fall of at most this much is noise.
        patience: >= 1, evaluations in a row below best - delta before stopping; one above it starts the count anew.
        margin: >= 0, steps.

    Raises:
        ValueError: any of these out of range.
    """

    def __init__(self, delta: float, patience: int, margin: int = 3) -> None:
        if not 0.0 <= delta < math.inf:
            raise ValueError(f"delta = {delta!r}: expected finite and >= 0, in units of the metric, such as 0.02")
        if patience < 1:
            raise ValueError(f"patience = {patience!r}: expected a number of evaluations >= 1")
        if margin < 0:
            raise ValueError(f"margin = {margin!r}: expected a number of steps >= 0, such as 3")
        self._delta, self._patience, self._margin = delta, patience, margin
        self._step: int | None = None
        self._best: float | None = None
        self._best_step = 0
        self._below = 0

    def observe(self, step: int, metric: float) -> Peak:
        """Take in one evaluation; steps must increase.

        Raises:
            ValueError: a metric that is not finite, a step < 0 or not after the last; the state is then as it was.
        """
        if not math.isfinite(metric):
            raise ValueError(f"metric = {metric!r} at step {step}: leave out an evaluation that failed")
        if step < 0 or (self._step is not None and step <= self._step):
            after = "" if self._step is None else f" and after the last, {self._step}"
            raise ValueError(f"step = {step!r}: expected an integer >= 0{after}")
        is_best = self._best is None or metric > self._best
        if is_best:
            self._best, self._best_step = float(metric), step
        assert self._best is not None, "the first evaluation is the best"
        self._below = self._below + 1 if metric < self._best - self._delta else 0
        self._step = step
        return Peak(
            is_best=is_best,
            stop=self._below >= self._patience,
            best=self._best,
            best_step=self._best_step,
            next_budget=self._best_step + self._margin,
        )

    def state_dict(self) -> dict[str, int | float | None]:
        """The state as plain numbers and None: last step, best metric and its step, evaluations below."""
        return {"step": self._step, "best": self._best, "best_step": self._best_step, "below": self._below}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state_dict()`.

        Raises:
            ValueError: entries missing, unknown, of the wrong type or negative.
        """
        if set(state) != {"step", "best", "best_step", "below"}:
            raise ValueError(f"state of PeakKeeper has {sorted(state)}: expected below, best, best_step, step")
        for name in ("step", "best_step", "below"):
            value = state[name]
            absent = name == "step" and value is None
            if not absent and (isinstance(value, bool) or not isinstance(value, int) or value < 0):
                raise ValueError(f"state of PeakKeeper has {name} = {value!r}: expected an integer >= 0")
        best = state["best"]
        number = isinstance(best, int | float) and not isinstance(best, bool) and math.isfinite(best)
        if (best is None) != (state["step"] is None) or not (best is None or number):
            raise ValueError(
                f"state of PeakKeeper has best = {best!r}: expected a finite number, or None before the first"
            )
        self._step, self._best = state["step"], best
        self._best_step, self._below = state["best_step"], state["below"]
