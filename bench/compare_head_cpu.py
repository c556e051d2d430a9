"""The head on a CPU against what trainers do: time, memory and errors of forward plus backward, in one run.

    python bench/compare_head_cpu.py [--T 1024 --H 1024 --V 151936 --repeats 3] [--out bench/results/head_cpu.json]

Every contender computes the log-probability of a target and the entropy over the whole vocabulary from the same bf16
hidden states and weight (peaked: mean entropy 0.3 to 1.5 nats, mean top logit 18 to 30, half of the targets not the
peak), and the gradients of both, each in a process of its own. They take turns, round by round, one working while the
others wait; seconds are medians of rounds, after a call at a small size. Memory is the peak of the resident set in the
first round above what stands before it, less the gradients. Errors are against fp64, on 64 rows and 32 columns of the
weight. Contenders from verl and TRL are measured where those packages are installed. All stay loaded to the end: some
10 GiB at the default size. Times on shared cores are worth their ratios within a run.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import json
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from rivals import Rival, all_rivals, ours, run
from suite_cases import JOBS, Operands, Shape, make_operands
from suite_contest import complaint
from suite_errors import Truth, bounds
from suite_machine import machine

from entrocraft.train.bench_file import load_results
from entrocraft.train.bench_table import as_text

JOB = JOBS["both"]
NAMES = ("entrocraft", "entrocraft_cache", "eager_fp32", "eager_bf16", "verl_torch", "trl_chunked")


def contenders() -> dict[str, Rival]:
    """Those of the suite, with smaller buffers for the cache, which then holds most of what it takes."""
    found = {rival.name: rival for rival in all_rivals()}
    cache = functools.partial(ours, mode="cache", cache_bytes=1 << 40, buffer_bytes=64 << 20)
    settings = "mode cache: bf16 exponentials kept, buffers of 64 MiB"
    found["entrocraft_cache"] = dataclasses.replace(found["entrocraft_cache"], call=cache, settings=settings)
    return {name: found[name] for name in NAMES}


def _resident(field: str) -> int:
    """Bytes of this process: VmRSS now, VmHWM at its highest."""
    found = re.search(field + r":\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return int(found[1]) * 1024


def work(name: str, folder: Path) -> None:
    """A contender's process: a round for every line that comes in, told as it ends; errors when no more come."""
    rival = contenders()[name]
    run(rival, make_operands(Shape(64, 64, 512), JOB, "peaked", device="cpu"), JOB)  # thread pools are there
    operands: Operands = torch.load(folder / "operands.pt", weights_only=False)
    made: Any = None
    print("ready", flush=True)
    for _ in sys.stdin:
        made = None
        before, started = _resident("VmRSS"), time.perf_counter()
        made = run(rival, operands, JOB)
        seconds = time.perf_counter() - started
        transient = _resident("VmHWM") - before - sum(gradient.nbytes for gradient in made[1])
        print(json.dumps({"seconds": seconds, "transient_bytes": transient}), flush=True)
    truth: Truth = torch.load(folder / "truth.pt", weights_only=False)
    print(json.dumps({"errors": truth.errors(*made), "settings": rival.settings}), flush=True)


class Worker:
    """The process of one contender, as its parent sees it."""

    def __init__(self, name: str, folder: Path) -> None:
        command = [sys.executable, str(Path(__file__).resolve()), "--only", name, "--folder", str(folder)]
        self.name, self._said = name, folder / f"{name}.log"
        self.rounds: list[dict[str, Any]] = []
        with self._said.open("w") as log:
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True
            )
        self.alive = self._line() is not None  # the next is not begun before this one waits

    def _line(self) -> str | None:
        """The next line that it says, past what a library prints; None if it ended."""
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith(("{", "ready")):
                return line
        return None

    def round(self) -> None:
        """One more; nothing for one that failed."""
        if self.alive:
            assert self._process.stdin is not None
            with contextlib.suppress(BrokenPipeError):  # it ended while it waited: it says no more
                self._process.stdin.write("\n")
                self._process.stdin.flush()
            line = self._line()
            self.alive = line is not None
            self.rounds += [json.loads(line)] if line is not None else []

    def result(self) -> dict[str, Any]:
        """What came out, or {"skipped": why not}: it failed, or its answer is wrong."""
        line = self._process.communicate()[0].strip().rpartition("\n")[2]
        if not line.startswith("{"):
            said = self._said.read_text().strip().splitlines() or ["killed: out of memory, most likely"]
            return {"skipped": said[-1]}
        told = json.loads(line)
        wrong = complaint(self.name, told["errors"], bounds(contenders()[self.name]))
        if wrong is not None:
            return {"skipped": wrong, **told}
        seconds = [one["seconds"] for one in self.rounds]
        return {"seconds": seconds, "transient_bytes": self.rounds[0]["transient_bytes"], **told}


def compare(shape: Shape, repeats: int) -> dict[str, dict[str, Any]]:
    """Every contender: seconds of each round, transient bytes, errors, settings; or {"skipped": reason}."""
    with tempfile.TemporaryDirectory() as there:
        folder = Path(there)
        operands = make_operands(shape, JOB, "peaked", device="cpu", dtype=torch.bfloat16)
        torch.save(Truth(operands, JOB), folder / "truth.pt")
        torch.save(operands, folder / "operands.pt")  # made in a worker, they would stand in its peak
        del operands
        reasons = {name: rival.why_not(shape, "cpu") for name, rival in contenders().items()}
        workers = [Worker(name, folder) for name, reason in reasons.items() if reason is None]
        for number in range(repeats):
            for worker in workers[number % len(workers) :] + workers[: number % len(workers)]:
                print(f"round {number + 1} of {repeats}: {worker.name} ...", file=sys.stderr, flush=True)
                worker.round()
        found = {name: {"skipped": reason} for name, reason in reasons.items() if reason is not None}
        return found | {worker.name: worker.result() for worker in workers}


def main(arguments: list[str] | None = None) -> int:
    """Measure every contender, each in its own process; 1 if one of them is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in (("T", 1024), ("H", 1024), ("V", 151_936), ("repeats", 3)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--only", choices=NAMES, help=argparse.SUPPRESS)  # the process of one
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help="write the results there as JSON")
    given = parser.parse_args(arguments)
    if given.only:
        work(given.only, given.folder)
        return 0
    if given.repeats < 1:
        parser.error(f"--repeats {given.repeats}: expected at least 1")
    results = compare(Shape(given.T, given.H, given.V), given.repeats)
    size = {"T": given.T, "H": given.H, "V": given.V, "dtype": "bfloat16"}
    report = {"machine": machine("cpu"), "size": size, "data": "peaked", "results": results}
    with tempfile.TemporaryDirectory() as there:
        out = given.out or Path(there) / "head_cpu.json"
        out.write_text(json.dumps(report, indent=1) + "\n")
        print(as_text(load_results(out)))
    return int(any(" is wrong " in one.get("skipped", "") for one in results.values()))


if __name__ == "__main__":
    sys.exit(main())
