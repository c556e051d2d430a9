"""One scored batch on the host: checked, summed rollout by rollout, in an order that nobody can change.

The sum over the tokens of a rollout sees nothing but them and sums over rollouts are exactly rounded (`math.fsum`),
so the same rollouts give the same numbers, bit for bit, however processes shared them out or arranged them.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from entrocraft.groups import check_rewards
from entrocraft.kernels.token_stats import TokenStats
from entrocraft.rollouts import check_packing


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Batch:
    """NumPy arrays; T tokens, R rollouts, N tokens that the loss counts. Build with `Batch.of`.

    counted_R: float64, tokens of each rollout that count. entropy_N: sorted. entropy_R, logprob_R: float64 sums, nats.
    """

    rollout_T: np.ndarray
    mask_T: np.ndarray
    group_R: np.ndarray
    sample_R: np.ndarray
    advantage_R: np.ndarray
    reward_R: np.ndarray | None
    counted_R: np.ndarray
    entropy_N: np.ndarray
    entropy_R: np.ndarray
    logprob_R: np.ndarray

    @staticmethod
    def of(
        stats: TokenStats,
        rollout_T: Tensor,
        group_R: Tensor,
        advantage_R: Tensor,
        *,
        reward_R: Tensor | None,
        mask_T: Tensor | None,
        sample_R: Tensor | None,
    ) -> "Batch":
        """Check and sum.

        Raises:
            ValueError: shapes, dtypes or values that do not fit, by name; a batch in which no token counts.
        """
        _check(stats, rollout_T, group_R, advantage_R, reward_R, mask_T, sample_R)
        mask = np.ones(len(rollout_T), dtype=bool) if mask_T is None else mask_T.cpu().numpy()
        if not mask.any():
            raise ValueError("no token counts (mask_T is False everywhere, or T = 0): there is no entropy to control")
        rollout, group = rollout_T.cpu().numpy(), group_R.cpu().numpy()
        rollouts = len(group)
        entropy, logprob = _host(stats.entropy_T), _host(stats.logprob_T)
        entropy_N = np.sort(entropy if mask.all() else entropy[mask])
        if not np.isfinite(entropy_N[[0, -1]]).all():  # NaN sorts last
            raise ValueError("entropy_T is not finite at a counted token: skip this step and look at the scored batch")
        return Batch(
            rollout_T=rollout,
            mask_T=mask,
            group_R=group,
            sample_R=_appearance(group) if sample_R is None else sample_R.cpu().numpy(),
            advantage_R=advantage_R.detach().double().cpu().numpy(),
            reward_R=None if reward_R is None else reward_R.detach().double().cpu().numpy(),
            counted_R=per_rollout(mask, rollout, rollouts),
            entropy_N=entropy_N,
            entropy_R=per_rollout(masked(entropy, mask), rollout, rollouts),
            logprob_R=per_rollout(masked(logprob, mask), rollout, rollouts),
        )

    @property
    def entropy(self) -> float:
        """Mean over counted tokens, nats."""
        return math.fsum(self.entropy_R) / len(self.entropy_N)

    @property
    def entropy_seq_mean(self) -> float:
        """Mean over rollouts of the mean over their counted tokens, nats."""
        some_R = self.counted_R > 0
        return math.fsum(self.entropy_R[some_R] / self.counted_R[some_R]) / int(some_R.sum())

    def entropy_percentile(self, share: float) -> float:
        """Entropy of the counted token that `share` of them do not exceed, linear between neighbours, nats."""
        place = share * (len(self.entropy_N) - 1)
        below = math.floor(place)
        low, high = self.entropy_N[below], self.entropy_N[min(below + 1, len(self.entropy_N) - 1)]
        return float(low) + (float(high) - float(low)) * (place - below)

    def logprob_mean(self, chosen_R: np.ndarray) -> float:
        """Mean log-probability of the counted tokens of the chosen rollouts, nats; NaN if there are none."""
        tokens = int(self.counted_R[chosen_R].sum())
        return math.fsum(self.logprob_R[chosen_R]) / tokens if tokens else math.nan


def checked_rewards(reward_R: Tensor, group_R: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Both on the host, rewards in fp64. Raises ValueError as `groups.check_rewards`."""
    check_rewards(reward_R, group_R)
    return reward_R.detach().double().cpu().numpy(), group_R.cpu().numpy()


def per_rollout(value_T: np.ndarray, rollout_T: np.ndarray, rollouts: int) -> np.ndarray:
    """float64 `[R]`: sum of `value_T` over the tokens of each rollout, which lie next to each other."""
    edge = np.searchsorted(rollout_T, np.arange(rollouts + 1))
    start = edge[:-1][edge[1:] > edge[:-1]]  # reduceat has no empty sum
    total_R = np.zeros(rollouts)
    if len(start):
        total_R[edge[1:] > edge[:-1]] = np.add.reduceat(value_T.astype(np.float64, copy=False), start)
    return total_R


def masked(value_T: np.ndarray, mask_T: np.ndarray) -> np.ndarray:
    """`value_T` with 0 where `mask_T` is False, also where it was NaN."""
    return value_T if mask_T.all() else np.where(mask_T, value_T, 0)


def _host(value_T: Tensor) -> np.ndarray:
    """fp32 or fp64; NumPy has no bf16."""
    value_T = value_T.detach().cpu()
    return (value_T if value_T.dtype == torch.float64 else value_T.float()).numpy()


def _appearance(group_R: np.ndarray) -> np.ndarray:
    """0, 1, 2, ... within each group, in order of appearance."""
    order = np.argsort(group_R, kind="stable")
    _, start, count = np.unique(group_R[order], return_index=True, return_counts=True)
    sample_R = np.empty(len(group_R), dtype=np.int64)
    sample_R[order] = np.arange(len(group_R)) - np.repeat(start, count)
    return sample_R


def _check(
    stats: TokenStats,
    rollout_T: Tensor,
    group_R: Tensor,
    advantage_R: Tensor,
    reward_R: Tensor | None,
    mask_T: Tensor | None,
    sample_R: Tensor | None,
) -> None:
    for name, names_R in (("group_R", group_R), ("sample_R", sample_R)):
        if names_R is None:
            continue
        if names_R.shape != group_R.shape or names_R.ndim != 1 or names_R.dtype != torch.int64:
            raise ValueError(
                f"{name} must be one-dimensional int64 like group_R, got shape {tuple(names_R.shape)} {names_R.dtype}"
            )
        if len(names_R) and int(names_R.min()) < 0:
            raise ValueError(f"{name} must be >= 0, got {int(names_R.min())}")
    if sample_R is not None and len(torch.unique(torch.stack((group_R, sample_R)), dim=1)[0]) < len(group_R):
        raise ValueError("(group_R, sample_R) must name each rollout once, got some pair twice")
    check_packing(rollout_T, mask_T, len(group_R))
    if len(stats) != len(rollout_T):
        raise ValueError(f"stats holds {len(stats)} tokens and rollout_T {len(rollout_T)}: expected the same tokens")
    for name, value_R in (("advantage_R", advantage_R), ("reward_R", reward_R)):
        if value_R is not None and value_R.shape != group_R.shape:
            raise ValueError(
                f"{name} has shape {tuple(value_R.shape)}, expected {tuple(group_R.shape)} like group_R; "
                "advantages that differ from token to token: give their mean over each rollout"
            )
    if reward_R is not None:
        check_rewards(reward_R, group_R)
    if not bool(torch.isfinite(advantage_R).all()):
        raise ValueError("advantage_R is not finite: a rollout without a verdict has advantage 0")
