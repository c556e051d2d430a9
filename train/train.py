"""Trains a language model by policy gradient along an entropy curve.

    python train/train.py --config train/configs/gsm8k_tiny.yaml --data.train gsm8k_train.jsonl
    python train/train.py --config runs/gsm8k_tiny/config.yaml --resume auto
    torchrun --nproc-per-node 8 train/train.py --config ...
    torchrun --nproc-per-node 8 train/train.py --verify-resume --config ...

It is GRPO (group-relative advantages, clipped policy gradient, one number per rollout from a program that checks the
answer) without a critic and without a reward model, with a reference model only where `reference.kl_coefficient` asks
for one, plus one thing: between scoring and updating, a controller rejects rollouts so that the policy's entropy
follows `entropy.schedule`.

Each step: sample, reward, score, decide, update, publish; now and then evaluate and save. Ctrl-C finishes the step,
saves and ends; `--resume auto` goes on from there, bit for bit, which `--verify-resume` proves for a configuration by
training a few steps twice. `--plan --world-size 8` predicts what each of 8 processes needs of memory, and trains
nothing. `--help` lists every setting.
"""

import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from entrocraft.train import plan_command, verify_resume
from entrocraft.train.batch_table import batch_table
from entrocraft.train.batches import Graded, collect, effective, judge
from entrocraft.train.config import Config
from entrocraft.train.config_reader import load_config, to_dict
from entrocraft.train.errors import NonFiniteError, TrainingStopped, reason_to_stop
from entrocraft.train.evaluation import Grader, evaluate_run
from entrocraft.train.interrupt import Interrupt
from entrocraft.train.metrics import METRICS_FILE, MetricsLog
from entrocraft.train.parallel import Ranks, local_device
from entrocraft.train.policy import choose_device
from entrocraft.train.progress import Progress
from entrocraft.train.report import write_report
from entrocraft.train.rewards import RewardPool
from entrocraft.train.run import EVALUATE, Run
from entrocraft.train.self_check import self_check
from entrocraft.train.sharding import compute_dtype, needs_sharding
from entrocraft.train.spread import SilentLog, SpreadPool
from entrocraft.train.step import update
from entrocraft.train.step_metrics import batch_metrics, report_rewards, save_samples, watch_mismatch
from entrocraft.train.throughput import Clock, Work
from entrocraft.train.wandb_log import WandbLog


def train_step(run: Run, pool: Grader, log: MetricsLog, say: Callable[[str], None]) -> dict[str, float | str]:
    """One step: sample, reward, score, decide, update, publish. Returns its metrics; `say` tells of trouble."""
    clock = Clock(run.policy.model, device=run.policy.device, ranks=run.ranks.size)
    waves, learnt, trouble = [collect(run, pool, clock)], Work(), ""
    row: dict[str, float | str] = {"lr": run.set_learning_rate(), "staleness": float(waves[0].age)}
    try:
        judged = judge(run, pool, waves, clock)
        decision, learning = judged.decision, judged.learning
        row |= self_check(run, judged.rollouts)
        row |= watch_mismatch(run, judged.rollouts, judged.stats, log, say)
        row |= {**decision.metrics, "reason": decision.reason, **judged.metrics}
        row |= {f"method_{name}": value for name, value in learning.state.items()}
        row |= update(run.policy, run.optimizer, judged.rollouts, judged.stats, decision, learning)
        learnt = Work.taken_from(row)
        row["effective_samples"] = effective(decision, judged.rollouts).sum().item()
        run.bad_in_a_row = 0
    except NonFiniteError as error:
        trouble = str(error)
    sampled = Graded.join(waves)
    if trouble:
        run.skip_step(sampled.rollouts, sampled.rewards.reward_R, trouble, log)
        say(f"step {run.step} skipped: {trouble}")
    clock.lap("update", tokens=learnt.tokens, forward=learnt, passes=3)
    run.drawing.settle()
    row |= run.engine.publish(run.step)
    clock.lap("publish")
    run.count(sampled.rollouts.R)
    report_rewards(run, sampled.rewards, log, say)
    save_samples(run, sampled, log)
    return row | batch_metrics(run, sampled.rollouts, sampled.rewards) | clock.metrics(sampled.rollouts.T)


def train(run: Run, pool: Grader, log: MetricsLog, progress: Progress, interrupt: Interrupt) -> None:
    """Steps until the run's last one or until interrupted; evaluates, logs and saves on the way."""
    config = run.config
    saved = run.step
    run.engine.publish(run.step)
    while run.step < config.optimizer.steps and not run.ranks.any(interrupt.requested or run.checkpoints.failed):
        run.step += 1
        row = train_step(run, pool, log, progress.print)
        if run.evaluation_due():
            row |= evaluate_run(run, pool, log, (config.seed, EVALUATE, run.step))
        value = run.value(row)
        log.log(run.step, row)
        progress.update(run.step, row)
        if run.bad_in_a_row >= config.optimizer.max_bad_steps:
            log.sync()
            run.stop_for_bad_steps()
        if run.step % config.checkpoint.every == 0 or run.step == config.optimizer.steps:
            log.sync()
            run.save(value)
            saved = run.step
    if run.step > saved:
        log.sync()
        run.save()
    run.checkpoints.wait()


def open_log(run: Run, resumed: int | None) -> MetricsLog:
    """The record of the run, and what it is passed on to."""
    logging = run.config.logging
    also = [] if logging.wandb == "off" else [WandbLog(logging, run.dir, to_dict(run.config))]
    return MetricsLog(run.dir, resume_step=resumed, also=also)


def announce(run: Run, resumed: int | None, console: Console) -> None:
    """Prints what is about to happen: the batch table, and where the run begins."""
    table = Table("batch", "", title=f"{run.dir}", title_justify="left")
    for name, value in batch_table(run):
        table.add_row(name, value)
    console.print(table)
    for folder in run.checkpoints.broken():
        console.print(f"ignoring {folder}: not a whole checkpoint")
    for folder, reason in run.checkpoints.damaged.items():
        console.print(f"ignoring {folder}: {reason}; going on from the one before")
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
    damaged = {str(folder): reason for folder, reason in run.checkpoints.damaged.items()}
    run.begin(resumed)
    try:
        with (
            interrupt.listening(),
            RewardPool.of(config.reward) as pool,
            open_log(run, resumed) if ranks.main else SilentLog() as log,
            Progress(config.optimizer.steps, run.step, console) as progress,
        ):
            for folder, reason in damaged.items():
                log.event("checkpoint_damaged", step=run.step, folder=folder, reason=reason)
            if resumed is None and ranks.main:
                run.data.report(run.dir, log, console.print, config.data)
            train(run, SpreadPool(pool, ranks), log, progress, interrupt)
        run.policy.save(run.dir / "model")
    finally:
        if ranks.main and (run.dir / METRICS_FILE).stat().st_size:
            report = _report(run.dir) if config.logging.report else "logging.report is off"
            console.print(f"step {run.step} of {config.optimizer.steps}; report: {report}")
        run.end()
    return run


def _report(run_dir: Path) -> str:
    """Where the report is, or why there is none: what ended the run may keep it from being written too."""
    try:
        return str(write_report(run_dir))
    except OSError as error:
        return f"none, {error}"


def main(argv: Sequence[str] | None = None) -> int:
    """Command line entry; returns the exit code: 0 finished, 1 stopped itself, 130 stopped by Ctrl-C with a
    checkpoint."""
    argv = sys.argv[1:] if argv is None else argv
    if plan_command.wanted(argv):
        return plan_command.main(argv)
    config = None if verify_resume.asked_for(argv) else load_config(argv)
    try:
        if config is None:
            return verify_resume.verify(argv)
        run = run_training(config)
    except Exception as error:
        reason = reason_to_stop(error, int(os.environ.get("WORLD_SIZE", "1")))
        if reason is None:
            raise
        if os.environ.get("RANK", "0") == "0" or not isinstance(error, TrainingStopped):
            print(f"stopped: {reason}", file=sys.stderr)
        return 1
    return 0 if run.step >= config.optimizer.steps else 130


if __name__ == "__main__":
    # This file's folder stands first on the path: a user's `rewards.py` or `data.py` would be looked for here.
    sys.path[:] = [path for path in sys.path if Path(path).resolve() != Path(__file__).resolve().parent]
    from entrocraft.train.cli import report_errors

    sys.exit(report_errors(main))
