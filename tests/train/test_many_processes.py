"""`torchrun train/train.py`: two processes make the run that one makes, and either goes on where the other stopped."""

import contextlib
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from entrocraft.train.metrics import depends_on_the_clock
from entrocraft.train.train import main

pytestmark = pytest.mark.runs

SCRIPT = Path(__file__).resolve().parents[2] / "train" / "train.py"
TORCHRUN = ("-P", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")


@pytest.fixture
def work(tmp_path):
    """A folder with problems, an importable reward and a small configuration."""
    (tmp_path / "odd_rewards.py").write_text("def odd(completion, answer, prompt): return float(len(completion) % 2)\n")
    problems = [{"prompt": f"{i} plus {i} is", "answer": str(i)} for i in range(12)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in problems))
    config = {
        "device": "cpu",
        "model": {"tiny": {"hidden_size": 16, "layers": 1, "heads": 2, "mlp_size": 32, "context": 64}},
        "data": {"train": "train.jsonl", "eval": "train.jsonl", "limit": 9},
        "batch": {"prompts_per_step": 5, "samples_per_prompt": 4, "tokens_per_microbatch": 64},
        "sampling": {"max_response_tokens": 6},
        "reward": {"name": "odd_rewards:odd", "workers": 0},
        "entropy": {"rule": "budget", "schedule": {"start": "measured", "end": 5.0, "steps": 4}},
        "optimizer": {"steps": 4, "lr": 0.01},
        "evaluation": {"every": 2, "samples": 2},
        "checkpoint": {"every": 2},
        "logging": {"report": False},
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    return tmp_path


def run(work, *arguments):
    """torchrun with two processes; what they printed."""
    command = [sys.executable, *TORCHRUN, str(SCRIPT), "--config=run.yaml", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(work), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, cwd=work, capture_output=True, text=True, timeout=150)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def here(work, monkeypatch, *arguments):
    """One process: this one."""
    monkeypatch.chdir(work)
    monkeypatch.syspath_prepend(str(work))
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        assert main(["--config=run.yaml", *arguments]) == 0
    return out.getvalue()


def rows(folder):
    """The metrics of a run without those of the machine."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if not depends_on_the_clock(k)} for row in lines]


def test_two_processes_make_the_run_of_one_and_one_goes_on_from_them(work, monkeypatch):
    here(work, monkeypatch, "--run_dir=one")
    # Layouts differ too: two processes keep their shards in host memory, and one has no shards.
    told = run(work, "--run_dir=two", "--optimizer.steps=2", "--parallel.cpu_offload=true")
    assert told.count("at most 64 on each of 2 processes") == 1  # rank 0 alone speaks
    alone = here(work, monkeypatch, "--run_dir=two", "--resume=auto", "--logging.report=true")
    assert "resuming after step 2" in alone
    one, two = rows(work / "one"), rows(work / "two")
    assert [row["step"] for row in two] == [1, 2, 3, 4]
    assert any(row["kept_fraction"] < 1 for row in one)
    for expected, actual in zip(one, two, strict=True):
        assert expected.keys() == actual.keys()
        for name, value in expected.items():
            if isinstance(value, float):
                assert actual[name] == pytest.approx(value, rel=2e-4, abs=1e-5), name  # Adam makes steps of rounding
            else:
                assert actual[name] == value, name
    assert (work / "two" / "report.html").stat().st_size > 10_000
    assert (work / "two" / "model" / "model.safetensors").stat().st_size > 10_000
