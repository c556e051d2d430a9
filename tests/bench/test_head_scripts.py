"""The scripts that measure the head run at their smallest size, and their numbers are right."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

BENCH = Path(__file__).parents[2] / "bench"


def _run(script: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, BENCH / script, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def test_every_section_of_the_measurement_runs(tmp_path):
    run = _run("measure_head.py", "--out", tmp_path, "--device", "cpu", "--shapes", "tiny", "--rounds", 2)
    assert run.returncode == 0, run.stderr
    report = json.loads((tmp_path / "measure_head.json").read_text())
    found = report["shapes"]["tiny"]
    assert list(found) == [
        "correctness",
        "speed",
        "zero_rows",
        "memory",
        "repeatability",
        "tiles",
        "sanitizer",
        "profile",
    ]
    for mode in ("statistics", "recompute", "cache", "policy_loss", "frozen", "frozen_entropy"):
        errors = found["correctness"][mode]
        assert 0 < errors["logprob_mean"] < 5e-6 < found["correctness"]["eager_bf16"]["logprob_mean"]
        assert found["speed"]["ms"][mode] > 0
        assert found["repeatability"][mode]
        if mode != "statistics":
            assert 0.5 < errors["hidden_grad_stores"] < 1.6
        if mode in ("recompute", "cache", "policy_loss"):
            assert 0.5 < errors["weight_grad_stores"] < 1.6
    assert 0 < found["correctness"]["library_fp32"]["entropy_mean"] < 5e-6
    assert found["zero_rows"]["share"] > 0  # a time: what it should be is for a machine with nothing else to do
    assert "recompute" in (tmp_path / "measure_head.md").read_text()


def test_a_section_that_fails_is_named_and_the_others_go_on(tmp_path):
    script = "import sys, measure_head as m; m.SECTIONS['memory'] = lambda bench: 1 / 0; sys.exit(m.main(sys.argv[1:]))"
    arguments = ["--out", tmp_path, "--device", "cpu", "--shapes", "tiny", "--sections", "memory", "repeatability"]
    command = [sys.executable, "-c", script, *map(str, arguments)]
    run = subprocess.run(command, capture_output=True, text=True, cwd=BENCH, timeout=300)
    assert run.returncode == 1
    assert "FAILED: tiny: memory" in run.stderr
    found = json.loads((tmp_path / "measure_head.json").read_text())["shapes"]["tiny"]
    assert "ZeroDivisionError" in found["memory"]["error"]
    assert found["repeatability"]["recompute"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_an_error_with_a_way_out(tmp_path):
    run = _run("measure_head.py", "--out", tmp_path, "--device", "cuda")
    assert run.returncode == 2
    assert "--device cpu --shapes tiny" in run.stderr


def test_random_configurations_agree_with_fp64():
    run = _run("stress_head.py", "--count", 12, "--seed", 5000)
    assert run.returncode == 0, run.stdout
    assert "12 configurations, 0 failed" in run.stdout
