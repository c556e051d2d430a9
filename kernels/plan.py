"""Which way of computing the head's gradients pays, from sizes and a byte budget alone.

A product is 2 T V H operations. What each mode does, and what it keeps between forward and backward beyond O(T):

    mode         forward   backward                        kept, bytes
    statistics   1         none                            nothing
    recompute    1         3: logits again, dX, dW         nothing
    cache        1         2, + 1 for the rows not kept    e (V rounded up) + 4 tiles a kept row; e = 2 for bf16, fp16
    frozen       2 or 3    none                            4 T H (fp32), twice with the entropy's gradient

`frozen` needs a head without gradients (weight and bias). dX is linear in the upstream gradients of log-probability and
entropy, so their two factors are computed in the forward and the backward is elementwise.
`auto` takes the first that applies:

    1. no operand requires a gradient, or gradients are off        statistics
    2. only hidden does, and what frozen keeps is <= cache_bytes   frozen
    3. the exponentials of all T rows are <= cache_bytes           cache
    4. otherwise                                                   recompute

With `batch_invariant` 2 and 3 are left out, since what they choose depends on the other rows.
"""

from __future__ import annotations

import functools
import logging
from typing import NamedTuple

import torch

MODES = ("auto", "statistics", "recompute", "cache", "frozen")
_log = logging.getLogger("entrocraft.kernels")


class HeadPlan(NamedTuple):
    """What a call will do; its `str` says it in one line."""

    mode: str
    stored_rows: int
    """Rows whose exponentials are kept."""
    kept_bytes: int
    """Kept between forward and backward, beyond the operands and O(T)."""
    products: float
    """Matrix products of 2 T V H operations in forward and backward, all rows having a gradient."""

    def __str__(self) -> str:
        rows = f" of {self.stored_rows} rows" if self.mode == "cache" else ""
        return f"{self.mode}: {self.products:.3g} products, keeps {self.kept_bytes / 2**20:.1f} MiB{rows}"


def plan_head(
    T: int,
    H: int,
    *,
    mode: str = "auto",
    needs_hidden: bool = True,
    needs_weight: bool = True,
    entropy_gradient: bool = True,
    cache_bytes: int = 0,
    bytes_per_row: int,
    element_bytes: int = 4,
    batch_invariant: bool = False,
) -> HeadPlan:
    """The plan for T rows of hidden size H, by the rule at the top of this file; logged once for each size.

    Args:
        mode: one of MODES; anything but "auto" is taken at its word.
        needs_hidden, needs_weight: whether hidden, and weight or bias, require a gradient.
        entropy_gradient: whether the entropy's gradient will be asked for.
        cache_bytes: what may be kept between forward and backward.
        bytes_per_row: of the exponentials of one row.
        element_bytes: of the dtype that sums are kept in.
        batch_invariant: whether no row may be treated as its number or place among the others has it.

    Raises:
        ValueError: an unknown mode; statistics where a gradient is required; frozen where weight or bias require one;
            a cache that is batch-invariant and does not hold all rows.
    """
    needs = needs_hidden or needs_weight
    basis_bytes = element_bytes * T * H * (2 if entropy_gradient else 1)
    if mode not in MODES:
        raise ValueError(f"mode is {mode!r}; expected one of {', '.join(MODES)}")
    if mode == "statistics" and needs:
        raise ValueError(
            "mode is 'statistics', which has no gradient, but an operand requires one; use mode='auto', or call it "
            "under torch.no_grad()"
        )
    if mode == "frozen" and needs_weight:
        raise ValueError(
            "mode is 'frozen', but weight_VH or bias_V requires a gradient; freeze the head with requires_grad_(False) "
            "or use mode='recompute'"
        )
    if mode == "cache" and batch_invariant and needs and T * bytes_per_row > cache_bytes:
        raise ValueError(
            f"mode is 'cache' and batch_invariant, but cache_bytes = {cache_bytes} do not hold {T} rows of "
            f"{bytes_per_row} bytes: kept and recomputed rows would be rounded differently; give more, or use "
            "mode='recompute'"
        )
    free = mode == "auto" and not batch_invariant
    if not needs:
        plan = HeadPlan("statistics", 0, 0, 1)
    elif mode == "frozen" or (free and not needs_weight and basis_bytes <= cache_bytes):
        plan = HeadPlan("frozen", 0, basis_bytes, 3 if entropy_gradient else 2)
    elif mode == "cache" or (free and 0 < T * bytes_per_row <= cache_bytes):
        rows = min(T, cache_bytes // bytes_per_row)
        plan = HeadPlan("cache", rows, rows * bytes_per_row, _recomputed(needs_hidden, needs_weight) - rows / max(T, 1))
    else:
        plan = HeadPlan("recompute", 0, 0, _recomputed(needs_hidden, needs_weight))
    if not torch.compiler.is_compiling():
        _say(T, H, plan)
    return plan


@functools.lru_cache(maxsize=256)
def _say(T: int, H: int, plan: HeadPlan) -> None:
    _log.info("head of %d rows, hidden size %d: %s", T, H, plan)


def _recomputed(needs_hidden: bool, needs_weight: bool) -> int:
    return 2 + needs_hidden + needs_weight
