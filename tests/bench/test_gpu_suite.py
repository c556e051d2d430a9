"""gpu_suite.sh as it runs on a GPU, at its smallest, in Triton's interpreter; what it does when time or a GPU lacks."""

import importlib.metadata
import json
import os
import subprocess
import sys
import time
import venv
from collections.abc import Iterable
from pathlib import Path

import pytest
import suite_gpu
import torch
from head_cases import SHAPES
from measure_head import SECTIONS
from packaging.requirements import Requirement
from suite_cases import DATA, HEADS, JOBS
from suite_choice import known_contenders
from suite_gpu import Stage, long, quick, run_all, run_stage, smoke, write_report

BENCH = Path(__file__).parents[2] / "bench"


FILES = ("linear_logprob", "policy_loss", "logits_logprob", "scoring", "train_step", "rejection")
NEEDED = ("torch", "triton", "numpy", "pytest", "pytest-benchmark")


def suite(out: object, *arguments: str, python: object = sys.executable) -> subprocess.CompletedProcess[str]:
    environ = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environ |= {"PYTHON": str(python), "OMP_NUM_THREADS": "1"}
    command = ["bash", str(BENCH / "gpu_suite.sh"), str(out), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=280, env=environ)


def distributions(names: Iterable[str]) -> dict[str, importlib.metadata.Distribution]:
    """These and all that they require here."""
    found, left = {}, list(names)
    while left:
        name = left.pop().lower()
        if name not in found:
            found[name] = importlib.metadata.distribution(name)
            wanted = [Requirement(text) for text in found[name].requires or ()]
            left += [one.name for one in wanted if one.marker is None or one.marker.evaluate({"extra": ""})]
    return found


@pytest.fixture(scope="module")
def bare(tmp_path_factory):
    """An interpreter whose environment has what the suite needs, linked from this one, and nothing else."""
    folder = tmp_path_factory.mktemp("bare")
    venv.create(folder, with_pip=False, symlinks=True)
    (site,) = folder.glob("lib/python*/site-packages")
    for one in distributions(NEEDED).values():
        for top in {path.parts[0] for path in one.files or () if path.parts[0] not in ("..", "__pycache__")}:
            if not (site / top).exists():
                (site / top).symlink_to(Path(str(one.locate_file(top))).resolve())
    absent = subprocess.run([folder / "bin/python", "-c", "import transformers"], capture_output=True, text=True)
    assert "No module named 'transformers'" in absent.stderr
    return folder / "bin" / "python"


@pytest.mark.slow
def test_the_smallest_rows_run_interpreted_with_the_packages_it_names_and_our_kernels_are_right(tmp_path, bare):
    run = suite(tmp_path, "--smoke", python=bare)
    assert run.returncode == 0, run.stdout + run.stderr
    assert [line.split(" (")[0] for line in run.stdout.splitlines()] == [f"{stage.name}: done" for stage in smoke()]
    environment = json.loads((tmp_path / "environment.json").read_text())
    assert environment["interpreted"] is True
    assert not {"transformers", "trl", "liger_kernel"} & set(environment["versions"])
    found = json.loads((tmp_path / "both.json").read_text())["benchmarks"]
    rivals = {(one["extra_info"]["rival"], one["extra_info"]["job"]): one["extra_info"] for one in found}
    assert set(rivals) == {(name, job) for name in ("entrocraft", "eager_fp32") for job in ("both", "statistics")}
    errors = rivals["entrocraft", "both"]["errors"]
    assert max(errors["logprob_mean"], errors["entropy_mean"]) < 3e-6
    assert 0 < max(errors["hidden_grad"], errors["weight_grad"]) < 1e-5
    # Interpreted kernels take hundreds of milliseconds where torch takes one: it is they that ran.
    seconds = {one["extra_info"]["rival"]: one["stats"]["median"] for one in found}
    assert seconds["entrocraft"] > 10 * seconds["eager_fp32"]
    losses = json.loads((tmp_path / "policy_loss.json").read_text())["benchmarks"]
    assert {one["extra_info"]["rival"] for one in losses} == {
        "entrocraft_policy_loss", "entrocraft_two_steps", "eager_fp32",
    }  # fmt: skip
    measured = json.loads((tmp_path / "correctness" / "measure_head.json").read_text())["shapes"]["least"]
    for mode in ("recompute", "cache", "policy_loss"):
        assert 0 < measured["correctness"][mode]["weight_grad"] < 1e-5
        assert measured["repeatability"][mode]
    report = (tmp_path / "report.md").read_text()
    assert "| both | done |" in report
    assert "| entrocraft |" in report
    assert "policy_loss" in json.loads((tmp_path / "profile.json").read_text())["modes"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--only", "both", "nosuch"), "--only nosuch: no such stage; there are correctness, both, policy_loss"),
        (("--minutes", "0"), "--minutes 0: expected more than 0, or leave it out"),
        (("--minutes", "nan"), "--minutes nan: expected more than 0"),
    ],
)
def test_a_stage_or_a_time_that_makes_no_sense_is_refused(options, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        suite_gpu.main(["--out", str(tmp_path / "out"), "--smoke", *options])
    assert ended.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_stages_without_time_stand_in_the_report_as_not_begun(tmp_path, monkeypatch, capsys):
    (tmp_path / "writes.py").write_text("import pathlib; pathlib.Path('seen.md').write_text(open('report.md').read())")
    monkeypatch.setattr(suite_gpu, "BENCH", tmp_path)
    monkeypatch.setattr(suite_gpu, "LEAST_S", 12.0)
    monkeypatch.chdir(tmp_path)
    stages = [Stage("writes", "writes.py", (), 30.0), Stage("later", "bench_later.py", ())]
    clock = iter([0.0, 0.0, 1.0, 2.0, 120.0, 130.0])  # begins; first stage, its start and end; second
    monkeypatch.setattr(suite_gpu.time, "monotonic", lambda: next(clock, 130.0))
    assert run_all(stages, tmp_path, 2.0, smoke=True) == 0
    found = {one["stage"]: one["result"] for one in json.loads((tmp_path / "stages.json").read_text())}
    assert found == {"writes": "done", "later": "not begun: no time left of 2 minutes"}
    assert "| later | not begun: no time left of 2 minutes | 0.0 |" in (tmp_path / "report.md").read_text()
    before = (tmp_path / "seen.md").read_text()  # what a suite that is killed in its first stage leaves
    assert "| writes | begun, and not ended |" in before
    assert "| later | not begun | 0.0 |" in before
    assert "later: not begun" in capsys.readouterr().out


def test_a_suite_without_time_for_any_stage_fails_and_has_a_report(tmp_path):
    run = suite(tmp_path, "--smoke", "--minutes", "0.1", "--only", "both", "profile")
    assert run.returncode == 1
    assert "| profile | not begun: no time left of 0.1 minutes |" in (tmp_path / "report.md").read_text()


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
        "def test_endless(benchmark):\n    time.sleep(180)\n"
    )
    monkeypatch.setattr(suite_gpu, "BENCH", tmp_path)
    monkeypatch.setattr(suite_gpu, "LAST_WORDS_S", 50.0)  # of what is written here, not how soon on a busy machine
    done = run_stage(Stage("two", "bench_two.py", ()), tmp_path, 60.0)  # pytest has begun by then
    assert done["result"] == "cut off after 60 s"
    assert done["seconds"] < 120
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
    known |= {"--data": set(DATA), "--rivals": set(known_contenders()), "--sections": set(SECTIONS)}
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
    assert {f"bench_{name}.py" for name in FILES} == {one.script for one in long() if one.script.startswith("bench_")}
    for kind in ("policy_loss", "logits_logprob", "scoring"):
        stages = [one.arguments for one in long() if one.name.startswith(f"{kind}_")]
        assert {word for arguments in stages for word in arguments} >= {*HEADS} - {"tiny", "small", "cpu"} | {"32768"}
    for word in ("qwen3_8b", "gemma3_4b", "llama3_70b", "16385", "131072", "random", "--largest"):
        assert word in text
