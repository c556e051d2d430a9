"""What becomes of responses near the limit of tokens, and of those it cut off, before anything is learnt from them."""

from dataclasses import replace

from entrocraft import Rollouts, handle_truncated, overlong_penalty
from entrocraft.train.config import Config
from entrocraft.train.rewards import RewardBatch


def at_the_limit(config: Config, rollouts: Rollouts, rewards: RewardBatch) -> tuple[Rollouts, RewardBatch]:
    """The same with `reward.overlong_buffer` and `reward.truncated` applied: other rewards, or a smaller mask.

    What the rewards gave each by itself (`score_R`, `right_R`) stays. Errors as `overlong_penalty`.
    """
    settings, reward_R = config.reward, rewards.reward_R
    if settings.overlong_buffer:
        limit = config.sampling.max_response_tokens
        reward_R = reward_R + overlong_penalty(
            rollouts.length_R, limit=limit, buffer=settings.overlong_buffer, factor=settings.overlong_factor
        )
    reward_R, mask_T = handle_truncated(
        reward_R, rollouts.mask_T, rollouts.rollout_T, rollouts.truncated_R, handling=settings.truncated
    )
    return replace(rollouts, mask_T=mask_T), replace(rewards, reward_R=reward_R)
