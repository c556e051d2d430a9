"""Time and memory of one call on one device."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Thunk = Callable[[], object]
FLUSH_BYTES = 256 << 20  # more than any last-level cache
MEMORY_WORDS = (
    "out of memory",
    "allocate memory",
    "bad_alloc",
    "alloc_failed",
    "could not create a",
    "start new thread",
)


def out_of_memory(said: str) -> bool:
    """Whether an error's text speaks of memory: torch's, a library's, or a compiler's that wraps it."""
    return any(words in said.lower() for words in MEMORY_WORDS)


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
