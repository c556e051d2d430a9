"""`train.py` with real vLLM: fresh engines with the same weights draw the same tokens; two processes draw ahead."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

SCRIPT = Path(__file__).resolve().parents[2] / "train" / "train.py"


@pytest.fixture
def work(tmp_path):
    """A folder with problems, an importable reward and a small configuration."""
    (tmp_path / "odd_rewards.py").write_text("def odd(completion, answer, prompt): return float(len(completion) % 2)\n")
    problems = [{"prompt": f"{i} plus {i} is", "answer": str(i)} for i in range(8)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in problems))
    config = {
        "run_dir": "run",
        "device": "cpu",
        "model": {"tiny": {"hidden_size": 64, "layers": 2, "heads": 2, "mlp_size": 128, "context": 64}},
        "data": {"train": "train.jsonl", "max_prompt_tokens": 32},
        "batch": {"prompts_per_step": 4, "samples_per_prompt": 4, "tokens_per_microbatch": 128},
        "sampling": {"max_response_tokens": 8},
        "engine": {"name": "vllm", "memory": 0.02},
        "reward": {"name": "odd_rewards:odd", "workers": 0},
        "entropy": {"rule": "budget", "schedule": {"start": "measured", "end": 5.0}},
        "optimizer": {"steps": 100, "lr": 0.01},
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    return tmp_path


def train(work, *arguments, launcher=()):
    """What the command printed, and the metrics that it left in this folder under `work`."""
    done = subprocess.run(
        [sys.executable, *launcher, str(SCRIPT), "--config=run.yaml", *arguments],
        env={**os.environ, "PYTHONPATH": str(work), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        cwd=work,
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def rows(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_run_goes_on_to_the_token(work):
    told = train(work, "--verify-resume=4")
    assert "exact to the token" in " ".join(told.split())
    assert "resume verified, " in told
    made = rows(work / "run" / "verify_resume" / "resumed")
    assert [row["step"] for row in made] == [1, 2, 3, 4]
    assert all(row["mismatch_mean"] < 1e-4 for row in made)  # it was vLLM that sampled, with these weights


def test_two_processes_draw_ahead_while_they_learn(work):
    """Each rank's drawing talks to the other's while the ranks score, grade and update: messages must not mix."""
    launcher = ("-P", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    train(work, "--engine.overlap=true", "--optimizer.steps=8", launcher=launcher)
    made = rows(work / "run")
    assert [row["staleness"] for row in made] == [0] + [1] * 7
    assert all(row["updates"] > 0 for row in made)
    assert all(row["mismatch_max"] > 1e-3 for row in made[1:])  # older weights show
