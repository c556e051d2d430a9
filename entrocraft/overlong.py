"""DAPO's handling of responses that are too long: a penalty that grows towards the limit, and what to do at it."""

import math

import torch
from torch import Tensor

from entrocraft.rollouts import check_packing

HANDLINGS = ("keep", "mask", "no_verdict")


def overlong_penalty(length_R: Tensor, *, limit: int, buffer: int, factor: float = 1.0) -> Tensor:
    """`penalty = min(-(length - (limit - buffer)) / buffer * factor, 0)`, fp32 `[R]`: what is added to the reward.

    0 up to limit - buffer tokens, then a line that reaches -factor at the limit; it goes on falling beyond. One number
    a rollout, before advantages and their aggregation. Entropy: nothing by itself, what the changed advantages do; a
    group of equal verdicts has advantages again where penalties differ.

    Args:
        length_R: tokens of each response. limit: longest response, tokens. buffer: tokens before it that cost.

    Raises:
        ValueError: not 0 < buffer <= limit, or factor not finite and >= 0.

    Source: Yu et al., DAPO (arXiv 2503.14476), section 3.4, up to the limit; its example is 20,480, 4,096 and 1. Beyond
    the limit as verl has it; TRL stays at -factor there.
    """
    if not 0 < buffer <= limit:
        raise ValueError(f"buffer = {buffer!r}, limit = {limit!r}: expected 0 < buffer <= limit, such as 4096 of 20480")
    if not 0.0 <= factor < math.inf:
        raise ValueError(f"factor = {factor!r}: expected a finite number >= 0, such as 1.0")
    excess_R = length_R.double() - (limit - buffer)
    return (-excess_R / buffer * factor).clamp(max=0.0).float()


def handle_truncated(
    reward_R: Tensor, mask_T: Tensor, rollout_T: Tensor, truncated_R: Tensor, *, handling: str
) -> tuple[Tensor, Tensor]:
    """(reward_R, mask_T) with the responses that the limit cut off dealt with.

        keep         as they are: cut off counts as whatever the reward says, mostly wrong
        mask         their tokens leave the loss and its denominators; their reward still counts in their group
        no_verdict   their reward becomes NaN: they leave their group's statistics too, and teach nothing

    Aggregation: `mask` takes their tokens out of denominators, the other two leave them in. Entropy: nothing by itself;
    what no longer teaches no longer moves it, and under `mask` the rest weighs more in a mean.

    Args:
        reward_R: floating point. mask_T: bool. rollout_T: int64, non-decreasing. truncated_R: bool.

    Raises:
        ValueError: unknown handling, or shapes or dtypes that do not fit.

    Source: DAPO (arXiv 2503.14476), section 3.4, overlong filtering is `mask`.
    """
    if handling not in HANDLINGS:
        raise ValueError(f"handling = {handling!r}: expected one of {', '.join(map(repr, HANDLINGS))}")
    check_packing(rollout_T, mask_T, len(reward_R))
    if truncated_R.shape != reward_R.shape or truncated_R.dtype != torch.bool:
        raise ValueError(
            f"truncated_R must be bool of shape {tuple(reward_R.shape)}, like reward_R; "
            f"got shape {tuple(truncated_R.shape)} {truncated_R.dtype}"
        )
    if handling == "no_verdict" and not reward_R.is_floating_point():
        raise ValueError(f"reward_R is {reward_R.dtype}: 'no_verdict' writes NaN, give it as float32")
    if handling == "keep":
        return reward_R, mask_T
    if handling == "mask":
        return reward_R, mask_T & ~truncated_R[rollout_T]
    return torch.where(truncated_R, torch.nan, reward_R), mask_T
