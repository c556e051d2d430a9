"""Evaluation on held-out problems: samples n responses to each, grades them, and says what came of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from entrocraft import Rollouts
from entrocraft.train.config import Config, SamplingConfig
from entrocraft.train.config_evaluation import ks
from entrocraft.train.data import Problem
from entrocraft.train.eval_statistics import Outcome, as_metrics, pass_at_k, summarise
from entrocraft.train.metrics import EVALUATIONS_FILE, SAMPLES_FILE, MetricsLog
from entrocraft.train.policy import Policy
from entrocraft.train.problem_sets import DEFAULT_SET, ProblemSet
from entrocraft.train.rewards import RewardBatch
from entrocraft.train.sampling import RolloutEngine

if TYPE_CHECKING:
    from entrocraft.train.run import Run

__all__ = ["completion_texts", "evaluate", "evaluate_run", "grade", "pass_at_k", "sample_rows", "sampling_settings"]


class Grader(Protocol):
    """What grades: a `RewardPool`, or several as one."""

    def score(self, completions: list[str], answers: list[str], prompts: list[str]) -> RewardBatch:
        """Scores of R completions."""
        ...


def completion_texts(rollouts: Rollouts, policy: Policy) -> list[str]:
    """The R responses as text, without their end mark."""
    lengths = rollouts.length_R.tolist()
    rows = [ids.tolist() for ids in rollouts.token_T.split(lengths)]
    return [str(policy.tokenizer.decode(row, skip_special_tokens=True)) for row in rows]


def grade(rollouts: Rollouts, texts: list[str], problems: Sequence[Problem], pool: Grader) -> RewardBatch:
    """Scores the R responses; `problems` are the P problems whose prompts the rollouts answer."""
    asked = [problems[g] for g in rollouts.group_R.tolist()]
    return pool.score(texts, [problem.answer for problem in asked], [problem.prompt for problem in asked])


def sampling_settings(config: Config) -> SamplingConfig:
    """How responses are drawn in an evaluation: as in training, but for what `evaluation` says."""
    evaluation = config.evaluation
    return dataclasses.replace(
        config.sampling,
        temperature=evaluation.temperature,
        top_p=evaluation.top_p,
        top_k=evaluation.top_k,
        max_response_tokens=evaluation.max_response_tokens or config.sampling.max_response_tokens,
    )


Batch = tuple[list[Outcome], list[dict[str, Any]]]
"""Outcomes of some problems, and rows for `samples.jsonl`."""


def evaluate(
    policy: Policy,
    engine: RolloutEngine,
    held: ProblemSet,
    pool: Grader,
    config: Config,
    *,
    stream: Sequence[int],
    first: int = 0,
) -> Iterator[Batch]:
    """Draws `held.samples` responses to every problem from number `first` on, a batch of problems at a time.

    Batches hold `evaluation.rollouts_per_batch` responses, or one problem's. The random numbers of a batch are a
    function of `stream` and the number of its first problem, so an evaluation that was cut off between batches and goes
    on gives what it would have given. ValueError if `first` does not begin a batch.
    """
    size = max(1, config.evaluation.rollouts_per_batch // held.samples)
    if first % size and first < len(held.problems):
        raise ValueError(f"first={first} does not begin a batch of {size} problems")
    settings = sampling_settings(config)
    for start in range(first, len(held.problems), size):
        problems = held.problems[start : start + size]
        rollouts = engine.sample(
            held.prompts[start : start + size], held.samples, stream=(*stream, start), settings=settings
        )
        texts = completion_texts(rollouts, policy)
        rewards = grade(rollouts, texts, problems, pool)
        entropy_T = None
        if config.evaluation.entropy:
            entropy_T = policy.score(rollouts, config.batch.tokens_per_microbatch).entropy_T
        outcomes = _outcomes(rollouts, texts, rewards, problems, entropy_T)
        yield outcomes, sample_rows(rollouts, texts, rewards, problems)


def _outcomes(
    rollouts: Rollouts, texts: list[str], rewards: RewardBatch, problems: Sequence[Problem], entropy_T: Tensor | None
) -> list[Outcome]:
    group_R, right_R = rollouts.group_R, rewards.right_R
    per_R = torch.zeros(rollouts.R, dtype=torch.float64)
    if entropy_T is not None:
        per_R.index_add_(0, rollouts.rollout_T, entropy_T.double())
    others = list(rewards.score_R.items())[1:]
    outcomes = []
    for g, problem in enumerate(problems):
        own_R = group_R == g
        places = own_R.nonzero()[:, 0].tolist()
        reward_G = rewards.reward_R[own_R]
        outcomes.append(
            Outcome(
                problem=problem.index,
                samples=len(places),
                right=int(right_R[own_R].sum()),
                distinct=len({texts[r] for r in places if right_R[r]}),
                reward=float(reward_G.double().nansum()),
                no_verdict=int(reward_G.isnan().sum()),
                tokens=int(rollouts.length_R[own_R].sum()),
                truncated=int(rollouts.truncated_R[own_R].sum()),
                entropy=float(per_R[own_R].sum()) if entropy_T is not None else None,
                others={name: int((score_R[own_R] >= 1.0).sum()) for name, score_R in others},
            )
        )
    return outcomes


def sample_rows(
    rollouts: Rollouts,
    texts: Sequence[str],
    rewards: RewardBatch,
    problems: Sequence[Problem],
    **columns: Sequence[Any],
) -> list[dict[str, Any]]:
    """One row for `samples.jsonl` per response: problem, text, gold answer, scores; `columns` are added, one value a
    response."""
    group_R, length_R = rollouts.group_R.tolist(), rollouts.length_R.tolist()
    return [
        {
            "problem": problems[group_R[r]].index,
            "prompt": problems[group_R[r]].prompt,
            "response": texts[r],
            "answer": problems[group_R[r]].answer,
            "right": bool(rewards.right_R[r]),
            "reward": rewards.reward_R[r].item(),
            "scores": {name: score_R[r].item() for name, score_R in rewards.score_R.items()},
            "tokens": length_R[r],
            "truncated": bool(rollouts.truncated_R[r]),
            **{name: values[r] for name, values in columns.items()},
        }
        for r in range(rollouts.R)
    ]


def spread_out(rows: Sequence[dict[str, Any]], count: int) -> list[dict[str, Any]]:
    """At most `count` rows, evenly over all of them: of different problems rather than of one."""
    return [rows[len(rows) * i // count] for i in range(count)] if len(rows) > count else list(rows)


def evaluate_run(run: Run, pool: Grader, log: MetricsLog, stream: Sequence[int]) -> dict[str, float | None]:
    """Evaluates every held-out set of a run in training; returns the metrics of the step.

    Everything that was found, intervals too, becomes a line of `evaluations.jsonl`; some responses lines of
    `samples.jsonl`.
    """
    evaluation = run.config.evaluation
    summaries: dict[str, dict[str, Any]] = {}
    for number, held in enumerate(run.held_out):
        outcomes: list[Outcome] = []
        rows: list[dict[str, Any]] = []
        for some, samples in evaluate(run.policy, run.engine, held, pool, run.config, stream=(*stream, number)):
            outcomes += some
            rows += spread_out(samples, evaluation.saved_samples)
        summary = summarise(outcomes, ks(held.samples, evaluation.pass_at), bootstrap=evaluation.bootstrap)
        summaries[held.name] = summary
        place = {"step": run.step, "set": held.name}
        log.rows(EVALUATIONS_FILE, [{**place, "prompts": run.prompts_drawn, **summary}])
        shown = spread_out(rows, evaluation.saved_samples)
        log.rows(SAMPLES_FILE, [{**place, "kind": "evaluation", **row} for row in shown])
    return as_metrics(summaries, DEFAULT_SET)
