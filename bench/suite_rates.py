"""What follows from a median: operations and bytes a second, the share of the machine's own rate, the floor."""

from __future__ import annotations

from typing import NamedTuple


class Work(NamedTuple):
    """What one call does."""

    operations: float
    """Of one product; for whole models, of one pass."""
    useful: float
    """Products that nobody can do without."""
    executed: float
    """Products that were made."""
    moved_bytes: int
    """That must move whoever does it; 0 where that is not counted."""


def derived(work: Work, seconds: float, rate: dict[str, float]) -> dict[str, float]:
    """Useful and executed TFLOP/s, the share of this machine's own product rate, GB/s, and the floor.

    The floor is the larger of the useful products at the machine's rate and of the bytes that must move at the rate of
    its copies. rate: of `machine_rates`.
    """
    executed = 1e-12 * work.executed * work.operations / seconds
    least = 1e-12 * work.useful * work.operations / rate["gemm_tflops"]
    found = {
        "useful_tflops": 1e-12 * work.useful * work.operations / seconds,
        "executed_tflops": executed,
        "executed_products": work.executed,
        "useful_products": work.useful,
        "useful_operations": work.useful * work.operations,
        "share_of_gemm": executed / rate["gemm_tflops"],
        "floor_ms": 1e3 * max(least, 1e-9 * work.moved_bytes / rate["copy_gbs"]),
    }
    if work.moved_bytes:
        found |= {"gbs": 1e-9 * work.moved_bytes / seconds, "moved_bytes": work.moved_bytes}
    return found | rate
