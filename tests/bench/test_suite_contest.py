"""A group of contenders loses nobody but the one who fails, and a process that is killed leaves what it had."""

import argparse
import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from bench_rejection import RULES
from suite_choice import positive
from suite_contest import NO_ROOM, Contender, Measured, compete, room_for
from suite_gpu import Stage, run_stage, write_report
from suite_journal import Journal, recover

from entrocraft.train.bench_file import load_results

BENCH = Path(__file__).parents[2] / "bench"


def field(**calls):
    return {name: Contender(call, "as it is", lambda made: {"off": 0.0}, {"off": 0.1}) for name, call in calls.items()}


def raising(error, after=0):
    """A call that raises from its `after`-th repetition on."""
    seen = []

    def call():
        seen.append(0)
        if len(seen) > after:
            raise error
        return torch.tensor(2.0)

    return call


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (AssertionError(), "rival failed: AssertionError"),
        (RuntimeError("\nptxas fatal: no room\nmore"), "rival failed: RuntimeError: ptxas fatal: no room"),
        (
            RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling"),
            "rival does not fit into this machine's memory: RuntimeError: CUDA error: CUBLAS_STATUS_ALLOC_FAILED when "
            "calling",
        ),
        (
            ValueError("BackendCompilerFailed: CUDA out of memory."),
            "rival does not fit into this machine's memory: ValueError: BackendCompilerFailed: CUDA out of memory.",
        ),
    ],
)
@pytest.mark.parametrize("after", [0, 2, 4], ids=["checked", "weighed", "timed"])
def test_whatever_a_rival_raises_and_whenever_the_others_are_measured(error, reason, after):
    found = compete(field(entrocraft=lambda: torch.tensor(1.0), rival=raising(error, after)), "cpu", 3)
    assert found["rival"] == reason
    assert isinstance(found["entrocraft"], Measured)
    assert len(found["entrocraft"].seconds) == 3


def test_what_ours_raise_is_raised():
    for name in ("entrocraft", "entrocraft_policy_loss"):
        with pytest.raises(ValueError, match="a fault"):
            compete(field(**{name: raising(ValueError("a fault"))}), "cpu", 1)
    with pytest.raises(ValueError, match="a fault"):  # rules of rejection have no rival
        compete(field(hard=raising(ValueError("a fault"))), "cpu", 1, ours=RULES)


def test_a_group_whose_operands_do_not_fit_is_skipped_and_not_tried_again():
    tried = []

    def measured():
        with room_for("a group of this test"):
            tried.append(0)
            raise torch.OutOfMemoryError("tried to allocate 80 GiB\nmore")

    for _ in range(2):
        with pytest.raises(pytest.skip.Exception, match=r"do not fit: OutOfMemoryError: tried to allocate 80 GiB$"):
            measured()
    assert len(tried) == 1
    del NO_ROOM["a group of this test"]


# One contender of a real group ends the process at its n-th call.
KILLER = """
import dataclasses, os, signal

def pytest_collection_modifyitems(items):
    module = items[0].module
    every, calls = module.all_rivals(), []

    def killed(operands, job, call=next(rival.call for rival in every if rival.name == "eager_bf16")):
        calls.append(0)
        if len(calls) == {call}:
            os.kill(os.getpid(), signal.SIGKILL)
        return call(operands, job)

    changed = [dataclasses.replace(rival, call=killed) if rival.name == "eager_bf16" else rival for rival in every]
    module.all_rivals = lambda: changed
"""
SMALL = [
    "--device",
    "cpu",
    "--heads",
    "tiny",
    "--tokens",
    "16",
    "--jobs",
    "logprob",
    "--data",
    "peaked",
    "--bench-rounds",
    "3",
]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("call", "rounds"),
    [(1, {"entrocraft": 1, "eager_fp32": 1}), (5, {"entrocraft": 1, "eager_fp32": 1, "eager_bf16": 1})],
    ids=["checked", "timed"],
)
def test_a_stage_that_is_killed_inside_a_group_leaves_the_rows_so_far(call, rounds, tmp_path, monkeypatch):
    (tmp_path / "killer.py").write_text(KILLER.replace("{call}", str(call)))
    paths = [str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(paths))
    monkeypatch.setenv("PYTEST_PLUGINS", "killer")
    stage = Stage("both", "bench_linear_logprob.py", (*SMALL, "--rivals", "entrocraft", "eager_fp32", "eager_bf16"))
    done = run_stage(stage, tmp_path, 200.0)
    assert done["result"] == "failed, exit status -9: both.log"
    saved = load_results(tmp_path / "both.json")
    found = {row.rival: row for row in saved.rows}
    report = json.loads((tmp_path / "both.json").read_text())["benchmarks"]
    assert {one["extra_info"]["rival"]: one["stats"]["rounds"] for one in report} == rounds
    assert {row.group for row in saved.rows} == {"tiny T16 V512 logprob peaked (cut off)"}
    assert 0 < found["entrocraft"].info["errors"]["logprob_mean"] < 1e-5
    assert found["entrocraft"].info["T"] == 16
    assert found["entrocraft"].seconds > 0
    assert saved.machine["versions"]["torch"] == importlib.metadata.version("torch")
    write_report(tmp_path, {"device": "none", "commit": "abc"}, [done])
    assert "| entrocraft |" in (tmp_path / "report.md").read_text()


def test_a_report_takes_from_the_journal_what_it_lacks(tmp_path):
    target, journal = tmp_path / "head.json", Journal()
    journal.open(target, {"device": "d"})
    journal.begin("bench_x[small-T1-ours]", "ours", {"T": 1})
    for name, seconds in (("ours", 1.0), ("theirs", 2.0), ("last", 3.0)):
        journal.row(name, [seconds, seconds, 9.0], {})
    journal.refuse("last", "last failed")
    journal.write()
    target.write_text('{"machine_info": {}, "bench')  # half a report
    recover(target)
    assert len(json.loads(target.read_text())["benchmarks"]) == 2
    journal.write()
    target.write_text(json.dumps({"machine_info": {}, "benchmarks": [{"name": "bench_x[small-T1-ours]"}]}))
    recover(target)
    found = json.loads(target.read_text())["benchmarks"]
    assert [one["name"] for one in found] == ["bench_x[small-T1-ours]", "bench_x[small-T1-theirs]"]
    assert found[1]["stats"] == {"median": 2.0, "rounds": 3}
    assert found[1]["group"] == "small T1 (cut off)"
    assert [path.name for path in tmp_path.iterdir()] == ["head.json"]


def bench(*arguments, plugin: str | None = None, folder: Path | None = None):
    environ = dict(os.environ)
    if plugin is not None and folder is not None:
        (folder / "changes.py").write_text(plugin)
        environ |= {"PYTEST_PLUGINS": "changes"}
        environ["PYTHONPATH"] = os.pathsep.join([str(folder), *filter(None, [environ.get("PYTHONPATH")])])
    command = [sys.executable, "-P", "-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider", *arguments]
    return subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=200, env=environ)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--rivals", "entrocaft"), "--rivals entrocaft: no such contender; nearest: entrocraft; all: entrocraft, "),
        (("--vocab", "-1"), "argument --vocab: '-1' is no count: expected a whole number of at least 1"),
        (("--device", "cuda"), "--device cuda: torch sees no GPU here; leave it out, or use --device cpu"),
    ],
)
def test_an_option_that_makes_no_sense_is_refused_with_a_way_out(options, message):
    if "cuda" in options and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    run = bench(BENCH / "bench_linear_logprob.py", *options)
    assert run.returncode == 4
    assert message in " ".join(run.stderr.split())
    assert "Traceback" not in run.stderr


def test_counts_are_whole_and_at_least_one():
    assert positive("16385") == 16385
    for text in ("0", "-4", "1.5", "many", ""):
        with pytest.raises(argparse.ArgumentTypeError, match="expected a whole number of at least 1"):
            positive(text)
    conftest = (BENCH / "conftest.py").read_text()
    assert "type=int" not in conftest  # every option that is a number is a count


def test_rivals_choose_in_every_file_and_one_who_declines_a_job_says_why():
    files = [BENCH / f"bench_{name}.py" for name in ("linear_logprob", "policy_loss", "logits_logprob", "scoring")]
    files.append(BENCH / "bench_train_step.py")
    run = bench(*files, "--collect-only", "--rivals", "eager_fp32", "trl", "--jobs", "both", "--data", "peaked")
    names = [line.partition("::")[2] for line in run.stdout.splitlines() if "::" in line]
    assert names == [
        "bench_linear_logprob[small-T256-V8192-both-peaked-eager_fp32]",
        "bench_policy_loss[small-T256-V8192-eager_fp32]",
        "bench_logits_logprob[small-T256-V8192-both-trl]",
        "bench_logits_logprob[small-T256-V8192-logprob-trl]",
        "bench_scoring[nobody]",
        "bench_train_step[trl]",
    ]
    run = bench(BENCH / "bench_linear_logprob.py", BENCH / "bench_scoring.py", "--rivals", "cce", "--jobs", "both")
    assert run.returncode == 0
    assert "cce gives no entropy, gradient of the entropy" in run.stdout
    assert "--rivals cce: not among entrocraft, eager, trl_rows, trl_chunked" in run.stdout


TOO_LARGE = """
import torch

def pytest_collection_modifyitems(items):
    def large(*args, **kwargs):
        print("ALLOCATES")
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 80 GiB")
    items[0].module.make_operands = large
"""


@pytest.mark.slow
def test_operands_that_do_not_fit_are_a_skip_of_the_group(tmp_path):
    few = (*SMALL, "--rivals", "entrocraft", "eager_fp32", "-s")
    run = bench(BENCH / "bench_linear_logprob.py", *few, plugin=TOO_LARGE, folder=tmp_path)
    assert run.returncode == 0, run.stdout
    assert "the operands, or the truth to compare with, do not fit: OutOfMemoryError" in run.stdout
    assert "2 skipped" in run.stdout
    assert run.stdout.count("ALLOCATES") == 1


def test_a_torch_without_the_linear_cross_entropy_says_so_and_need_not_have_it():
    script = (
        "import torch\n"
        "if hasattr(torch.nn.functional, 'linear_cross_entropy'): del torch.nn.functional.linear_cross_entropy\n"
        "import rivals\nfrom suite_cases import Shape\n"
        "one = {rival.name: rival for rival in rivals.PLAIN}['torch_linear_cross_entropy']\n"
        "print(one.why_not(Shape(8, 64, 600), 'cpu'), one.name in rivals.ALWAYS, 'eager_fp32' in rivals.ALWAYS)\n"
    )
    run = subprocess.run([sys.executable, "-c", script], cwd=BENCH, capture_output=True, text=True, timeout=100)
    version = torch.__version__.partition("+")[0]
    assert run.stdout.strip() == f"torch {version} has no torch.nn.functional.linear_cross_entropy False True"


CARRIED = {  # a package laid out like verl, whose own imports lack something
    "__init__.py": "import ray_that_was_not_carried\n",
    "utils/__init__.py": "import tensordict_that_was_not_carried\n",
    "utils/device.py": "from verl.plugin import FACTOR\n",
    "plugin/__init__.py": "FACTOR = 3\n",
    "utils/kernel/__init__.py": "",
    "utils/kernel/kernels.py": "from verl.utils.device import FACTOR\n\ndef times(x):\n    return FACTOR * x\n",
    "utils/kernel/linear_cross_entropy.py": (
        "def linear_cross_entropy(x):\n    from . import kernels\n    return kernels.times(x)\n"
    ),
}


def test_kernels_of_a_package_that_cannot_be_imported_whole_are_loaded_and_called(tmp_path):
    for name, text in CARRIED.items():
        path = tmp_path / "verl" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    script = (
        "import rivals_packages as packages\nfrom suite_cases import Shape\n"
        "print(packages._verl_triton_call()(14))\n"
        "one = {rival.name: rival for rival in packages.PACKAGES}['verl_triton']\n"
        "print(one.why_not(Shape(8, 128, 512), 'cpu'))\n"
    )
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, "-c", script]
    run = subprocess.run(command, cwd=BENCH, capture_output=True, text=True, timeout=100, env=environ)
    assert run.stdout.splitlines() == ["42", "it has no path on a CPU"], run.stderr


def test_a_journal_says_who_was_refused_and_why(tmp_path):
    journal, report = Journal(), tmp_path / "head.json"
    journal.open(report, {"device": "d"})
    for name in ("a", "b"):
        journal.begin(f"bench_head[T8-{name}]", name, {"T": 8})
        journal.row(name, [2.0, 1.0, 4.0], {"peak_bytes": 5})
    journal.refuse("b", "it is wrong")
    journal.write()
    journal.close(whole=False)
    recover(report)
    saved = load_results(report)
    assert [(row.rival, row.seconds, row.group) for row in saved.rows] == [("a", 2.0, "T8 (cut off)")]
    assert saved.skipped == [("b", "it is wrong", "T8 (cut off)")]
    assert not list(tmp_path.glob("*.partial.json"))
    report.write_text(json.dumps({"benchmarks": [], "skipped": [{"rival": "c", "group": None, "reason": "no GPU"}]}))
    journal.write()
    recover(report)
    assert [skip.rival for skip in load_results(report).skipped] == ["c", "b"]
