"""Trains a language model by policy gradient along an entropy curve.

    python train/train.py --config train/configs/gsm8k_tiny.yaml --data.train gsm8k_train.jsonl
    python train/train.py --config runs/gsm8k_tiny/config.yaml --resume auto
    torchrun --nproc-per-node 8 train/train.py --config ...

It is GRPO (group-relative advantages, clipped policy gradient, one number per rollout from a program that checks the
answer) without a critic, without a reference model and without a reward model, plus one thing: between scoring and
updating, a controller rejects rollouts so that the policy's entropy follows `entropy.schedule`.

Each step: sample, reward, score, decide, update, publish; now and then evaluate and save. Ctrl-C finishes the step,
saves and ends; `--resume auto` goes on from there, bit for bit. `--help` lists every setting; `--plan --world-size 8`
predicts what each of 8 processes needs of memory, and trains nothing.
"""

import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from entrocraft.train import plan_command
from entrocraft.train.config import Config
from entrocraft.train.config_reader import load_config, to_dict
from entrocraft.train.errors import NonFiniteError, TrainingStopped
from entrocraft.train.evaluation import completion_texts, evaluate_run, grade
from entrocraft.train.interrupt import Interrupt
from entrocraft.train.metrics import METRICS_FILE, MetricsLog
from entrocraft.train.parallel import Ranks, local_device
from entrocraft.train.policy import choose_device
from entrocraft.train.progress import Progress
from entrocraft.train.report import write_report
from entrocraft.train.rewards import RewardPool
from entrocraft.train.run import EVALUATE, Run, check_finite
from entrocraft.train.sharding import compute_dtype, needs_sharding
from entrocraft.train.spread import SilentLog, SpreadPool
from entrocraft.train.step import update
from entrocraft.train.step_metrics import (
    batch_metrics,
    check_verdicts,
    report_rewards,
    save_samples,
    watch_mismatch,
)
from entrocraft.train.throughput import Clock, Work
from entrocraft.train.wandb_log import WandbLog


def train_step(run: Run, pool: SpreadPool, log: MetricsLog, say: Callable[[str], None]) -> dict[str, float | str]:
    """One step: sample, reward, score, decide, update, publish. Returns its metrics; `say` tells of trouble."""
    config = run.config
    clock = Clock(run.policy.model, device=run.policy.device, ranks=run.ranks.size)
    drawn, age = run.drawing.take(run.step, last=config.optimizer.steps)
    rollouts = drawn.rollouts
    everything = Work.of(rollouts, range(rollouts.R))
    clock.lap("sample", tokens=rollouts.T, forward=None if config.engine.overlap else everything)
    texts, problems = completion_texts(rollouts, run.policy), [run.problems[i] for i in drawn.chosen]
    rewards = grade(rollouts, texts, problems, pool)
    clock.lap("reward")
    learnt = Work()
    row: dict[str, float | str] = {"lr": run.set_learning_rate(), "staleness": float(age)}
    try:
        check_verdicts(rewards)
        stats = run.policy.score(rollouts, config.batch.tokens_per_microbatch)
        check_finite(stats)
        row |= watch_mismatch(run, rollouts, stats, log, say)
        clock.lap("score", tokens=everything.tokens, forward=everything)
        decision, learning = run.decide(rollouts, stats, rewards.reward_R)
        row |= {**decision.metrics, "reason": decision.reason}
        row |= {f"method_{name}": value for name, value in learning.state.items()}
        row |= update(run.policy, run.optimizer, rollouts, stats, decision, learning)
        learnt = Work.taken_from(row)
        row["effective_samples"] = (decision.keep_R & (decision.advantage_R != 0)).sum().item()
        run.bad_in_a_row = 0
    except NonFiniteError as error:
        run.skip_step(rollouts, rewards.reward_R, str(error), log)
        say(f"step {run.step} skipped: {error}")
    clock.lap("update", tokens=learnt.tokens, forward=learnt, passes=3)
    run.drawing.settle()
    row |= run.engine.publish(run.step)
    clock.lap("publish")
    run.samples += rollouts.R
    report_rewards(run, rewards, log, say)
    save_samples(run, rollouts, texts, rewards, problems, log)
    return row | batch_metrics(run, rollouts, rewards) | clock.metrics(rollouts.T)


def train(run: Run, pool: SpreadPool, log: MetricsLog, progress: Progress, interrupt: Interrupt) -> None:
    """Steps until the run's last one or until interrupted; evaluates, logs and saves on the way."""
    config = run.config
    saved = run.step
    run.engine.publish(run.step)
    while run.step < config.optimizer.steps and not run.ranks.any(interrupt.requested):
        run.step += 1
        row = train_step(run, pool, log, progress.print)
        if run.evaluation_due():
            row |= evaluate_run(run, pool, log, (config.seed, EVALUATE, run.step))
        log.log(run.step, row)
        progress.update(run.step, row)
        if run.bad_in_a_row >= config.optimizer.max_bad_steps:
            run.stop_for_bad_steps()
        if run.step % config.checkpoint.every == 0:
            run.save()
            saved = run.step
    if run.step > saved:
        run.save()


def open_log(run: Run, resumed: int | None) -> MetricsLog:
    """The record of the run, and what it is passed on to."""
    logging = run.config.logging
    also = [] if logging.wandb == "off" else [WandbLog(logging, run.dir, to_dict(run.config))]
    return MetricsLog(run.dir, resume_step=resumed, also=also)


def announce(run: Run, resumed: int | None, console: Console) -> None:
    """Prints what is about to happen: the batch table, and where the run begins."""
    table = Table("batch", "", title=f"{run.dir}", title_justify="left")
    for name, value in run.batch_table():
        table.add_row(name, value)
    console.print(table)
    for folder in run.checkpoints.broken():
        console.print(f"ignoring {folder}: not a whole checkpoint")
    if resumed is not None:
        console.print(f"resuming after step {resumed}")


def run_training(config: Config) -> Run:
    """Trains from the start or from the newest checkpoint, then writes the model and the report. Returns the run."""
    device = local_device(choose_device(config.device))
    dtype = compute_dtype(config.parallel, device=device, pretrained=config.model.path is not None)
    group = needs_sharding(config.parallel, 1, dtype)  # FSDP2 wants one also for one process
    with Ranks.joined(device=device, timeout_s=config.parallel.timeout_s, needed=group) as ranks:
        return _run_on(config, ranks, device)


def _run_on(config: Config, ranks: Ranks, device: torch.device) -> Run:
    console, interrupt = Console(quiet=not ranks.main), Interrupt()
    run = Run(config, ranks, device)
    resumed = run.resume()
    announce(run, resumed, console)
    run.begin(resumed)
    try:
        with (
            interrupt.listening(),
            RewardPool.of(config.reward) as pool,
            open_log(run, resumed) if ranks.main else SilentLog() as log,
            Progress(config.optimizer.steps, run.step, console) as progress,
        ):
            if resumed is None and ranks.main:
                run.data.report(run.dir, log, console.print, config.data)
            train(run, SpreadPool(pool, ranks), log, progress, interrupt)
        run.policy.save(run.dir / "model")
    finally:
        if ranks.main and (run.dir / METRICS_FILE).stat().st_size:
            console.print(f"step {run.step} of {config.optimizer.steps}; report: {write_report(run.dir)}")
        run.end()
    return run


def main(argv: Sequence[str] | None = None) -> int:
    """Command line entry; returns the exit code: 0 finished, 1 stopped itself, 130 stopped by Ctrl-C with a
    checkpoint."""
    argv = sys.argv[1:] if argv is None else argv
    if plan_command.wanted(argv):
        return plan_command.main(argv)
    config = load_config(argv)
    try:
        run = run_training(config)
    except (TrainingStopped, NonFiniteError) as stop:
        if os.environ.get("RANK", "0") == "0":
            print(f"stopped: {stop}", file=sys.stderr)
        return 1
    return 0 if run.step >= config.optimizer.steps else 130


if __name__ == "__main__":
    # This file's folder stands first on the path: a user's `rewards.py` or `data.py` would be looked for here.
    sys.path[:] = [path for path in sys.path if Path(path).resolve() != Path(__file__).resolve().parent]
    from entrocraft.train.cli import report_errors

    sys.exit(report_errors(main))
