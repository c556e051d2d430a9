"""Advantages of rollouts that answered the same prompt: one number for each rollout, no critic.

A reward of NaN means "no verdict" (the grader failed or ran out of time): such a rollout is left out of its
group's statistics and gets advantage 0, so it neither helps nor hurts. A rollout alone in its group, or the only
one with a verdict, has nothing to be compared with: baseline 0 and scale 1, its advantage is its reward.
Where all rewards of a group are equal the advantages are exactly 0, whatever rounding the mean has.
"""

from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from entrocraft.registry import build_from, resolve


class Advantage(Protocol):
    """What turns rewards into advantages: `(reward_R, group_R, length_R) -> advantage_R`, fp32.

    length_R, the counted tokens of each rollout, is None where the caller does not know them. An estimator that takes
    rollouts out of the batch, denominators included, has a method `members(reward_R, group_R) -> bool R` besides.
    """

    def __call__(self, reward_R: Tensor, group_R: Tensor, length_R: Tensor | None = None, /) -> Tensor: ...


_GRPO_EPSILON = 1e-6


class _Groups(NamedTuple):
    """Statistics of each rollout's own group, fp64, over the rollouts with a verdict."""

    centred_R: Tensor  # reward - mean; 0 where all are equal; the reward itself in a group of one; 0 without verdict
    std_R: Tensor  # ddof 1; 1 in a group of one
    count_R: Tensor  # verdicts in the group


def grpo(reward_R: Tensor, group_R: Tensor, length_R: Tensor | None = None) -> Tensor:
    """`(R_i - mean_g) / (std_g + 1e-6)` with the sample standard deviation (ddof 1), fp32 `[R]`.

    Source: Shao et al., DeepSeekMath (arXiv 2402.03300); ddof and epsilon as verl computes them.

    Args:
        reward_R: rewards `[R]`, any real dtype; NaN means no verdict.
        group_R: int64 `[R]`, equal for rollouts of one prompt; any numbering, any order.

    Raises:
        ValueError: shapes or dtypes that do not fit, or an infinite reward.
    """
    groups = _group_statistics(reward_R, group_R)
    alone_R = groups.count_R == 1
    scale_R = torch.where(alone_R, 1.0, groups.std_R + _GRPO_EPSILON)
    return (groups.centred_R / scale_R).float()


def dr_grpo(reward_R: Tensor, group_R: Tensor, length_R: Tensor | None = None) -> Tensor:
    """`R_i - mean_g`, fp32 `[R]`: no division by the spread, so no extra weight on very easy or hard prompts.

    Source: Liu et al., Understanding R1-Zero-Like Training (arXiv 2503.20783); its loss divides by a constant
    length, aggregation `fixed`. Arguments and errors as `grpo`.
    """
    return _group_statistics(reward_R, group_R).centred_R.float()


def rloo(reward_R: Tensor, group_R: Tensor, length_R: Tensor | None = None) -> Tensor:
    """`R_i - mean of the others = G/(G-1) (R_i - mean_g)`, fp32 `[R]`.

    Source: Ahmadian et al., Back to Basics (arXiv 2402.14740). Arguments and errors as `grpo`.
    """
    groups = _group_statistics(reward_R, group_R)
    others_R = (groups.count_R - 1).clamp(min=1)
    alone_R = groups.count_R == 1
    factor_R = torch.where(alone_R, 1.0, groups.count_R / others_R)
    return (groups.centred_R * factor_R).float()


ADVANTAGES: dict[str, Advantage] = {"grpo": grpo, "dr_grpo": dr_grpo, "rloo": rloo}


def build(name: str, **arguments: Any) -> Advantage:
    """The estimator of that name, or of the import path `package.module:name`.

    Raises:
        ValueError: unknown name, a path that cannot be imported, or arguments it does not take.
    """
    found = resolve(ADVANTAGES, name, "advantage estimator")
    if isinstance(found, type):
        return build_from(ADVANTAGES, name, arguments, "advantage estimator")
    if arguments:
        raise ValueError(f"advantage estimator {name!r} was given {sorted(arguments)}: it takes no options")
    return found


def _group_statistics(reward_R: Tensor, group_R: Tensor) -> _Groups:
    _check(reward_R, group_R)
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
    return _Groups(centred_R, variance_P.sqrt()[index_R], count_P[index_R])


def _check(reward_R: Tensor, group_R: Tensor) -> None:
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
