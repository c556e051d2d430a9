"""gpu_suite.sh as it runs on a GPU, at its smallest, in Triton's interpreter; what it does when time or a GPU lacks."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import suite_gpu
import torch
from head_cases import SHAPES
from measure_head import SECTIONS
from rivals import all_rivals
from suite_cases import DATA, HEADS, JOBS
from suite_gpu import Stage, long, quick, run_stage, smoke, write_report

BENCH = Path(__file__).parents[2] / "bench"


def suite(out: object, *arguments: str) -> subprocess.CompletedProcess[str]:
    environ = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environ |= {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    command = ["bash", str(BENCH / "gpu_suite.sh"), str(out), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=280, env=environ)


@pytest.mark.slow
def test_the_smallest_rows_run_interpreted_and_our_kernels_are_right(tmp_path):
    run = suite(tmp_path, "--smoke", "--only", "both", "profile")
    assert run.returncode == 0, run.stdout + run.stderr
    assert "both: done" in run.stdout
    assert json.loads((tmp_path / "environment.json").read_text())["interpreted"] is True
    found = json.loads((tmp_path / "both.json").read_text())["benchmarks"]
    rivals = {(one["extra_info"]["rival"], one["extra_info"]["job"]): one["extra_info"] for one in found}
    assert set(rivals) == {(name, job) for name in ("entrocraft", "eager_fp32") for job in ("both", "statistics")}
    errors = rivals["entrocraft", "both"]["errors"]
    assert max(errors["logprob_mean"], errors["entropy_mean"]) < 3e-6
    assert 0 < max(errors["hidden_grad"], errors["weight_grad"]) < 1e-5
    # Interpreted kernels take hundreds of milliseconds where torch takes one: it is they that ran.
    seconds = {one["extra_info"]["rival"]: one["stats"]["median"] for one in found}
    assert seconds["entrocraft"] > 10 * seconds["eager_fp32"]
    report = (tmp_path / "report.md").read_text()
    assert "| both | done |" in report
    assert "| entrocraft |" in report
    assert "policy_loss" in json.loads((tmp_path / "profile.json").read_text())["modes"]


def test_without_a_folder_it_says_how_and_without_a_gpu_what_else(tmp_path):
    told = subprocess.run(["bash", str(BENCH / "gpu_suite.sh")], capture_output=True, text=True)
    assert told.returncode == 2
    assert "bash bench/gpu_suite.sh OUT --smoke" in told.stderr
    if not torch.cuda.is_available():
        told = suite(tmp_path)
        assert told.returncode == 2
        assert "--smoke" in told.stderr


def test_a_stage_that_takes_too_long_is_cut_off_and_the_report_goes_on(tmp_path, monkeypatch):
    (tmp_path / "sleeps.py").write_text("import time; print('begun', flush=True); time.sleep(60)")
    (tmp_path / "fails.py").write_text("raise SystemExit(3)")
    monkeypatch.setattr(suite_gpu, "BENCH", tmp_path)
    started = time.monotonic()
    done = [run_stage(Stage(name, f"{name}.py", ()), tmp_path, 2.0) for name in ("sleeps", "fails")]
    assert time.monotonic() - started < 20
    assert [one["result"] for one in done] == ["cut off after 2 s", "failed, exit status 3: fails.log"]
    write_report(tmp_path, {"device": "none", "commit": "abc"}, done)
    report = (tmp_path / "report.md").read_text()
    assert "begun" in report
    assert "| fails | failed, exit status 3: fails.log |" in report
    assert json.loads((tmp_path / "stages.json").read_text()) == done


@pytest.mark.slow
def test_a_stage_of_benchmarks_that_is_cut_off_leaves_what_it_had(tmp_path, monkeypatch):
    (tmp_path / "bench_two.py").write_text(
        "import time\n"
        "def test_quick(benchmark):\n    benchmark.pedantic(int, rounds=2)\n"
        "def test_endless(benchmark):\n    time.sleep(60)\n"
    )
    monkeypatch.setattr(suite_gpu, "BENCH", tmp_path)
    done = run_stage(Stage("two", "bench_two.py", ()), tmp_path, 12.0)
    assert done["result"] == "cut off after 12 s"
    assert done["seconds"] < 25
    found = json.loads((tmp_path / "two.json").read_text())["benchmarks"]
    assert [one["name"] for one in found] == ["test_quick"]


@pytest.mark.slow
def test_every_script_takes_its_stage_s_arguments(tmp_path):
    """pytest collects, the others print their help."""
    scripts = {stage.script: stage for stage in long()}
    for stage in scripts.values():
        assert (BENCH / stage.script).is_file()
        instead = "--collect-only" if stage.script.startswith("bench_") else "--help"
        run = subprocess.run([*stage.command(tmp_path), instead], capture_output=True, text=True, timeout=120)
        assert run.returncode == 0, run.stdout + run.stderr


@pytest.mark.parametrize("stages", [quick, long, smoke], ids=lambda made: made.__name__)
def test_every_stage_names_heads_jobs_and_rivals_that_exist(stages):
    known = {"--heads": set(HEADS), "--head": set(HEADS), "--shapes": set(SHAPES), "--jobs": set(JOBS)}
    known |= {"--data": set(DATA), "--rivals": {rival.name for rival in all_rivals()}, "--sections": set(SECTIONS)}
    made = stages()
    assert len({stage.name for stage in made}) == len(made)
    for stage in made:
        option = ""
        for word in stage.arguments:
            option = word if word.startswith("--") else option
            assert word == option or option not in known or word in known[option], (stage.name, word)


def test_the_quick_suite_begins_with_what_tells_most_and_has_every_head_in_the_long_one():
    assert [stage.name for stage in quick()][:3] == ["correctness", "both", "statistics"]
    text = " ".join(" ".join(stage.arguments) for stage in long())
    for word in ("qwen3_8b", "gemma3_4b", "llama3_70b", "16385", "131072", "random", "--largest"):
        assert word in text
