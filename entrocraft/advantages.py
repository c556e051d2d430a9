"""Advantages of rollouts: one number for each, no critic. Here those that compare with the same prompt's other
rollouts; `raw_advantages` has those of the reward alone.

A reward of NaN means "no verdict" (the grader failed or ran out of time): such a rollout is left out of its
group's statistics and gets advantage 0, so it neither helps nor hurts. A rollout alone in its group, or the only
one with a verdict, has nothing to be compared with: baseline 0 and scale 1, its advantage is its reward.
Where all rewards of a group are equal the advantages are exactly 0, whatever rounding the mean has; not so where the
batch is whitened (`reinforce_pp`, `reinforce_pp_baseline`), unless all of the batch is equal.
"""

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from entrocraft.groups import group_statistics
from entrocraft.raw_advantages import (
    needed_lengths,
    nsr,
    nsr_parity,
    psr,
    raft,
    reinforce,
    reinforce_pp,
    reinforce_rej,
    w_reinforce,
    whitened,
)
from entrocraft.registry import build_from, resolve


class Advantage(Protocol):
    """What turns rewards into advantages: `(reward_R, group_R, length_R) -> advantage_R`, fp32.

    length_R, the counted tokens of each rollout, is None where the caller does not know them. An estimator that takes
    rollouts out of the batch, denominators included, has a method `members(reward_R, group_R) -> bool R` besides.
    """

    def __call__(self, reward_R: Tensor, group_R: Tensor, length_R: Tensor | None = None, /) -> Tensor: ...


_GRPO_EPSILON = 1e-6


def grpo(reward_R: Tensor, group_R: Tensor, length_R: Tensor | None = None) -> Tensor:
    """`A_i = (R_i - mean_g) / (std_g + 1e-6)` with the sample standard deviation (ddof 1), fp32 `[R]`.

    Aggregation: any; verl's default is `token_mean`. Entropy: no term of its own, and no set-point. On policy its
    expected change is, to first order, minus the covariance of A and S (`prediction`): it falls where tokens that are
    likelier than the policy is on average earn more.

    Source: Shao et al., DeepSeekMath (arXiv 2402.03300); ddof and epsilon as verl computes them.

    Args:
        reward_R: rewards `[R]`, any real dtype; NaN means no verdict.
        group_R: int64 `[R]`, equal for rollouts of one prompt; any numbering, any order.
        length_R: counted tokens of each rollout; only some estimators look at it.

    Raises:
        ValueError: shapes or dtypes that do not fit, or an infinite reward.
    """
    groups = group_statistics(reward_R, group_R)
    alone_R = groups.count_R == 1
    scale_R = torch.where(alone_R, 1.0, groups.std_R + _GRPO_EPSILON)
    return (groups.centred_R / scale_R).float()


def dr_grpo(reward_R: Tensor, group_R: Tensor, length_R: Tensor | None = None) -> Tensor:
    """`A_i = R_i - mean_g`, fp32 `[R]`: no division by the spread, so no extra weight on very easy or hard prompts.

    Aggregation: `fixed`, its loss divides by a constant length. Entropy: as `grpo`, such prompts weighing less in it.
    Source: Liu et al., Understanding R1-Zero-Like Training (arXiv 2503.20783). Arguments and errors as `grpo`.
    """
    return group_statistics(reward_R, group_R).centred_R.float()


def rloo(reward_R: Tensor, group_R: Tensor, length_R: Tensor | None = None) -> Tensor:
    """`A_i = R_i - mean of the others = G/(G-1) (R_i - mean_g)`, fp32 `[R]`.

    Aggregation: any; on policy unbiased where the denominator is a constant, as in `fixed`. Entropy: as `dr_grpo`, its
    advantages G/(G-1) times as large. Source: Ahmadian et al., Back to Basics (arXiv 2402.14740). Arguments and errors
    as `grpo`.
    """
    groups = group_statistics(reward_R, group_R)
    others_R = (groups.count_R - 1).clamp(min=1)
    alone_R = groups.count_R == 1
    factor_R = torch.where(alone_R, 1.0, groups.count_R / others_R)
    return (groups.centred_R * factor_R).float()


def opo(reward_R: Tensor, group_R: Tensor, length_R: Tensor | None = None) -> Tensor:
    """`A_i = R_i - sum_g |y| R / sum_g |y|`, fp32 `[R]`: the baseline weighs rewards by length, for least variance.

    Aggregation: one that sums over a rollout's tokens, such as `token_mean`: the baseline takes the squared gradient of
    a rollout to grow with its length. Entropy: as `dr_grpo`: on policy a baseline changes the noise and hardly the
    direction.

    Source: Hao et al., On-Policy RL with Optimal Reward Baseline (arXiv 2505.23585). Arguments and errors as `grpo`;
    length_R is needed.
    """
    lengths_R = needed_lengths(length_R, reward_R, "opo")
    groups = group_statistics(reward_R, group_R)
    reward_R = reward_R.double()
    known_R = ~torch.isnan(reward_R)
    weight_R = torch.where(known_R, lengths_R, 0.0)
    _, index_R = torch.unique(group_R, return_inverse=True)
    zero_P = torch.zeros(len(group_R), dtype=torch.float64, device=reward_R.device)
    total_P = zero_P.index_add(0, index_R, weight_R)
    sum_P = zero_P.index_add(0, index_R, weight_R * reward_R.nan_to_num(0.0))
    centred_R = reward_R - (sum_P / total_P.clamp(min=1.0))[index_R]
    # Alone, or all alike: as the other estimators have it, exactly.
    plain_R = (groups.count_R == 1) | (groups.centred_R == 0) & (groups.std_R == 0)
    return torch.where(known_R, torch.where(plain_R, groups.centred_R, centred_R), 0.0).float()


def reinforce_pp_baseline(reward_R: Tensor, group_R: Tensor, length_R: Tensor | None = None) -> Tensor:
    """`A_i = (b_i - mean b) / sqrt(var b + 1e-8)`, `b_i = R_i - mean_g`, fp32 `[R]`; length_R is needed.

    Mean and variance as in `reinforce_pp`. Aggregation: `token_mean`, under which the advantages average 0. Entropy: as
    `dr_grpo`, in steps of another size; the constant taken from all moves it by noise alone, on policy.

    Source: Hu, REINFORCE++ (arXiv 2501.03262), its variant with a baseline. Arguments and errors as `grpo`.
    """
    lengths_R = needed_lengths(length_R, reward_R, "reinforce_pp_baseline")
    centred_R = group_statistics(reward_R, group_R).centred_R
    return whitened(centred_R, torch.where(torch.isnan(reward_R), 0.0, lengths_R))


ADVANTAGES: dict[str, Advantage | Callable[..., Advantage]] = {
    "grpo": grpo,
    "dr_grpo": dr_grpo,
    "rloo": rloo,
    "opo": opo,
    "reinforce": reinforce,
    "reinforce_pp": reinforce_pp,
    "reinforce_pp_baseline": reinforce_pp_baseline,
    "reinforce_rej": reinforce_rej,
    "raft": raft,
    "raft_pp": raft,  # differs in the loss alone: PPO-clip, where RAFT has none
    "psr": psr,
    "nsr": nsr,
    "nsr_parity": nsr_parity,
    "w_reinforce": w_reinforce,
}


# What these see of a reward is whether it is above 0.
SIGN_ONLY = frozenset({"raft", "raft_pp", "psr", "nsr", "nsr_parity", "w_reinforce"})


def members(estimator: Advantage, reward_R: Tensor, group_R: Tensor) -> Tensor | None:
    """bool `[R]`: rollouts that the estimator leaves in the batch; None where it takes none out."""
    choose = getattr(estimator, "members", None)
    return None if choose is None else choose(reward_R, group_R)


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
