"""Sampling and grading spread over ranks: each does its part, and all get the whole, as if they had done it alone.

So the loop is the same on one process and on many, and every rank decides from the same whole batch.
"""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import fields, replace
from typing import Any

import torch

from entrocraft import Rollouts
from entrocraft.train.config import SamplingConfig
from entrocraft.train.metrics import MetricsLog
from entrocraft.train.parallel import Ranks
from entrocraft.train.policy import Policy
from entrocraft.train.rewards import RewardBatch, RewardPool
from entrocraft.train.sampling import RolloutEngine


def join(parts: Sequence[Rollouts]) -> Rollouts:
    """One value of several ranks' rollouts to different prompts, in order. ValueError when the weights that sampled
    them differ."""
    versions = {part.weight_version for part in parts}
    if len(versions) != 1:
        raise ValueError(
            f"weight_version differs between parts: {sorted(versions)}; expected rollouts of the same weights"
        )
    prompts = [sum(part.P for part in parts[:i]) for i in range(len(parts))]
    rollouts = [sum(part.R for part in parts[:i]) for i in range(len(parts))]
    logprobs = [part.sampler_logprob_T for part in parts if part.sampler_logprob_T is not None]
    return replace(
        parts[0],
        **{
            name: torch.cat([getattr(part, name) for part in parts])
            for name in ("token_T", "mask_T", "sample_R", "truncated_R")
        },
        rollout_T=torch.cat([part.rollout_T + first for part, first in zip(parts, rollouts, strict=True)]),
        group_R=torch.cat([part.group_R + first for part, first in zip(parts, prompts, strict=True)]),
        prompts=tuple(prompt for part in parts for prompt in part.prompts),
        sampler_logprob_T=torch.cat(logprobs) if len(logprobs) == len(parts) else None,
    )


class SpreadEngine:
    """A rollout engine on every rank: each samples its share of the prompts, and `sample` gives all of them to all.

    An engine that generates with the trainer's own module (`uses_policy`) gets whole weights for the time.

    ahead: `sample` is called in a thread of its own while the ranks talk of other things. It then has a group of its
    own: messages of one group pair up in the order they are sent in, which would differ from rank to rank. All ranks
    build it together.
    """

    def __init__(self, engine: RolloutEngine, policy: Policy, *, ahead: bool = False) -> None:
        self.engine = engine
        self.policy = policy
        self.ranks: Ranks = policy.ranks.another() if ahead else policy.ranks

    def publish(self, version: int) -> dict[str, float]:
        """Every rank's engine gets the present weights; metrics of this rank's."""
        return self.engine.publish(version)

    def rest(self) -> None:
        """Every rank's engine rests."""
        self.engine.rest()

    def close(self) -> None:
        """Lets go of this rank's engine."""
        self.engine.close()

    def sample(
        self,
        prompts: Sequence[tuple[int, ...]],
        samples_per_prompt: int,
        *,
        stream: Sequence[int],
        temperature: float | None = None,
        settings: SamplingConfig | None = None,
        first_prompt: int = 0,
    ) -> Rollouts:
        """As `RolloutEngine.sample`, called by all ranks with the same prompts."""
        own = self.ranks.share(len(prompts))
        rollouts = None
        with self.policy.whole_weights() if getattr(self.engine, "uses_policy", False) else nullcontext():
            if own:
                rollouts = self.engine.sample(
                    prompts[own.start : own.stop],
                    samples_per_prompt,
                    stream=stream,
                    temperature=temperature,
                    settings=settings,
                    first_prompt=first_prompt + own.start,
                )
        return join([part for part in self.ranks.gather(rollouts) if part is not None])


class SpreadPool(RewardPool):
    """A reward pool on every rank: each grades its share of the completions, and `score` gives all verdicts to all.

    pool: this rank's own, whose life it leaves to its owner.
    """

    def __init__(self, pool: RewardPool, ranks: Ranks) -> None:
        self.pool = pool
        self.ranks = ranks

    def score(self, completions: list[str], answers: list[str], prompts: list[str]) -> RewardBatch:
        """As `RewardPool.score`, called by all ranks with the same lists."""
        if self.ranks.size == 1:
            return self.pool.score(completions, answers, prompts)
        own = self.ranks.share(len(completions))
        rows = slice(own.start, own.stop)
        return merged(self.ranks.gather(self.pool.score(completions[rows], answers[rows], prompts[rows])))


def merged(parts: Sequence[RewardBatch]) -> RewardBatch:
    """One value of several batches of completions, in order."""
    return RewardBatch(
        **{field.name: _merge_field([getattr(part, field.name) for part in parts]) for field in fields(RewardBatch)}
    )


def _merge_field(values: list[Any]) -> Any:
    """Tensors end to end, counts added, dicts by name, and of texts the first there is."""
    first = next((value for value in values if value is not None), None)
    if isinstance(first, torch.Tensor):
        return torch.cat(values)
    if isinstance(first, dict):
        return {name: _merge_field([value[name] for value in values if name in value]) for name in first}
    if isinstance(first, int | float):
        return sum(values)
    return first


class SilentLog(MetricsLog):
    """The record that all ranks but the first keep: none."""

    def __init__(self) -> None:
        pass

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        """Nothing: rank 0 writes the same."""

    def event(self, kind: str, **fields: Any) -> None:
        """Nothing: rank 0 writes the same."""

    def rows(self, file: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Nothing: rank 0 writes the same."""

    def sync(self) -> None:
        """Nothing: rank 0 writes the same."""

    def close(self) -> None:
        """Nothing is open."""
