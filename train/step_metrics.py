"""What is counted about a step besides what its parts report themselves."""

import math
import statistics
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from entrocraft import Rollouts, TokenStats
from entrocraft.train.errors import NonFiniteError
from entrocraft.train.evaluation import completion_texts, sample_rows, spread_out
from entrocraft.train.metrics import SAMPLES_FILE, MetricsLog
from entrocraft.train.mismatch import mismatch_metrics
from entrocraft.train.rewards import RewardBatch
from entrocraft.train.run import Run

if TYPE_CHECKING:
    from entrocraft.train.batches import Graded


def batch_metrics(run: Run, rollouts: Rollouts, rewards: RewardBatch) -> dict[str, float]:
    """Rewards, lengths and counts of one batch of rollouts. Reward means are over the rollouts with a verdict; where
    there are several rewards, each has its own mean as well."""
    reward_R, several = rewards.reward_R, len(rewards.score_R) > 1
    verdicts = reward_R[~reward_R.isnan()].tolist()
    groups = [reward_g[~reward_g.isnan()] for reward_g in reward_R.split(run.config.batch.samples_per_prompt)]
    return {
        "samples": float(run.samples),
        "prompts": float(run.prompts_drawn),
        "reward": statistics.fmean(verdicts) if verdicts else math.nan,
        "reward_std": statistics.pstdev(verdicts) if verdicts else math.nan,
        "accuracy": rewards.right_R.float().mean().item(),
        **{f"reward_{name}": score_R.nanmean().item() for name, score_R in rewards.score_R.items() if several},
        "zero_variance_groups": float(sum(len(torch.unique(g)) <= 1 for g in groups)),
        "response_length": rollouts.length_R.float().mean().item(),
        "response_length_max": rollouts.length_R.max().item(),
        **{f"response_length_{name}": _mean(rollouts.length_R, of_R) for name, of_R in _outcomes(rewards)},
        "truncated_fraction": rollouts.truncated_R.float().mean().item(),
        "reward_timeouts": float(rewards.timeouts),
        "reward_errors": float(rewards.errors),
        "reward_unscorable": float(rewards.unscorable),
        "steps_skipped": float(run.bad_in_a_row > 0),
    }


def _outcomes(rewards: RewardBatch) -> list[tuple[str, torch.Tensor]]:
    return [("right", rewards.right_R), ("wrong", ~rewards.right_R & ~rewards.reward_R.isnan())]


def _mean(value_R: torch.Tensor, of_R: torch.Tensor) -> float:
    return value_R[of_R].float().mean().item() if bool(of_R.any()) else math.nan


def check_verdicts(rewards: RewardBatch, rollouts: Rollouts) -> None:
    """Raises NonFiniteError when no rollout of the batch has a verdict, or no token counts: nothing to learn from."""
    cut = int(rollouts.truncated_R.sum())
    if not bool(rollouts.mask_T.any()):
        raise NonFiniteError(
            f"none of the tokens of {rollouts.R} rollouts counts; {cut} of them were cut off, which reward.truncated "
            "may have masked: raise sampling.max_response_tokens"
        )
    if bool(rewards.reward_R.isnan().all()):
        raise NonFiniteError(
            f"none of {len(rewards.reward_R)} rollouts has a verdict: {rewards.errors} errors, {rewards.timeouts} "
            f"time-outs, {rewards.unscorable} returned None, {cut} were cut off (reward.truncated); the first error: "
            f"{rewards.first_error}"
        )


def report_rewards(run: Run, rewards: RewardBatch, log: MetricsLog, say: Callable[[str], None]) -> None:
    """Writes an event for rollouts left without a verdict, and tells the user the first time it happens."""
    missing = rewards.errors + rewards.timeouts + rewards.unscorable
    if not missing:
        return
    counts = {"errors": rewards.errors, "timeouts": rewards.timeouts, "unscorable": rewards.unscorable}
    log.event("reward_failed", step=run.step, **counts, first=rewards.first_error)
    if not run.told_of_rewards:
        run.told_of_rewards = True
        say(f"step {run.step}: no verdict on {missing} of {len(rewards.reward_R)} rollouts: {counts}")


def watch_mismatch(
    run: Run, rollouts: Rollouts, stats: TokenStats, log: MetricsLog, say: Callable[[str], None]
) -> dict[str, float]:
    """Distance between sampler and policy, and the importance weights made of it; an event and a line on an alarm.

    Raises TrainingStopped beyond `mismatch.stop`.
    """
    metrics = mismatch_metrics(stats.logprob_T, rollouts)
    alarm = run.mismatch.observe(run.step, metrics)
    if alarm is not None:
        log.event("mismatch_alarm", step=run.step, reason=alarm, weight_version=rollouts.weight_version)
        say(f"step {run.step}: {alarm}")
    if metrics and run.importance is not None and rollouts.sampler_logprob_T is not None:
        packed = rollouts.rollout_T, rollouts.mask_T, rollouts.R
        metrics |= run.importance(stats.logprob_T, rollouts.sampler_logprob_T, *packed).metrics
    return metrics | ({"mismatch_alarm": float(alarm is not None)} if metrics else {})


def save_samples(run: Run, sampled: "Graded", log: MetricsLog) -> None:
    """Writes some of a step's rollouts, with their rewards, to `samples.jsonl`, every `saved_samples_every` steps."""
    evaluation = run.config.evaluation
    if not evaluation.saved_samples_every or run.step % evaluation.saved_samples_every:
        return
    texts = completion_texts(sampled.rollouts, run.policy)
    found = sample_rows(sampled.rollouts, texts, sampled.rewards, sampled.problems)
    rows = spread_out(found, evaluation.saved_samples)
    log.rows(SAMPLES_FILE, [{"step": run.step, "kind": "training", **row} for row in rows])
