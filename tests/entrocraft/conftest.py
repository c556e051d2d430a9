"""Batches with exact statistics, for tests that need a policy but no model."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from entrocraft import Decision, EntropyController, TokenStats, advantages

sys.path.insert(0, str(Path(__file__).parent))  # for acting_methods, combinations and rules_by_hand


def _stats(logits_TV: Tensor, token_T: Tensor, temperature: float | Tensor = 1.0) -> TokenStats:
    """Statistics of softmax(logits / temperature) by the definitions, in the dtype of the logits."""
    scale = temperature.unsqueeze(-1) if isinstance(temperature, Tensor) else temperature
    logp_TV = torch.log_softmax(logits_TV / scale, dim=-1)
    p_TV = logp_TV.exp()
    return TokenStats(
        logprob_T=logp_TV.gather(1, token_T.unsqueeze(-1)).squeeze(-1),
        entropy_T=-(p_TV * logp_TV).sum(-1),
        lse_T=torch.logsumexp(logits_TV / scale, dim=-1),
        p2_T=p_TV.square().sum(-1),
        p2logp_T=(p_TV.square() * logp_TV).sum(-1),
    )


@pytest.fixture(scope="session")
def stats_of() -> Callable[..., TokenStats]:
    return _stats


class Scored(NamedTuple):
    """A scored batch: groups of rollouts of uneven length, some tokens masked, rewards of -1 and +1."""

    stats: TokenStats
    rollout_T: Tensor
    mask_T: Tensor
    group_R: Tensor
    sample_R: Tensor
    reward_R: Tensor
    advantage_R: Tensor

    def decide(self, controller: EntropyController, step: int, **changes: Any) -> Decision:
        arguments = {
            "stats": self.stats,
            "rollout_T": self.rollout_T,
            "mask_T": self.mask_T,
            "group_R": self.group_R,
            "reward_R": self.reward_R,
            "advantage_R": self.advantage_R,
        }
        return controller.decide(step=step, **(arguments | changes))

    def permuted(self, order_R: Tensor) -> "Scored":
        """The same rollouts in another order, each with its own tokens."""
        index_T = torch.cat([(self.rollout_T == r).nonzero().flatten() for r in order_R.tolist()])
        place_R = torch.argsort(order_R)
        return Scored(
            stats=self.stats.index(index_T),
            rollout_T=place_R[self.rollout_T[index_T]],
            mask_T=self.mask_T[index_T],
            group_R=self.group_R[order_R],
            sample_R=self.sample_R[order_R],
            reward_R=self.reward_R[order_R],
            advantage_R=self.advantage_R[order_R],
        )


def _scored(
    seed: int, *, prompts: int = 12, samples: int = 8, longest: int = 9, vocab: int = 11, sharpness: float = 2.0
) -> Scored:
    generator = torch.Generator().manual_seed(seed)
    group_R = torch.arange(prompts).repeat_interleave(samples)
    sample_R = torch.arange(samples).repeat(prompts)
    length_R = torch.randint(1, longest + 1, group_R.shape, generator=generator)
    rollout_T = torch.repeat_interleave(torch.arange(len(group_R)), length_R)
    logits_TV = sharpness * torch.randn(len(rollout_T), vocab, generator=generator)
    token_T = torch.multinomial(logits_TV.softmax(-1), 1, generator=generator).squeeze(-1)
    mask_T = torch.rand(len(rollout_T), generator=generator) < 0.85
    reward_R = torch.where(torch.rand(len(group_R), generator=generator) < 0.4, 1.0, -1.0)
    return Scored(
        stats=_stats(logits_TV, token_T),
        rollout_T=rollout_T,
        mask_T=mask_T,
        group_R=group_R,
        sample_R=sample_R,
        reward_R=reward_R,
        advantage_R=advantages.grpo(reward_R, group_R),
    )


@pytest.fixture(scope="session")
def scored_batch() -> Callable[..., Scored]:
    return _scored
