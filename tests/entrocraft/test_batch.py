"""What is measured of a batch, against plain loops and NumPy, and every bad argument named."""

import math
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from entrocraft import TokenStats
from entrocraft.batch import Batch


def _of(batch: Any, **changes: Any) -> Batch:
    fields = {name: getattr(batch, name) for name in ("stats", "rollout_T", "group_R", "advantage_R")} | {
        "reward_R": batch.reward_R,
        "mask_T": batch.mask_T,
        "sample_R": None,
    }
    fields |= changes
    return Batch.of(**fields)


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("seed", range(3))
def test_measurements(seed: int, masked: bool, scored_batch: Callable[..., Any]) -> None:
    scored = scored_batch(seed)
    batch = _of(scored, mask_T=scored.mask_T if masked else None)
    tokens: dict[int, list[tuple[float, float]]] = {}
    for t, r in enumerate(scored.rollout_T.tolist()):
        if scored.mask_T[t] or not masked:
            tokens.setdefault(r, []).append((float(scored.stats.entropy_T[t]), float(scored.stats.logprob_T[t])))
    every = [pair for pairs in tokens.values() for pair in pairs]
    assert batch.entropy == pytest.approx(np.mean([h for h, _ in every]), rel=1e-12)
    means = [np.mean([h for h, _ in pairs]) for pairs in tokens.values()]
    assert batch.entropy_seq_mean == pytest.approx(np.mean(means), rel=1e-12)
    for share in (0.0, 0.1, 0.5, 0.9, 1.0):
        expected = np.percentile([h for h, _ in every], 100 * share)
        assert batch.entropy_percentile(share) == pytest.approx(expected, rel=1e-12)
    for sign in (1, -1):
        chosen = sign * batch.advantage_R > 0
        logprobs = [lp for r, pairs in tokens.items() if chosen[r] for _, lp in pairs]
        assert batch.logprob_mean(chosen) == pytest.approx(np.mean(logprobs), rel=1e-12)
    assert batch.counted_R.tolist() == [len(tokens.get(r, [])) for r in range(len(scored.group_R))]


def test_samples_are_numbered_by_appearance() -> None:
    one_T = torch.ones(6)
    batch = Batch.of(
        TokenStats(logprob_T=-one_T, entropy_T=one_T, lse_T=one_T),
        torch.arange(6),
        torch.tensor([4, 2, 4, 4, 2, 9]),
        torch.ones(6),
        reward_R=None,
        mask_T=None,
        sample_R=None,
    )
    assert batch.sample_R.tolist() == [0, 0, 1, 2, 1, 0]


def test_rollouts_without_a_token_and_masked_nan(scored_batch: Callable[..., Any]) -> None:
    # What the mask hides may be anything, as long as it is hidden.
    one_T = torch.tensor([1.0, math.nan, 3.0])
    batch = Batch.of(
        TokenStats(logprob_T=-one_T, entropy_T=one_T, lse_T=one_T),
        torch.tensor([1, 1, 3]),
        torch.zeros(5, dtype=torch.int64),
        torch.ones(5),
        reward_R=None,
        mask_T=torch.tensor([True, False, True]),
        sample_R=None,
    )
    assert batch.entropy == 2.0
    assert batch.entropy_R.tolist() == [0.0, 1.0, 0.0, 3.0, 0.0]
    assert batch.logprob_mean(np.array([True, True, True, False, True])) == -1.0
    assert math.isnan(batch.logprob_mean(np.array([True, False, True, False, True])))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (lambda b: {"mask_T": torch.zeros_like(b.mask_T)}, "no token counts"),
        (lambda b: {"mask_T": b.mask_T.float()}, "mask_T must be bool"),
        (lambda b: {"rollout_T": b.rollout_T.flip(0)}, "rollout_T must not decrease"),
        (lambda b: {"rollout_T": b.rollout_T[:-1], "mask_T": None}, "expected the same tokens"),
        (lambda b: {"group_R": b.group_R - 1}, "group_R must be >= 0, got -1"),
        (lambda b: {"group_R": b.group_R.int()}, "group_R must be one-dimensional int64"),
        (lambda b: {"sample_R": b.sample_R[1:]}, "sample_R must be one-dimensional int64 like group_R"),
        (lambda b: {"sample_R": b.sample_R // 2}, "must name each rollout once, got some pair twice"),
        (lambda b: {"advantage_R": b.advantage_R[b.rollout_T]}, "give their mean over each rollout"),
        (lambda b: {"advantage_R": b.advantage_R * math.nan}, "advantage_R is not finite"),
        (lambda b: {"reward_R": b.reward_R[:3]}, "reward_R has shape (3,)"),
        (
            lambda b: {"stats": _poisoned(b.stats, int(b.mask_T.nonzero()[4]))},
            "entropy_T is not finite at a counted token",
        ),
    ],
)
def test_bad_batches_are_named(
    changes: Callable[[Any], dict[str, Any]], message: str, scored_batch: Callable[..., Any]
) -> None:
    scored = scored_batch(0)
    with pytest.raises(ValueError, match=re.escape(message)):
        _of(scored, **changes(scored))


def _poisoned(stats: TokenStats, at: int) -> TokenStats:
    entropy_T = stats.entropy_T.clone()
    entropy_T[at] = math.nan
    return TokenStats(logprob_T=stats.logprob_T, entropy_T=entropy_T, lse_T=stats.lse_T)
