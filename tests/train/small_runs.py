"""Runs of a few steps in this process: a tiny model, twelve problems, rewards of the test's own."""

import json
from pathlib import Path
from typing import Any

import yaml

from entrocraft.train.config_reader import load_config
from entrocraft.train.metrics import MetricsLog
from entrocraft.train.rewards import RewardPool
from entrocraft.train.run import Run
from entrocraft.train.spread import SpreadPool
from entrocraft.train.train import train_step


def lay_out(folder: Path, rewards: str, *, name: str, entropy: dict[str, Any], steps: int) -> None:
    """Writes `own_rewards.py`, problems and `run.yaml`; `name` is the reward's in that module."""
    (folder / "own_rewards.py").write_text(rewards)
    problems = [{"prompt": f"{i} plus {i} is", "answer": str(i)} for i in range(12)]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in problems))
    config = {
        "device": "cpu",
        "model": {"tiny": {"hidden_size": 16, "layers": 1, "heads": 2, "mlp_size": 32, "context": 64}},
        "data": {"train": "train.jsonl"},
        "batch": {"prompts_per_step": 4, "samples_per_prompt": 8, "tokens_per_microbatch": 512},
        "sampling": {"max_response_tokens": 6},
        "reward": {"name": f"own_rewards:{name}", "workers": 0},
        "entropy": entropy,
        "optimizer": {"steps": steps, "lr": 0.01},
        "checkpoint": {"every": 2},
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(config))


def run_steps(name: str, *arguments: str, steps: int) -> tuple[Run, list[dict[str, Any]]]:
    """So many further steps of the run in the folder `name`, which then has a checkpoint, and their metrics."""
    run = Run(load_config(["--config=run.yaml", f"--run_dir={name}", "--resume=auto", *arguments]))
    resumed = run.resume()
    run.begin(resumed)
    run.engine.publish(run.step)
    made = []
    with (
        RewardPool(run.config.reward.name, workers=0, timeout_s=1.0) as pool,
        MetricsLog(run.dir, resume_step=resumed) as log,
    ):
        for _ in range(steps):
            run.step += 1
            made.append(train_step(run, SpreadPool(pool, run.ranks), log, print))
    run.save()
    run.end()
    return run, made
