"""DAPO's handling of responses that are too long: a penalty that grows towards the limit, and what to do at it."""

import torch
from torch import Tensor

HANDLINGS = ("keep", "mask", "no_verdict")


def overlong_penalty(length_R: Tensor, *, limit: int, buffer: int, factor: float = 1.0) -> Tensor:
    """`min(-(length - (limit - buffer)) / buffer * factor, 0)`, fp32 `[R]`: what is added to the reward.

    0 up to limit - buffer tokens, then a line that reaches -factor at the limit; it goes on falling beyond.

    Args:
        length_R: tokens of each response. limit: longest response, tokens. buffer: tokens before it that cost.

    Raises:
        ValueError: not 0 < buffer <= limit, or factor < 0.

    Source: Yu et al., DAPO (arXiv 2503.14476), section 3.4; its example is 20,480, 4,096 and 1.
    """
    if not 0 < buffer <= limit:
        raise ValueError(f"buffer = {buffer!r}, limit = {limit!r}: expected 0 < buffer <= limit, such as 4096 of 20480")
    if not factor >= 0:
        raise ValueError(f"factor = {factor!r}: expected a number >= 0, such as 1.0")
    excess_R = length_R.double() - (limit - buffer)
    return (-excess_R / buffer * factor).clamp(max=0.0).float()


def handle_truncated(
    reward_R: Tensor, mask_T: Tensor, rollout_T: Tensor, truncated_R: Tensor, *, handling: str
) -> tuple[Tensor, Tensor]:
    """(reward_R, mask_T) with the responses that the limit cut off dealt with.

        keep         as they are: cut off counts as whatever the reward says, mostly wrong
        mask         their tokens leave the loss and its denominators; their reward still counts in their group
        no_verdict   their reward becomes NaN: they leave their group's statistics too, and teach nothing

    Raises:
        ValueError: unknown handling.

    Source: DAPO (arXiv 2503.14476), section 3.4, overlong filtering is `mask`.
    """
    if handling not in HANDLINGS:
        raise ValueError(f"handling = {handling!r}: expected one of {', '.join(map(repr, HANDLINGS))}")
    if handling == "keep":
        return reward_R, mask_T
    if handling == "mask":
        return reward_R, mask_T & ~truncated_R[rollout_T]
    return torch.where(truncated_R, torch.nan, reward_R), mask_T
