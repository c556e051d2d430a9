"""The demo: trains one tiny model three ways and shows what becomes of its entropy.

    make demo                                   # or: python train/demo.py --seed 2 --out runs/demo_seed2

A byte-level Qwen3 is warm-started on the spot (cached for the next time), then trained by real GRPO to write two
numbers that add up to N, in three arms that differ in one line of configuration: `none` (plain GRPO), `soft` (the
paper's rule, arXiv 2604.26326 v1) and `budget` (this project's rule). Everything runs through the same code as a
large run: config file, fused op, controller, loop, checkpoint, report. Interrupted, it goes on where it stopped.
"""

import argparse
import importlib.metadata
import json
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from entrocraft.train.config import Config
from entrocraft.train.config_reader import load_config
from entrocraft.train.metrics import read_metrics
from entrocraft.train.policy import choose_device
from entrocraft.train.report import compare_runs
from entrocraft.train.train import run_training
from entrocraft.train.warm_start import STEPS as WARM_START_STEPS
from entrocraft.train.warm_start import SUMS, warm_start, write_problems

CONFIG = Path(__file__).parent / "configs" / "demo.yaml"
NARROW = 128
"""Widest model that is warm-started at the narrow ones' learning rate."""
WIDE_SUMS = replace(SUMS, key=f"{SUMS.key} wide", learning_rate=1e-3)
ARMS = {"none": ("--entropy.rule=none",), "soft": ("--entropy.preset=paper_v1", "--entropy.rule=null"), "budget": ()}


def arm_config(
    arm: str, out: Path, model: Path, data: tuple[Path, Path], seed: int, extra: Sequence[str], recipe: Path = CONFIG
) -> Config:
    """The demo's configuration file with what differs from machine to machine and from arm to arm."""
    train, held_out = data
    return load_config(
        [
            f"--config={recipe}",
            f"--run_dir={out / arm}",
            f"--model.path={model}",
            f"--data.train={train}",
            f"--data.eval={held_out}",
            f"--seed={seed}",
            "--resume=auto",
            *ARMS[arm],
            *extra,
        ]
    )


def arm_summary(rows: list[dict[str, Any]], samples: int) -> dict[str, Any]:
    """What a finished arm did, in numbers. Means over steps leave out steps that were skipped.

    entropy, target: nats per token, at each step. tracking_mae: mean |entropy - target| over the steps after the
    first third, nats. reward, pass_at_n, distinct_correct (of n): on held-out prompts after the last step; reward is
    the share of right answers. kept_fraction: mean over steps. seconds: training alone, without warm start and
    start-up.
    """
    entropy, target = [row.get("entropy") for row in rows], [row.get("target") for row in rows]
    errors = [abs(e - t) for e, t in zip(entropy, target, strict=True) if e is not None and t is not None]
    late = errors[len(errors) // 3 :]
    kept = [row["kept_fraction"] for row in rows if row.get("kept_fraction") is not None]
    last = rows[-1]
    return {
        "tracking_mae": sum(late) / len(late),
        "reward": last["eval_accuracy"],
        f"pass_at_{samples}": last[f"eval_pass_at_{samples}"],
        "distinct_correct": last["eval_distinct_correct"],
        "kept_fraction": sum(kept) / len(kept),
        "seconds": sum(row["seconds"] for row in rows),
        "entropy_start": entropy[0],
        "entropy_end": last["eval_entropy"],
        "entropy": entropy,
        "target": target,
    }


def provenance() -> dict[str, Any]:
    """Commit (None outside a checkout, with `-dirty` for uncommitted changes), versions and machine."""
    root = Path(__file__).resolve().parent.parent
    git = ["git", "-C", str(root)]
    try:
        top = subprocess.run([*git, "rev-parse", "--show-toplevel"], capture_output=True, text=True, check=True)
        if Path(top.stdout.strip()).resolve() != root:
            raise OSError("installed inside somebody else's checkout")
        described = subprocess.run(
            [*git, "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"],
            capture_output=True,
            text=True,
            check=True,
        )
        commit = described.stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = None
    names = ("entrocraft", "torch", "transformers", "numpy", "triton")
    versions = {name: importlib.metadata.version(name) for name in names if _installed(name)}
    return {
        "commit": commit,
        "versions": {"python": platform.python_version(), **versions},
        "machine": f"{platform.system()} {platform.machine()}",
    }


def _installed(name: str) -> bool:
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def show(summary: dict[str, Any], console: Console) -> None:
    """Prints the table of the arms."""
    passed = next(key for key in next(iter(summary["arms"].values())) if key.startswith("pass_at_"))
    samples = passed.removeprefix("pass_at_")
    table = Table(title=f"seed {summary['seed']}", title_justify="left")
    for column in (
        "arm",
        "entropy",
        "tracking error",
        "held-out reward",
        f"pass@{samples}",
        f"distinct right of {samples}",
        "kept",
        "seconds",
    ):
        table.add_column(column, justify="left" if column == "arm" else "right")
    for name, arm in summary["arms"].items():
        table.add_row(
            name,
            f"{arm['entropy_start']:.2f} -> {arm['entropy_end']:.2f}",
            f"{arm['tracking_mae']:.3f}",
            f"{arm['reward']:.2f}",
            f"{arm[passed]:.2f}",
            f"{arm['distinct_correct']:.1f}",
            f"{arm['kept_fraction']:.0%}",
            f"{arm['seconds']:.0f}",
        )
    console.print(table)


def begin_again(out: Path, configs: dict[str, Config]) -> None:
    """Removes the arms that an earlier demo left here, except those of an interrupted one with the same settings.

    Raises ValueError for a folder of that name that is no run: it is somebody's, and stays.
    """
    finished = out / "summary.json"
    for arm, config in configs.items():
        folder = out / arm
        saved = folder / "config.yaml"
        if folder.exists() and any(folder.iterdir()) and not saved.exists():
            raise ValueError(f"--out {out}: {folder} is not an arm of a demo (no config.yaml); choose another folder")
        try:
            same = saved.exists() and load_config([f"--config={saved}"]) == config
        except ValueError:
            same = False
        if finished.exists() or not same:
            shutil.rmtree(folder, ignore_errors=True)
    finished.unlink(missing_ok=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Command line entry; returns 0, or 130 when stopped by Ctrl-C (run it again to go on)."""
    parser = argparse.ArgumentParser(
        prog="demo", description="Trains a tiny model three ways and draws its entropy curves."
    )
    parser.add_argument(
        "--seed", type=int, default=1, help="seed of model, data order and sampling (default: %(default)s)"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("runs/demo"), help="folder to write into (default: %(default)s)"
    )
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS), help="which arms (default: all)")
    parser.add_argument(
        "--warm-start-steps", type=int, default=WARM_START_STEPS, help="supervised steps (default: %(default)s)"
    )
    parser.add_argument("--recipe", type=Path, default=CONFIG, help="configuration file (default: %(default)s)")
    options, extra = parser.parse_known_args(argv)
    console, started, origin = Console(), time.perf_counter(), provenance()
    options.out.mkdir(parents=True, exist_ok=True)
    data = write_problems(options.out / "data")
    settings = load_config([f"--config={options.recipe}", *extra])
    tiny = settings.model.tiny
    device = choose_device(settings.device)
    lessons = SUMS if tiny.hidden_size <= NARROW else WIDE_SUMS
    steps = options.warm_start_steps
    model = warm_start(options.out / "models", tiny, options.seed, steps=steps, lessons=lessons, device=device)
    configs = {
        arm: arm_config(arm, options.out, model, data, options.seed, extra, options.recipe) for arm in options.arms
    }
    begin_again(options.out, configs)
    arms: dict[str, Any] = {}
    for arm, config in configs.items():
        console.rule(f"{arm}: {config.entropy.preset or config.entropy.rule}")
        run = run_training(config)
        if run.step < config.optimizer.steps:
            return 130
        arms[arm] = arm_summary(read_metrics(run.dir), config.evaluation.samples)
    summary = {**origin, "seed": options.seed, "seconds": time.perf_counter() - started, "arms": arms}
    (options.out / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    show(summary, console)
    if len(arms) > 1:
        console.print(f"curves: {compare_runs([options.out / arm for arm in arms], options.out)}")
    return 0


if __name__ == "__main__":
    from entrocraft.train.cli import report_errors

    sys.exit(report_errors(main))
