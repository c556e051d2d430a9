"""`train.py --verify-resume` with real vLLM: a fresh engine with the same weights draws the same tokens."""

import json
import os
import subprocess
import sys
from pathlib import Path

import yaml

SCRIPT = Path(__file__).resolve().parents[2] / "train" / "train.py"


def test_a_run_goes_on_to_the_token(tmp_path):
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
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--verify-resume=4", "--config=run.yaml"],
        env={**os.environ, "PYTHONPATH": str(tmp_path), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "exact to the token" in " ".join(done.stdout.split())
    assert "resume verified, " in done.stdout
    rows = [
        json.loads(line) for line in (tmp_path / "run/verify_resume/resumed/metrics.jsonl").read_text().splitlines()
    ]
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert all(row["mismatch_mean"] < 1e-4 for row in rows)  # it was vLLM that sampled, with these weights
