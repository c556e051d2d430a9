"""Contenders side by side: checked, timed in interleaved rounds, weighed, and asked whether they repeat themselves."""

from __future__ import annotations

import gc
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

Thunk = Callable[[], object]
FLUSH_BYTES = 256 << 20  # more than any last-level cache
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


class Stopwatch:
    """Times and weighs calls on one device."""

    def __init__(self, device: str) -> None:
        self.device, self.gpu = device, device == "cuda"
        self._flush: Tensor | None = None

    def seconds(self, thunk: Thunk, *, cold: bool = False) -> float:
        """One call, the device idle before and after; cold: caches were overwritten first."""
        if cold:
            if self._flush is None:
                self._flush = torch.empty(FLUSH_BYTES if self.gpu else FLUSH_BYTES // 4, dtype=torch.uint8)
                self._flush = self._flush.to(self.device)
            self._flush.add_(1)
        if not self.gpu:
            started = time.perf_counter()
            thunk()
            return time.perf_counter() - started
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        begin.record()
        thunk()
        end.record()
        torch.cuda.synchronize()
        return begin.elapsed_time(end) / 1e3

    def peak_bytes(self, thunk: Thunk) -> int:
        """What torch allocates during a call, at its highest, beyond what was there before and what is returned.

        On a CPU it is the sum over torch's own allocations, as the profiler reports them; what a matrix library takes
        for itself is not seen.
        """
        return self._peak_bytes_gpu(thunk) if self.gpu else _peak_bytes_cpu(thunk)

    def _peak_bytes_gpu(self, thunk: Thunk) -> int:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        kept = thunk()
        torch.cuda.synchronize()
        peak, after = torch.cuda.max_memory_allocated(), torch.cuda.memory_allocated()
        del kept
        return peak - max(before, after)

    def interleaved(self, thunks: dict[str, Thunk], rounds: int, *, cold: bool = False) -> dict[str, list[float]]:
        """Seconds of each round of each, one after the other in every round, in turning order."""
        names, taken = list(thunks), {name: [] for name in thunks}
        for number in range(rounds):
            turn = number % max(1, len(names))
            for name in names[turn:] + names[:turn]:
                taken[name].append(self.seconds(thunks[name], cold=cold))
        return taken


def _peak_bytes_cpu(thunk: Thunk) -> int:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            kept = thunk()
    assert profile.profiler is not None
    assert profile.profiler.kineto_results is not None
    events: list[Any] = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = highest = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        highest = max(highest, now)
    del kept
    return highest - max(0, now)


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


def _checked(one: Contender) -> tuple[dict[str, float], bool]:
    """Errors of a first call, which also compiles and warms up, and whether a second gives the same bits.

    A function, so that no gradient outlives it to stand beside those of the next contender.
    """
    first = one.thunk()
    return one.errors(first), same_bits(first, one.thunk())


def compete(contenders: dict[str, Contender], device: str, rounds: int) -> dict[str, Measured | str]:
    """Checks all, then times those that are right, in interleaved rounds with warm caches and a third as many with
    cold ones, but three where there are as many; says of the others why they were not timed."""
    watch = Stopwatch(device)
    found: dict[str, Measured | str] = {}
    infos: dict[str, dict[str, Any]] = {}
    for name, one in contenders.items():
        try:
            errors, repeats = _checked(one)
            wrong = complaint(name, errors, one.bounds)
            if wrong is None:
                peak = watch.peak_bytes(one.thunk)
                infos[name] = {"settings": one.settings, "errors": errors, "repeats": repeats, "peak_bytes": peak}
        except torch.OutOfMemoryError:
            wrong = f"{name} does not fit into this machine's memory"
        except ImportError as error:
            wrong = f"{name} cannot be imported: {error}"
        if wrong is not None:
            found[name] = wrong
        if watch.gpu:  # only here, when no traceback holds the frames of a call that did not fit any more
            gc.collect()
            torch.cuda.empty_cache()
    thunks = {name: contenders[name].thunk for name in infos}
    warm = watch.interleaved(thunks, rounds)
    cold = watch.interleaved(thunks, max(min(rounds, COLD_ROUNDS), rounds // 3), cold=True)
    for name, info in infos.items():
        found[name] = Measured(warm[name], {"rival": name, **_cold(cold[name]), **info})
    return found


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
