"""The scripts that measure the head run at their smallest size, and their numbers are right."""

import json
import subprocess
import sys
from pathlib import Path

import compare_head_cpu
import pytest
import torch
from compare_head_cpu import NAMES, contenders
from suite_cases import Shape
from suite_machine import commit

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
    assert found["repeatability"].get("recompute") is True, run.stderr


@pytest.mark.slow
def test_the_comparison_checks_every_contender_and_takes_turns(tmp_path):
    out = tmp_path / "head.json"
    run = _run("compare_head_cpu.py", "--T", 80, "--H", 64, "--V", 3000, "--repeats", 3, "--out", out)
    assert run.returncode == 0, run.stderr
    report = json.loads(out.read_text())
    assert report["machine"]["commit"] == commit()
    found = {name: one for name, one in report["results"].items() if "seconds" in one}
    others = {name: one["skipped"] for name, one in report["results"].items() if "seconds" not in one}
    assert others in ({}, {"verl_torch": "verl is not installed"})
    assert set(found) | set(others) == set(NAMES)
    for name, one in found.items():
        assert len(one["seconds"]) == 3
        assert one["settings"] == contenders()[name].settings
        errors = one["errors"]
        assert set(errors) == {
            "logprob_mean", "logprob_max", "entropy_mean", "entropy_max", "hidden_grad", "weight_grad",
        }  # fmt: skip
        exact = name.startswith("entrocraft") or name == "eager_fp32"
        assert 0 < errors["logprob_mean"] <= errors["logprob_max"] < (1e-4 if exact else 0.5)
        assert (errors["entropy_mean"] < 1e-5) == exact
        assert 1e-4 < errors["weight_grad"] < (5e-3 if exact else 5e-2)
    turns = [line.split()[-2] for line in run.stderr.splitlines() if line.startswith("round ")]
    assert turns[: len(found)] == list(found)
    assert turns[len(found)] == list(found)[1]
    assert "log p error" in run.stdout


@pytest.mark.slow
def test_a_contender_that_is_wrong_or_dies_is_told_and_not_quoted(monkeypatch):
    monkeypatch.setattr(compare_head_cpu, "NAMES", ("entrocraft", "eager_bf16"))
    monkeypatch.setattr(compare_head_cpu, "bounds", lambda rival: {"logprob_mean": 1e-4})
    shape = Shape(16, 32, 500)
    found = compare_head_cpu.compare(shape, 1)
    assert found["entrocraft"]["seconds"]
    assert "eager_bf16 is wrong and is not timed: logprob_mean 0.0" in found["eager_bf16"]["skipped"]
    assert "seconds" not in found["eager_bf16"]
    monkeypatch.setattr(compare_head_cpu, "NAMES", ("entrocraft",))
    monkeypatch.setattr(compare_head_cpu.torch, "save", lambda value, path: path.write_bytes(b"nothing"))
    died = compare_head_cpu.compare(shape, 1)["entrocraft"]
    assert set(died) == {"skipped"}
    assert died["skipped"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_an_error_with_a_way_out(tmp_path):
    run = _run("measure_head.py", "--out", tmp_path, "--device", "cuda")
    assert run.returncode == 2
    assert "--device cpu --shapes tiny" in run.stderr


def test_random_configurations_agree_with_fp64():
    run = _run("stress_head.py", "--count", 12, "--seed", 5000)
    assert run.returncode == 0, run.stdout
    assert "12 configurations, 0 failed" in run.stdout
