"""Contenders side by side: checked, timed in interleaved rounds, weighed, and asked whether they repeat themselves."""

from __future__ import annotations

import contextlib
import gc
import statistics
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
from suite_journal import JOURNAL
from suite_watch import Stopwatch, Thunk, out_of_memory
from torch import Tensor

COLD_ROUNDS = 3  # of which a median is more than one sample


class Clock:
    """A timer for pytest-benchmark that tells what has been measured already, so that rounds can be interleaved."""

    def __init__(self) -> None:
        self.now = 0.0
        self._coming: Iterator[float] = iter(())

    def __call__(self) -> float:
        return self.now

    def play(self, seconds: list[float]) -> Thunk:
        """What to hand to `benchmark.pedantic` for as many rounds as there are seconds."""
        self._coming = iter(seconds)
        return self._tick

    def _tick(self) -> None:
        self.now += next(self._coming, 0.0)


def turned(names: list[str], number: int) -> list[str]:
    """The order of a round: every contender comes first in its turn."""
    turn = number % max(1, len(names))
    return names[turn:] + names[:turn]


def same_bits(first: object, second: object) -> bool:
    """Whether two results (tensors, or nests of them) agree to the last bit."""
    if isinstance(first, Tensor):
        return isinstance(second, Tensor) and torch.equal(first, second)
    if isinstance(first, (tuple, list)):
        return isinstance(second, (tuple, list)) and all(same_bits(a, b) for a, b in zip(first, second, strict=True))
    return first == second


def machine_rates(device: str, dtype: torch.dtype, T: int, H: int, V: int) -> dict[str, float]:
    """What this machine gives here and now: its own product of this shape in TFLOP/s, and a copy in GB/s.

    The product is torch's, in `dtype` and, on a CPU, in fp32 too, whichever is the faster: the rate that a head could
    reach. It is split by columns as large heads must be. The median of five calls.
    """
    watch, best = Stopwatch(device), 0.0
    columns = min(V, 16_384)
    for kind in {dtype, torch.float32} if device == "cpu" else {dtype}:
        left, right = torch.randn(T, H, device=device).to(kind), torch.randn(columns, H, device=device).to(kind)
        room = torch.empty(T, columns, device=device, dtype=kind)

        def product(left: Tensor = left, right: Tensor = right, room: Tensor = room) -> None:
            torch.mm(left, right.T, out=room)

        product()
        took = statistics.median(watch.seconds(product) for _ in range(5))
        best = max(best, 2e-12 * T * H * columns / took)
    source = torch.ones((1 << 30) if device == "cuda" else (1 << 24), dtype=torch.uint8, device=device)
    goal = torch.empty_like(source)
    took = statistics.median(watch.seconds(lambda: goal.copy_(source)) for _ in range(5))
    return {"gemm_tflops": best, "copy_gbs": 2e-9 * source.numel() / took}


CLOCK = Clock()  # for `@pytest.mark.benchmark(timer=CLOCK)`


class Contender(NamedTuple):
    """One of those who do the same thing."""

    thunk: Thunk
    settings: str
    errors: Callable[[Any], dict[str, float]]
    """Of what the thunk returns, against the truth."""
    bounds: dict[str, float]
    """Errors beyond which it is not timed."""


@dataclass(frozen=True, slots=True)
class Measured:
    """Seconds of each round of a contender, and what else was found out."""

    seconds: list[float]
    info: dict[str, Any]


def complaint(name: str, errors: dict[str, float], bounds: dict[str, float]) -> str | None:
    """Why a contender may not be timed: its error is beyond what its arithmetic explains, or not a number."""
    wrong = [
        f"{key} {errors[key]:.3g} > {bound:.3g}"
        for key, bound in bounds.items()
        if key in errors and not errors[key] <= bound
    ]
    return f"{name} is wrong and is not timed: {', '.join(wrong)}" if wrong else None


def is_ours(name: str) -> bool:
    """Whether a contender is this project's: what it raises is a fault here, and no reason to go on."""
    return name.startswith("entrocraft")


def _checked(one: Contender, watch: Stopwatch) -> tuple[dict[str, float], bool, float]:
    """Errors of a first call, which also compiles and warms up; whether a second gives the same bits; its seconds.

    A function, so that no gradient outlives it to stand beside those of the next contender.
    """
    first, second = one.thunk(), []
    errors = one.errors(first)
    seconds = watch.seconds(lambda: second.append(one.thunk()))
    return errors, same_bits(first, second[0]), seconds


def _attempt(name: str, ours: bool, call: Thunk) -> str | None:
    """Why a contender goes no further; None: it does. Ours may only be too large."""
    try:
        call()
    except torch.OutOfMemoryError:
        return f"{name} does not fit into this machine's memory"
    except ImportError as error:
        if ours:
            raise
        return f"{name} cannot be imported: {error}"
    except Exception as error:
        if ours:
            raise
        if out_of_memory(str(error)):
            return f"{name} does not fit into this machine's memory: {_first_line(error)}"
        return f"{name} failed: {_first_line(error)}"
    return None


def _first_line(error: Exception) -> str:
    line = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {line[:200]}" if line else type(error).__name__


class _Contest:
    """One group on its way: who is still in it, and what is known of each."""

    def __init__(self, contenders: dict[str, Contender], device: str, ours: frozenset[str]) -> None:
        self.contenders, self.watch, self.ours = contenders, Stopwatch(device), ours
        self.found: dict[str, Measured | str] = {}
        self.infos: dict[str, dict[str, Any]] = {}

    def attempt(self, name: str, call: Thunk) -> bool:
        """Whether a contender got through it; if not, it is out, and the reason is kept."""
        reason = _attempt(name, is_ours(name) or name in self.ours, call)
        if reason is not None:
            self.found[name] = reason
            self.infos.pop(name, None)
            JOURNAL.refuse(name, reason)
            JOURNAL.write()
        if self.watch.gpu and (reason is not None or name not in self.infos):
            gc.collect()  # only here, when no traceback holds the frames of a call that did not fit any more
            torch.cuda.empty_cache()
        return reason is None

    def check(self, name: str) -> None:
        """Errors, bits and memory; the second call's time stands in the journal until there are rounds."""
        one, made = self.contenders[name], []
        if not self.attempt(name, lambda: made.append(_checked(one, self.watch))):
            return
        errors, repeats, seconds = made[0]
        wrong = complaint(name, errors, one.bounds)
        if wrong is not None:
            self.found[name] = wrong
            JOURNAL.refuse(name, wrong)
            JOURNAL.write()
            return
        weighed: list[int] = []
        if self.attempt(name, lambda: weighed.append(self.watch.peak_bytes(one.thunk))):
            info = {"settings": one.settings, "errors": errors, "repeats": repeats, "peak_bytes": weighed[0]}
            self.infos[name] = info
            JOURNAL.row(name, [seconds], info)
            JOURNAL.write()

    def rounds(self, number: int, *, cold: bool = False) -> dict[str, list[float]]:
        """Seconds of each round of each, interleaved in turning order; one that fails on its way is out."""
        taken: dict[str, list[float]] = {name: [] for name in self.infos}
        for turn in range(number):
            for name in turned(list(self.infos), turn):
                thunk = self.contenders[name].thunk
                self.attempt(
                    name, lambda one=taken[name], thunk=thunk: one.append(self.watch.seconds(thunk, cold=cold))
                )
            if not cold:
                for name, info in self.infos.items():
                    JOURNAL.row(name, taken[name], info)
                JOURNAL.write()
        return taken


def compete(
    contenders: dict[str, Contender], device: str, rounds: int, *, ours: Iterable[str] = ()
) -> dict[str, Measured | str]:
    """Checks all, then times those that are right, in interleaved rounds: with warm caches, then a third as
    many, but at least three where there are as many, with cold ones. Says of the others why they were not timed. What
    is known stands in the journal after each step.

    A rival that raises is out, with its reason; what one of `ours` raises, or one whose name says so, is raised.
    """
    contest = _Contest(contenders, device, frozenset(ours))
    for name in contenders:
        contest.check(name)
    warm = contest.rounds(rounds)
    cold = contest.rounds(max(min(rounds, COLD_ROUNDS), rounds // 3), cold=True)
    for name, info in contest.infos.items():
        contest.found[name] = Measured(warm[name], {"rival": name, **_cold(cold[name]), **info})
    return contest.found


NO_ROOM: dict[str, str] = {}  # group -> why its operands could not be made


@contextlib.contextmanager
def room_for(group: str) -> Iterator[None]:
    """Skips a group whose operands, or the truth to compare with, do not fit on the GPU, with the reason; the next
    contender of it does not try again."""
    if group in NO_ROOM:
        pytest.skip(NO_ROOM[group])
    try:
        yield
    except torch.OutOfMemoryError as error:
        traceback.clear_frames(error.__traceback__)  # they hold what did fit
        NO_ROOM[group] = f"the operands, or the truth to compare with, do not fit: {_first_line(error)}"
    if group in NO_ROOM:
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        pytest.skip(NO_ROOM[group])


def _cold(seconds: list[float]) -> dict[str, float]:
    return {"cold_ms": 1e3 * statistics.median(seconds), "cold_rounds": len(seconds)}


def record(benchmark: Any, measured: Measured | str, **info: Any) -> None:
    """Hands rounds that were measured already, beside those of rivals, to a benchmark whose timer is CLOCK.

    On a GPU a contender that does not fit or cannot be imported is a result, told as a skip. Anything else that kept
    one from being timed is a failure.
    """
    if isinstance(measured, str):
        excused = torch.cuda.is_available() and " is wrong " not in measured
        (pytest.skip if excused else pytest.fail)(measured)
    benchmark.extra_info.update(measured.info | info)
    benchmark.pedantic(CLOCK.play(measured.seconds), rounds=len(measured.seconds))
