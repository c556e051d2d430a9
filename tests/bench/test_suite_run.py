"""`pytest bench/...` as a user runs it, at its smallest: what stands in the JSON, and that no rival is left out."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from rivals import all_rivals
from suite_cases import JOBS, Shape

BENCH = Path(__file__).parents[2] / "bench"


def run_bench(file: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-P", "-m", "pytest", BENCH / file, "-q", "-rs", "--tb=short", *arguments]
    environ = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=280, env=environ)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """One group of benchmarks: name of the rival -> its entry."""
    out = tmp_path_factory.mktemp("bench") / "head.json"
    small = ("--heads", "tiny", "--tokens", 96, "--vocab", 2000, "--device", "cpu", "--bench-rounds", 3)
    run = run_bench("bench_linear_logprob.py", *small, "--jobs", "both", "--data", "peaked", f"--benchmark-json={out}")
    assert run.returncode == 0, run.stdout + run.stderr
    for name in ("entrocraft", "entrocraft_cache", "eager", "torch_compile", "trl", "liger_scaled"):
        assert f"SKIPPED [1] {name}" not in run.stdout
    report = json.loads(out.read_text())
    skipped = {one["rival"]: one for one in report["skipped"]}
    return (
        {one["extra_info"]["rival"]: one for one in report["benchmarks"]},
        report["machine_info"]["entrocraft"],
        skipped,
    )


def test_all_contenders_of_a_job_are_in_one_group(saved):
    entries, machine, _ = saved
    assert set(entries) == {
        "entrocraft", "entrocraft_cache", "entrocraft_policy_loss", "eager_fp32", "eager_bf16", "torch_compile",
        "trl_chunked", "liger_scaled_ce",
    }  # fmt: skip
    assert {one["group"] for one in entries.values()} == {"tiny T=96 V=2000 both peaked"}
    assert all(one["stats"]["rounds"] == 3 for one in entries.values())
    assert machine["versions"]["trl"] == "1.16.0"
    assert {"device", "commit", "threads"} <= set(machine)


def test_everybody_else_was_skipped_with_a_reason(saved):
    entries, _, skipped = saved
    assert not set(entries) & set(skipped)
    does = {rival.name: rival for rival in all_rivals() if rival.does("both", JOBS["both"])}
    assert set(entries) | set(skipped) == set(does)
    for name, one in skipped.items():
        reason = does[name].why_not(Shape(96, 32, 2000), "cpu")
        assert one == {"rival": name, "group": None, "reason": reason}


def test_errors_are_recorded_and_ours_are_the_smallest(saved):
    errors = {name: one["extra_info"]["errors"] for name, one in saved[0].items()}
    for name in ("entrocraft", "entrocraft_cache", "entrocraft_policy_loss"):
        assert 0 < errors[name]["logprob_mean"] < 5e-6 < errors["eager_bf16"]["logprob_mean"]
        assert 0 < errors[name]["entropy_mean"] < 5e-6 < errors["trl_chunked"]["entropy_mean"]
        for gradient in ("hidden_grad", "weight_grad"):
            assert 1e-4 < errors[name][gradient] < 5e-3
            assert errors[name][gradient] < errors["liger_scaled_ce"][gradient]


def test_rates_follow_from_the_median_and_memory_from_the_calls(saved):
    product = 2 * 96 * 32 * 2000
    for name, one in saved[0].items():
        info, median = one["extra_info"], one["stats"]["median"]
        assert info["useful_tflops"] == pytest.approx(3e-12 * product / median)
        executed = 4 if name in ("entrocraft", "trl_chunked", "liger_scaled_ce") else 3
        assert info["executed_tflops"] == pytest.approx(1e-12 * executed * product / median)
        assert info["share_of_gemm"] == pytest.approx(info["executed_tflops"] / info["gemm_tflops"])
        assert info["gbs"] == pytest.approx(1e-9 * 2 * 2 * 32 * (96 + 2000) / median)
        assert info["floor_ms"] < 1e3 * median
        assert info["cold_ms"] > 0
        assert info["repeats"] is True
        assert info["settings"]
        assert info["version"]
    # Four [T, V] tensors of fp32 at least, of which eager keeps what its backward wants.
    assert saved[0]["eager_fp32"]["extra_info"]["peak_bytes"] > 3 * 4 * 96 * 2000


def test_a_rival_that_should_run_and_does_not_fails(tmp_path):
    """The extra's packages hidden: a failure, not a skip."""
    blocked = tmp_path / "sitecustomize.py"
    blocked.write_text(
        "import importlib.util as u\nfind = u.find_spec\n"
        "u.find_spec = lambda name, package=None: None if name == 'trl' else find(name, package)\n"
    )
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(tmp_path), *([before] if before else [])])
    try:
        few = ("--heads", "tiny", "--tokens", 16, "--jobs", "logprob", "--rivals", "trl_chunked", "--device", "cpu")
        run = run_bench("bench_linear_logprob.py", *few, "--benchmark-disable")
    finally:
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before
    assert run.returncode == 1
    assert "trl_chunked: trl is not installed" in run.stdout


@pytest.mark.slow
def test_the_other_benchmarks_run_and_nobody_is_left_out(tmp_path):
    out = tmp_path / "made" / "rest.json"
    files = [BENCH / f"bench_{name}.py" for name in ("logits_logprob", "policy_loss", "scoring", "rejection")]
    small = ("--heads", "tiny", "--tokens", 200, "--device", "cpu", "--bench-rounds", 2)  # a ragged T
    run = run_bench("bench_train_step.py", *files, *small, f"--benchmark-json={out}")
    assert run.returncode == 0, run.stdout + run.stderr
    report = json.loads(out.read_text())
    assert {one["rival"] for one in report["skipped"]} <= {"flash_attn_ce"}  # what wants a GPU
    found = {
        (one["group"].replace(" tiny T=200 V=512", ""), one["extra_info"]["rival"]): one for one in report["benchmarks"]
    }
    rivals = {
        "logits both": {"entrocraft", "eager", "torch_compile", "trl"},
        "logits logprob": {"entrocraft", "eager", "trl"},
        "policy loss": {"entrocraft_policy_loss", "entrocraft_two_steps", "eager_fp32", "eager_bf16", "trl_chunked",
                        "liger_chunked_grpo"},
        "scoring": {"entrocraft", "eager", "trl_rows", "trl_chunked"},
        "train step": {"entrocraft", "trl"},
        "decision R=512 L=256": {"none", "hard", "soft", "first_order", "budget"},
    }  # fmt: skip
    for group, names in rivals.items():
        assert {rival for name, rival in found if name == group} == names
    rates = {"useful_tflops", "executed_tflops", "share_of_gemm", "gbs", "floor_ms", "gemm_tflops"}
    has = {"policy loss": rates, "scoring": rates, "logits both": {"gbs", "floor_ms"}}
    has["train step"] = {"useful_tflops", "floor_ms"}
    for (group, _), one in found.items():
        info = one["extra_info"]
        assert has.get(group, set()) <= set(info), group
        assert all(info[name] > 0 for name in has.get(group, set())), group
    for (group, rival), one in found.items():
        assert one["stats"]["rounds"] == 2, (group, rival)
        assert all(0 <= error < 1 for error in one["extra_info"]["errors"].values()), (group, rival)
    scores = [
        found["scoring", name]["extra_info"]["errors"]["logprob_mean"] for name in ("entrocraft", "eager", "trl_rows")
    ]
    assert scores[0] < 1e-5 < scores[1] < scores[2]
    assert found["policy loss", "entrocraft_policy_loss"]["extra_info"]["errors"]["weight_grad"] < 5e-3
    assert found["policy loss", "eager_bf16"]["extra_info"]["errors"]["weight_grad"] > 5e-3
