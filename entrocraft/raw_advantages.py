"""Advantages made of the reward itself, without the group: REINFORCE, RAFT, positive- and negative-only.

A rollout is right where its reward is above 0, whether wrong ones have 0 or -1. A reward of NaN has no verdict and
gets advantage 0; where estimators take rollouts out of the batch, it goes too.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from entrocraft.groups import check_rewards, group_statistics

_WHITENING_EPSILON = 1e-8


def reinforce(reward_R: Tensor, group_R: Tensor, length_R: Tensor | None = None) -> Tensor:
    """`A_i = R_i`, fp32 `[R]`: no baseline. The released code of arXiv 2604.26326 has rewards of -1 and +1 here.

    Aggregation: any; `token_mean` in that code. Entropy: as `advantages.grpo`; advantages that are all equal move it by
    noise alone to first order, on policy and without clipping. Source: Williams 1992. Arguments and errors as
    `advantages.grpo`.
    """
    check_rewards(reward_R, group_R)
    return reward_R.nan_to_num(0.0).float()


def reinforce_pp(reward_R: Tensor, group_R: Tensor, length_R: Tensor | None = None) -> Tensor:
    """`A_i = (R_i - mean) / sqrt(variance + 1e-8)` over the counted tokens of the batch, fp32 `[R]`; needs length_R.

    The return of every token of a rollout is its outcome reward (discount 1, verl's default; no KL in the reward), so
    each rollout counts as often as it has tokens. The variance is the unbiased one. Aggregation: `token_mean`, under
    which the advantages average 0. Entropy: as `reinforce`; prompts whose rollouts all agree keep an advantage.

    Source: Hu, REINFORCE++ (arXiv 2501.03262). Arguments and errors as `advantages.grpo`.
    """
    check_rewards(reward_R, group_R)
    lengths_R = needed_lengths(length_R, reward_R, "reinforce_pp")
    known_R = ~torch.isnan(reward_R)
    return whitened(reward_R.double().nan_to_num(0.0), torch.where(known_R, lengths_R, 0.0))


def reinforce_rej(reward_R: Tensor, group_R: Tensor, length_R: Tensor | None = None) -> Tensor:
    """`A_i = R_i`, and 0 where all rewards of the prompt are equal, fp32 `[R]`.

    Aggregation: any; rollouts with 0 stay in the denominator. Entropy: as `reinforce`, without what prompts that agree
    would add. Source: Xiong et al., A Minimalist Approach to LLM Reasoning (arXiv 2504.11343). Arguments and errors as
    `advantages.grpo`. A rollout alone in its group has nothing to be equal to, and keeps its reward.
    """
    groups = group_statistics(reward_R, group_R)
    alike_R = (groups.std_R == 0) & (groups.count_R > 1)
    return torch.where(alike_R, 0.0, reward_R.nan_to_num(0.0)).float()


def raft(reward_R: Tensor, group_R: Tensor, length_R: Tensor | None = None) -> Tensor:
    """`A_i = 1[R_i > 0]`, fp32 `[R]`: 1 for right rollouts, 0 for the others.

    RAFT and RAFT++ alike: the first takes the loss `gpg`, the second `ppo_clip`. Aggregation: `token_mean`, in whose
    denominator wrong ones stay. Entropy: falls, the faster the more a batch is used. Source: arXiv 2504.11343.
    Arguments and errors as `advantages.grpo`.
    """
    check_rewards(reward_R, group_R)
    return _right(reward_R).float()


def nsr_parity(reward_R: Tensor, group_R: Tensor, length_R: Tensor | None = None) -> Tensor:
    """`A_i = -1[R_i <= 0]`, fp32 `[R]`: -1 for wrong rollouts, 0 for right ones.

    Aggregation: `token_mean`, in whose denominator right ones stay; `nsr` takes them out, and so takes larger steps.
    Entropy: as `nsr`, in smaller steps. Source: the released code of arXiv 2604.26326, negative-only. Arguments and
    errors as `advantages.grpo`.
    """
    check_rewards(reward_R, group_R)
    return -_wrong(reward_R).float()


@dataclass(frozen=True, slots=True)
class psr:
    """`A_i = 1[R_i > 0]`: 1 for right rollouts; wrong ones are taken out of the batch.

    Aggregation: any, wrong ones being out of its denominator too. Entropy: falls, as under `raft`. Source: Zhu et al.,
    The Surprising Effectiveness of Negative Reinforcement (arXiv 2506.01347).
    """

    def __call__(self, reward_R: Tensor, group_R: Tensor, length_R: Tensor | None = None, /) -> Tensor:
        """advantage_R, fp32; arguments and errors as `advantages.grpo`."""
        return raft(reward_R, group_R)

    def members(self, reward_R: Tensor, group_R: Tensor) -> Tensor:
        """bool `[R]`: the right ones."""
        return _right(reward_R)


@dataclass(frozen=True, slots=True)
class nsr:
    """`A_i = -1[R_i <= 0]`: -1 for wrong rollouts; right ones are taken out of the batch.

    Aggregation: any, right ones being out of its denominator too. Entropy: stays up longer than with `psr`, since less
    and less is left to learn from; it is no law that it rises. Source: Zhu et al. (arXiv 2506.01347).
    """

    def __call__(self, reward_R: Tensor, group_R: Tensor, length_R: Tensor | None = None, /) -> Tensor:
        """advantage_R, fp32; arguments and errors as `advantages.grpo`."""
        return nsr_parity(reward_R, group_R)

    def members(self, reward_R: Tensor, group_R: Tensor) -> Tensor:
        """bool `[R]`: the wrong ones."""
        return _wrong(reward_R)


@dataclass(frozen=True, slots=True, kw_only=True)
class w_reinforce:
    """`A_i = weight 1[R_i > 0] - 1[R_i <= 0]`: `weight` for right rollouts, -1 for wrong ones.

    Aggregation: any; all rollouts stay in its denominator. Entropy: as `nsr`, with a little of `psr`. weight: >= 0;
    0.1. Source: Zhu et al. (arXiv 2506.01347), section 5.
    """

    weight: float = 0.1

    def __post_init__(self) -> None:
        if not 0.0 <= self.weight < math.inf:
            raise ValueError(f"weight = {self.weight!r}: expected a finite number >= 0, such as 0.1")

    def __call__(self, reward_R: Tensor, group_R: Tensor, length_R: Tensor | None = None, /) -> Tensor:
        """advantage_R, fp32; arguments and errors as `advantages.grpo`."""
        check_rewards(reward_R, group_R)
        return self.weight * _right(reward_R).float() - _wrong(reward_R).float()


def whitened(value_R: Tensor, length_R: Tensor) -> Tensor:
    """`(value - mean) / sqrt(variance + 1e-8)` over tokens, each rollout counted `length_R` times, fp32 `[R]`.

    Both fp64. A rollout of no token, or without a verdict, gets 0. So does a batch of one token or none, and one of
    equal values: 1e-17 of rounding over sqrt(1e-8) would be an advantage, and count as one.
    """
    tokens = length_R.sum()
    counted_N = value_R[length_R > 0]
    if float(tokens) <= 1 or bool((counted_N == counted_N[0]).all()):
        return torch.zeros_like(value_R, dtype=torch.float32)
    mean = (length_R * value_R).sum() / tokens
    variance = (length_R * (value_R - mean).square()).sum() / (tokens - 1)
    return torch.where(length_R > 0, (value_R - mean) / (variance + _WHITENING_EPSILON).sqrt(), 0.0).float()


def needed_lengths(length_R: Tensor | None, reward_R: Tensor, who: str) -> Tensor:
    """length_R in fp64.

    Raises:
        ValueError: it is None, of another shape, or negative.
    """
    if length_R is None:
        raise ValueError(f"{who} needs length_R, the counted tokens of each rollout")
    if length_R.shape != reward_R.shape or bool((length_R < 0).any()):
        raise ValueError(
            f"length_R is {length_R.dtype} {tuple(length_R.shape)}; expected {tuple(reward_R.shape)} numbers of tokens "
            ">= 0, like reward_R"
        )
    return length_R.double()


def _right(reward_R: Tensor) -> Tensor:
    return reward_R > 0


def _wrong(reward_R: Tensor) -> Tensor:
    return reward_R <= 0  # false for NaN, as reward > 0 is
