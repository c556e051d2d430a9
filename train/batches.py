"""What a step learns from: sampled, graded, scored and judged; and sampled again where too little of it teaches.

Waves of one step draw from the same weights. Advantages are computed over whole groups, before anything is rejected,
and the controller decides anew from all waves together, starting each time from the state it had before the step.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from entrocraft import Decision, Rollouts, TokenStats
from entrocraft.losses import KEPT_DENOMINATORS
from entrocraft.train.data import Problem
from entrocraft.train.evaluation import Grader, completion_texts, grade
from entrocraft.train.length_limit import at_the_limit
from entrocraft.train.rewards import RewardBatch
from entrocraft.train.run import Run, check_finite
from entrocraft.train.spread import join, merged
from entrocraft.train.step import Learning
from entrocraft.train.step_metrics import check_verdicts
from entrocraft.train.throughput import Clock, Work
from entrocraft.waves import loss_scale, subsample


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Graded:
    """Rollouts to some prompts, whole groups next to each other, and what became of them."""

    rollouts: Rollouts
    rewards: RewardBatch
    problems: tuple[Problem, ...]
    """One a prompt."""
    age: int = 0
    """Versions by which the weights that drew are older than the policy."""

    def groups(self, keep_P: Tensor) -> "Graded":
        """The prompts where the bool `keep_P` is True, renumbered; counts of failures stay those of all."""
        keep_R = keep_P[self.rollouts.group_R]
        part = self.rollouts.select(keep_R)
        number_P = torch.cumsum(keep_P, 0) - 1
        kept = keep_P.nonzero()[:, 0].tolist()
        prompts = tuple(self.rollouts.prompts[p] for p in kept)
        return Graded(
            problems=tuple(self.problems[p] for p in kept),
            age=self.age,
            rollouts=replace(part, group_R=number_P[part.group_R], prompts=prompts),
            rewards=replace(
                self.rewards,
                **{field.name: _select(getattr(self.rewards, field.name), keep_R) for field in fields(RewardBatch)},
            ),
        )

    def varied_P(self) -> Tensor:
        """bool: prompts whose rollouts did not all get the same reward; a missing verdict is no reward."""
        reward_R, group_R = self.rewards.reward_R, self.rollouts.group_R
        return torch.tensor(
            [len(torch.unique(g[~g.isnan()])) > 1 for g in (reward_R[group_R == p] for p in range(self.rollouts.P))]
        )

    @staticmethod
    def join(parts: Sequence["Graded"]) -> "Graded":
        """All prompts of several waves, in order."""
        return Graded(
            rollouts=join([part.rollouts for part in parts]),
            rewards=merged([part.rewards for part in parts]),
            problems=tuple(problem for part in parts for problem in part.problems),
            age=max(part.age for part in parts),
        )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Judged:
    """A step's batch, ready to learn from."""

    rollouts: Rollouts
    stats: TokenStats
    decision: Decision
    learning: Learning
    metrics: dict[str, float]
    """What sampling more or filtering did; empty where neither is configured."""


def _select(value: Any, keep_R: Tensor) -> Any:
    if isinstance(value, Tensor):
        return value[keep_R]
    return {name: _select(item, keep_R) for name, item in value.items()} if isinstance(value, dict) else value


def sample_wave(run: Run, pool: Grader, prompts: int, clock: Clock, *, first_prompt: int = 0) -> Graded:
    """The next `prompts` prompts of the data, at most all there are: sampled and graded."""
    drawn, age = run.drawing.take(
        run.step,
        last=run.config.optimizer.steps,
        prompts=min(prompts, len(run.problems)),
        first_prompt=first_prompt,
    )
    drawn_here = None if run.config.engine.overlap else Work.of(drawn.rollouts, range(drawn.rollouts.R))
    clock.lap("sample", tokens=drawn.rollouts.T, forward=drawn_here)
    problems = tuple(run.problems[i] for i in drawn.chosen)
    rewards = grade(drawn.rollouts, completion_texts(drawn.rollouts, run.policy), problems, pool)
    clock.lap("reward")
    rollouts, rewards = at_the_limit(run.config, drawn.rollouts, rewards)
    return Graded(rollouts=rollouts, rewards=rewards, problems=problems, age=age)


def collect(run: Run, pool: Grader, clock: Clock) -> Graded:
    """The first sampling of a step; with `refill`, as many more waves as it takes to have enough varied prompts."""
    batch, refill = run.config.batch, run.config.refill
    if run.waves is not None:
        size = run.waves.next_size(0, 0, direction=run.last_direction)
        return sample_wave(run, pool, size // batch.samples_per_prompt, clock)
    graded = sample_wave(run, pool, batch.prompts_per_step, clock)
    budget = int(refill.max_factor * batch.prompts_per_step)
    for _ in range(refill.max_waves - 1 if refill.zero_variance == "refill" else 0):
        missing = batch.prompts_per_step - int(graded.varied_P().sum())
        room = min(missing, budget - graded.rollouts.P)
        if room <= 0:
            break
        graded = Graded.join([graded, sample_wave(run, pool, room, clock, first_prompt=graded.rollouts.P)])
    run.drawing.rest()
    return graded


def judge(run: Run, pool: Grader, waves: list[Graded], clock: Clock) -> Judged:
    """Scores and decides; with `oversample`, samples on until enough is kept or the budget is spent.

    waves: what was sampled, which grows with what is sampled here, also where an error ends it. Raises NonFiniteError
    for a batch without a verdict, without a token that counts, or with a score that is no number.
    """
    before = run.controller.state_dict(), run.method_state
    sampled = Graded.join(waves)
    check_verdicts(sampled.rewards, sampled.rollouts)  # not of a later wave, which may add nothing and do no harm
    stats, wave = _scored(run, sampled, clock), 1
    while True:
        learnt, chosen_T = _learnt(run, sampled)
        own = stats.index(chosen_T)
        whole = sampled.rewards.reward_R, sampled.rollouts.group_R
        decision, learning = run.decide(learnt.rollouts, own, learnt.rewards.reward_R, whole)
        if run.waves is None:
            return Judged(
                rollouts=learnt.rollouts,
                stats=own,
                decision=decision,
                learning=learning,
                metrics=_filter_metrics(run, sampled, learnt),
            )
        kept, generated = int(effective(decision, learnt.rollouts).sum()), sampled.rollouts.R
        size = run.waves.next_size(kept, generated, direction=decision.direction, wave=wave)
        if not size:
            break
        run.controller.load_state_dict(before[0])
        run.method_state = before[1]
        more = sample_wave(
            run, pool, size // run.config.batch.samples_per_prompt, clock, first_prompt=sampled.rollouts.P
        )
        waves.append(more)
        stats = TokenStats.cat([stats, _scored(run, more, clock)])
        sampled, wave = Graded.join(waves), wave + 1
    run.drawing.rest()
    run.waves.observe(kept, generated, direction=decision.direction)
    run.last_direction = decision.direction
    decision, learning, metrics = _exactly(run, learnt.rollouts, decision, learning)
    metrics |= {"waves": float(wave), "generated": float(generated), **_filter_metrics(run, sampled, learnt)}
    return Judged(rollouts=learnt.rollouts, stats=own, decision=decision, learning=learning, metrics=metrics)


def _scored(run: Run, graded: Graded, clock: Clock) -> TokenStats:
    stats = run.policy.score(
        graded.rollouts, run.config.batch.tokens_per_microbatch, clamped_share=run.method.clamped_share
    )
    check_finite(stats)
    scored = Work.of(graded.rollouts, range(graded.rollouts.R))
    clock.lap("score", tokens=scored.tokens, forward=scored)
    return stats


def _learnt(run: Run, sampled: Graded) -> tuple[Graded, Tensor]:
    """The prompts that are learnt from, and the int64 indices of their tokens."""
    every_T = torch.arange(sampled.rollouts.T)
    if run.config.refill.zero_variance == "keep":
        return sampled, every_T
    choices = [sampled.varied_P()]
    if run.waves is None:  # a full wave and no more, where the last one was too lucky, or none of them lucky
        full = run.config.batch.prompts_per_step
        choices = [varied_P & (torch.cumsum(varied_P, 0) <= full) for varied_P in choices]
        choices.append(torch.arange(sampled.rollouts.P) < full)
    for keep_P in choices:
        keep_T = keep_P[sampled.rollouts.group_R][sampled.rollouts.rollout_T]
        if bool((keep_T & sampled.rollouts.mask_T).any()):
            return sampled.groups(keep_P), every_T[keep_T]
    return sampled, every_T  # nothing to learn, and nothing gained by an empty batch


def _filter_metrics(run: Run, sampled: Graded, learnt: Graded) -> dict[str, float]:
    if run.config.refill.zero_variance == "keep":
        return {}
    return {"prompts_sampled": float(sampled.rollouts.P), "prompts_learnt": float(learnt.rollouts.P)}


def effective(decision: Decision, rollouts: Rollouts) -> Tensor:
    """bool `[R]`: kept with an advantage, and a token that counts."""
    counted_R = torch.bincount(rollouts.rollout_T[decision.keep_T & rollouts.mask_T], minlength=rollouts.R)
    return decision.keep_R & (decision.advantage_R != 0) & (counted_R > 0)


def _exactly(
    run: Run, rollouts: Rollouts, decision: Decision, learning: Learning
) -> tuple[Decision, Learning, dict[str, float]]:
    """The decision with as many kept rollouts as were asked for; where there are fewer, a loss that is averaged over
    the kept is scaled down, so that they do not weigh more."""
    target = run.config.batch.rollouts_per_step
    effective_R = effective(decision, rollouts)
    kept = int(effective_R.sum())
    chosen = subsample(
        effective_R.numpy(),
        rollouts.group_R.numpy(),
        target,
        seed=run.config.seed,
        step=run.step,
        sample_R=rollouts.sample_R.numpy(),
    )
    chosen_R = torch.from_numpy(np.ascontiguousarray(chosen))
    predicted = {}
    if kept > target:
        run.controller.scale_prediction(target / kept)
        names = ("predicted_change_kept", "predicted_change")
        predicted = {name: target / kept * decision.metrics[name] for name in names}
    keep_T = decision.keep_T & chosen_R[rollouts.rollout_T]
    factor = loss_scale(kept, target) if learning.aggregation in KEPT_DENOMINATORS else 1.0
    used = replace(decision, keep_R=chosen_R, keep_T=keep_T, metrics={**decision.metrics, **predicted})
    return used, replace(learning, factor=factor), {"kept_before_subsampling": float(kept), "loss_factor": factor}
