"""Time, memory and matrix products of one shape on one device."""

from __future__ import annotations

import statistics
import sys
from typing import Any

import torch
from head_cases import SHAPES, Case, make_case
from suite_cases import DTYPE
from suite_watch import Stopwatch, Thunk

SPLIT = 16_384  # columns of the vocabulary that torch multiplies at a time


class Bench:
    """One shape on one device."""

    def __init__(self, shape: str, device: str, rounds: int) -> None:
        self.shape, self.device, self.rounds = shape, device, rounds
        self.T, self.H, self.V = SHAPES[shape]
        self.dtype = DTYPE
        self.watch = Stopwatch(device)
        self.gpu = self.watch.gpu

    def case(self, **more: Any) -> Case:
        T = more.pop("T", self.T)
        return make_case(T, self.H, self.V, device=self.device, dtype=self.dtype, **more)

    def times(self, contenders: dict[str, Thunk]) -> dict[str, float]:
        """Median milliseconds of each, in interleaved rounds after one to warm up; nothing for what runs out of
        memory."""
        taken: dict[str, list[float]] = {}
        for name, thunk in contenders.items():
            try:
                thunk()
                taken[name] = []
            except torch.OutOfMemoryError:
                print(f"  {name} does not fit", file=sys.stderr)
                torch.cuda.empty_cache()
        for _ in range(self.rounds):
            for name in taken:
                taken[name].append(1e3 * self.watch.seconds(contenders[name]))
        return {name: statistics.median(values) for name, values in taken.items()}

    def products(self, case: Case) -> Thunk:
        """One product of 2 T V H operations by torch, split by columns as large heads must be."""
        room = torch.empty(self.T, min(SPLIT, self.V), device=self.device, dtype=self.dtype)

        def product() -> None:
            with torch.no_grad():
                for part_VH in case.weight_VH.split(SPLIT):
                    torch.mm(case.hidden_TH, part_VH.T, out=room[:, : len(part_VH)])

        return product

    def peak_bytes(self, thunk: Thunk) -> int | None:
        """What a call takes beyond what is there before and what it returns; None where torch does not count."""
        if not self.gpu:
            return None
        thunk()
        return self.watch.peak_bytes(thunk)
