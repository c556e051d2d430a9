"""Statistics of each rollout's group of rollouts to the same prompt, over those with a verdict, in fp64."""

from typing import NamedTuple

import torch
from torch import Tensor


class Groups(NamedTuple):
    """Statistics of each rollout's own group, fp64, over the rollouts with a verdict."""

    centred_R: Tensor  # reward - mean; 0 where all are equal; the reward itself in a group of one; 0 without verdict
    std_R: Tensor  # ddof 1; 1 in a group of one
    count_R: Tensor  # verdicts in the group


def group_statistics(reward_R: Tensor, group_R: Tensor) -> Groups:
    """Of a batch; ValueError as `advantages.grpo`."""
    check_rewards(reward_R, group_R)
    reward_R = reward_R.double()
    verdict_R = ~torch.isnan(reward_R)
    known_R = torch.where(verdict_R, reward_R, 0.0)
    _, index_R = torch.unique(group_R, return_inverse=True)
    groups = int(index_R.max()) + 1 if len(index_R) else 0

    def total(value_R: Tensor) -> Tensor:
        return torch.zeros(groups, dtype=torch.float64, device=reward_R.device).index_add_(0, index_R, value_R)

    count_P = total(verdict_R.double())
    mean_P = total(known_R) / count_P.clamp(min=1)
    # All equal: the rounded mean need not equal them, and 1e-17 / 1e-6 is not zero. Compare, do not subtract.
    low_P = torch.full_like(mean_P, torch.inf).scatter_reduce_(
        0, index_R, torch.where(verdict_R, reward_R, torch.inf), "amin"
    )
    high_P = torch.full_like(mean_P, -torch.inf).scatter_reduce_(
        0, index_R, torch.where(verdict_R, reward_R, -torch.inf), "amax"
    )
    mean_P = torch.where(low_P == high_P, low_P, mean_P)
    mean_P = torch.where(count_P == 1, 0.0, mean_P)
    centred_R = torch.where(verdict_R, known_R - mean_P[index_R], 0.0)
    variance_P = total(centred_R.square()) / (count_P - 1).clamp(min=1)
    return Groups(centred_R, variance_P.sqrt()[index_R], count_P[index_R])


def check_rewards(reward_R: Tensor, group_R: Tensor) -> None:
    """Raise ValueError unless the two fit and no reward is infinite."""
    if reward_R.ndim != 1 or reward_R.is_complex():
        raise ValueError(f"reward_R must be real numbers [R], got shape {tuple(reward_R.shape)} {reward_R.dtype}")
    if group_R.shape != reward_R.shape or group_R.dtype != torch.int64:
        raise ValueError(
            f"group_R must be int64 of shape {tuple(reward_R.shape)}, like reward_R; "
            f"got shape {tuple(group_R.shape)} {group_R.dtype}"
        )
    if bool(torch.isinf(reward_R).any()):
        where = int(torch.isinf(reward_R).nonzero()[0])
        raise ValueError(
            f"reward_R[{where}] = {float(reward_R[where])}: expected a finite reward, or NaN for 'no verdict'"
        )
