"""`train.py --verify-resume` in real processes, one and two; and what it says of runs that are not the same."""

import io
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from rich.console import Console
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from entrocraft.train import verify_resume
from entrocraft.train.config import Config
from entrocraft.train.config_engine import EngineConfig
from entrocraft.train.config_reader import load_config
from entrocraft.train.errors import TrainingStopped
from entrocraft.train.parallel import Ranks
from entrocraft.train.run_difference import compare_checkpoints, compare_records, compare_statistically
from entrocraft.train.train import run_training
from entrocraft.train.verify_resume import asked_for, exactness, judge, parse

pytestmark = pytest.mark.runs

SCRIPT = Path(__file__).resolve().parents[2] / "train" / "train.py"
TORCHRUN = ("-P", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")

# Tosses coins of Python's and of numpy's, as a reward of one's own may: their states must be in the checkpoint.
REWARD = """
import random
import numpy as np

def odd(completion, answer, prompt):
    return float((len(completion) + (random.random() < 0.2) + (np.random.random() < 0.2)) % 2)
"""


def prepared(work):
    """A folder with rewards, problems and `run.yaml`."""
    (work / "odd_rewards.py").write_text(REWARD)
    problems = [{"prompt": f"{i} plus {i} is", "answer": str(i)} for i in range(12)]
    (work / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in problems))
    config = {
        "run_dir": "run",
        "device": "cpu",
        "model": {"tiny": {"hidden_size": 16, "layers": 1, "heads": 2, "mlp_size": 32, "context": 64}},
        "data": {"train": "train.jsonl", "eval": "train.jsonl"},
        "batch": {"prompts_per_step": 5, "samples_per_prompt": 4, "tokens_per_microbatch": 64},
        "sampling": {"max_response_tokens": 6},
        "reward": {"name": "odd_rewards:odd", "workers": 0},
        "entropy": {"rule": "budget", "schedule": {"start": "measured", "end": 5.0}},
        "optimizer": {"steps": 1000, "lr": 0.01},
        "evaluation": {"every": 2, "samples": 2},
    }
    (work / "run.yaml").write_text(yaml.safe_dump(config))


def verified(work, *launcher):
    """The command in a process of its own."""
    prepared(work)
    return subprocess.run(
        [sys.executable, *launcher, str(SCRIPT), "--verify-resume=4", "--config=run.yaml"],
        env={**os.environ, "PYTHONPATH": str(work), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "COLUMNS": "200"},
        cwd=work,
        capture_output=True,
        text=True,
        timeout=400,
    )


def test_one_process_goes_on_bit_for_bit(tmp_path):
    done = verified(tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    folder, told = tmp_path / "run" / "verify_resume", done.stdout
    assert "1 process(es), exact: " in told
    assert "resume verified, " in told
    assert "seconds_publish" in told  # left out, like all that depends on the clock
    assert "DIFFERS" not in told
    counts = {line.split("│")[1].strip(): int(line.split("│")[2]) for line in told.splitlines() if "equal" in line}
    (metrics,) = [count for name, count in counts.items() if name.startswith("metrics.jsonl")]
    assert metrics > 2 * 40
    assert counts["final weights"] == 14
    assert counts["final optimizer"] > 2 * 14
    assert {kind: counts[f"final random state, {kind}"] for kind in ("torch", "python", "numpy")} == dict.fromkeys(
        ("torch", "python", "numpy"), 1
    )
    steps = [json.loads(row)["step"] for row in (folder / "resumed" / "metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3, 4]
    assert not (folder.parent / "metrics.jsonl").exists()


def test_two_processes_go_on_bit_for_bit(tmp_path):
    done = verified(tmp_path, *TORCHRUN)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("resume verified, ") == 1  # rank 0 alone speaks
    assert "2 process(es), exact: " in done.stdout


@pytest.fixture(scope="module")
def four_steps(tmp_path_factory):
    """A run of four steps, made in this process."""
    work = tmp_path_factory.mktemp("four_steps")
    prepared(work)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(work))
        patch.chdir(work)
        run_training(load_config(["--config=run.yaml", "--optimizer.steps=4", "--checkpoint.every=2"]))
    return work / "run"


@pytest.fixture
def copies(four_steps, tmp_path):
    """Two runs that are equal, to be tampered with."""
    for name in ("whole", "resumed"):
        shutil.copytree(four_steps, tmp_path / name)
    return tmp_path / "whole", tmp_path / "resumed"


def differences(lines):
    return {line.what.split(",")[0]: line.difference for line in lines if line.difference}


def test_one_changed_number_is_named_with_its_step(copies):
    whole, resumed = copies
    assert differences(compare_records(whole, resumed, after=2)) == {}
    rows = [json.loads(line) for line in (resumed / "metrics.jsonl").read_text().splitlines()]
    entropy = rows[3]["entropy"]
    rows[3] |= {"entropy": entropy + 1e-15 * 8, "seconds": 99.0}
    rows[1]["entropy"] = 0.0  # before the restart: copied, so never compared
    (resumed / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = differences(compare_records(whole, resumed, after=2))
    assert list(found) == ["metrics.jsonl"]
    assert found["metrics.jsonl"].startswith(f"step 4, entropy: {entropy!r} and ")
    (resumed / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:3]))
    told = compare_records(whole, resumed, after=2)[0].difference
    assert told == "2 rows and 1; the first one too many is of step 4"


def test_a_difference_is_a_verdict_with_the_first_one_named(copies, capsys):
    whole, resumed = copies
    rows = [json.loads(line) for line in (resumed / "metrics.jsonl").read_text().splitlines()]
    rows[2]["grad_norm"] += 1.0
    rows[3]["reward"] = 7.0
    (resumed / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (resumed.parent / "resumed.rank0.log").write_text("resuming after step 2\n")
    table = io.StringIO()
    console = Console(file=table, width=200)
    assert judge(Config(device="cpu"), whole, resumed, 4, 1, console)  # exit status 1
    told = capsys.readouterr().err
    assert "resume NOT verified. First difference" in told
    assert "metrics.jsonl, steps above 2: step 3, grad_norm: " in told
    assert "reward: 7" not in told
    assert table.getvalue().count("DIFFERS") == 1
    (resumed.parent / "resumed.rank0.log").write_text("training from the start\n")
    with pytest.raises(TrainingStopped, match="did not go on from its checkpoint of step 2"):
        judge(Config(device="cpu"), whole, resumed, 4, 1, console)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled", "ignore:Detected an existing checkpoint")
@pytest.mark.parametrize("prefix", ["model.", "optimizer.state.", "torch_rng_0", "numpy_rng_0"])
def test_one_changed_bit_in_a_checkpoint_is_named(copies, prefix):
    one, other = (run / "checkpoints" / "step_000004" for run in copies)
    assert differences(compare_checkpoints(one, other)) == {}
    stored = FileSystemReader(other).read_metadata().state_dict_metadata
    tensors: dict[str, Any] = {
        n: torch.empty(m.size, dtype=m.properties.dtype) if isinstance(m, TensorStorageMetadata) else 0
        for n, m in stored.items()
    }
    state_dict_loader.load(tensors, checkpoint_id=other, no_dist=True)
    name = next(n for n, value in tensors.items() if n.startswith(prefix) and getattr(value, "numel", int)() > 1)
    tensors[name].view(torch.uint8).flatten()[0] ^= 1
    state_dict_saver.save(tensors, checkpoint_id=other, no_dist=True)
    (told,) = differences(compare_checkpoints(one, other)).values()
    assert told.startswith(f"{name}: 1 of ")


def test_sampled_runs_are_compared_by_their_means(tmp_path):
    generator = torch.Generator().manual_seed(0)

    def write(name, shift, lr=0.1):
        (tmp_path / name).mkdir()
        entropy = (2.0 + shift + 0.1 * torch.randn(20, generator=generator)).tolist()
        rows = [{"step": step + 1, "lr": lr, "entropy": value} for step, value in enumerate(entropy)]
        (tmp_path / name / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    write("one", 0.0)
    write("alike", 0.02)
    write("apart", 0.3)
    write("other_lr", 0.0, lr=0.2)
    found = {
        name: differences(compare_statistically(tmp_path / "one", tmp_path / name, after=4, exact=("lr",)))
        for name in ("alike", "apart", "other_lr")
    }
    assert found["alike"] == {}
    assert list(found["apart"]) == ["means of metrics over steps above 4"]
    assert found["apart"]["means of metrics over steps above 4"].startswith("entropy: mean ")
    assert found["other_lr"] == {"lr": "step 5, lr: 0.1 and 0.2"}


ENGINES = {
    "hf": {},
    "vllm": {"name": "vllm"},
    "unseeded": {"name": "vllm", "seeded": False},
    "server": {"name": "vllm_server"},
}


def test_what_can_be_exact_is_said_with_its_reason():
    said = {
        (name, device): exactness(Config(engine=EngineConfig(**options)), torch.device(device))
        for name, options in ENGINES.items()
        for device in ("cpu", "cuda")
    }
    assert {where for where, (exact, _) in said.items() if exact} == {("hf", "cpu"), ("vllm", "cpu")}
    assert all(why.startswith("exact" if exact else "statistical: ") for exact, why in said.values())
    assert said["vllm", "cpu"][1].startswith("exact to the token")
    assert "on cuda vLLM's kernels round by the size of the batch" in said["vllm", "cuda"][1]
    assert "unless torch.use_deterministic_algorithms is on" in said["hf", "cuda"][1]
    for device in ("cpu", "cuda"):
        assert "engine.seeded is off" in said["unseeded", device][1]
        assert "batches, that time decides" in said["server", device][1]


def stand_in(tmp_path, monkeypatch, body):
    """A run that does as told instead of training; what is said of it, and after how long."""
    (tmp_path / "script.py").write_text(f"import sys, time\n{body}\n")
    monkeypatch.setattr(verify_resume, "_SCRIPT", tmp_path / "script.py")
    begun, told = time.monotonic(), ""
    try:
        verify_resume._train(Ranks(), tmp_path / "run", [], patience_s=1.5)
    except TrainingStopped as stopped:
        told = str(stopped)
    return told, time.monotonic() - begun


def test_a_run_that_hangs_ends_and_one_that_is_slow_does_not(tmp_path, monkeypatch):
    told, seconds = stand_in(tmp_path, monkeypatch, "print('step 1', flush=True)\ntime.sleep(60)")
    assert "rank 0 of the verification waited 1.5 s for its training process" in told
    assert told.endswith("the end of its output:\nstep 1")
    assert 1.5 < seconds < 30
    slow = "for step in range(8):\n    print(step, flush=True)\n    time.sleep(0.25)"
    told, seconds = stand_in(tmp_path, monkeypatch, slow)
    assert told == ""
    assert seconds > 2.0
    told, _ = stand_in(tmp_path, monkeypatch, "sys.exit('no')")
    assert "the training process of rank 0 of the verification ended with status 1" in told


def test_the_option_and_its_number():
    assert asked_for(["--config=a.yaml", "--verify-resume=4"])
    assert not asked_for(["--config=a.yaml"])
    assert parse(["--verify-resume", "--seed=1"]) == (8, ["--seed=1"])
    assert parse(["--seed=1", "--verify-resume=6"]) == (6, ["--seed=1"])
    with pytest.raises(ValueError, match=r"--verify-resume=3: expected an even number"):
        parse(["--verify-resume=3"])
