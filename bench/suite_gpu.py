"""The stages of gpu_suite.sh: each a process of its own, written down as it ends, the most telling first."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from suite_journal import recover

BENCH = Path(__file__).resolve().parent
MINUTES = 8.0
LEAST_S = 25.0  # a stage that has less is not begun
LAST_WORDS_S = 10.0  # for a stage that is interrupted to write down what it has


@dataclass(frozen=True, slots=True)
class Stage:
    """One process: a script of bench/ with its arguments, or a file of benchmarks with options of pytest."""

    name: str
    script: str
    arguments: tuple[str, ...]
    most_s: float = 120.0

    def command(self, out: Path) -> list[str]:
        """What to run; benchmarks write NAME.json, scripts write into the folder NAME or to NAME.json."""
        if self.script.startswith("bench_"):
            options = ["-q", "-rs", "--tb=line", "-p", "no:cacheprovider", f"--benchmark-json={out / self.name}.json"]
            return [sys.executable, "-P", "-m", "pytest", str(BENCH / self.script), *options, *self.arguments]
        place = out / self.name if self.script == "measure_head.py" else out / f"{self.name}.json"
        return [sys.executable, str(BENCH / self.script), "--out", str(place), *self.arguments]

    def told(self) -> str:
        """The command as a report says it."""
        return " ".join(self.command(Path("OUT"))[1:])


def head(name: str, arguments: str, most_s: float = 120.0) -> Stage:
    """A stage of bench_linear_logprob.py."""
    return Stage(name, "bench_linear_logprob.py", tuple(arguments.split()), most_s)


def quick() -> list[Stage]:
    """Eight minutes."""
    ten, large = "--bench-rounds 10", "--heads qwen3_4b --tokens 16384"
    return [
        Stage("correctness", "measure_head.py", ("--shapes", "qwen3_4b", "--sections", "correctness", "repeatability")),
        head("both", f"{large} --jobs both --data peaked {ten}"),
        head("statistics", f"{large} --jobs statistics --data peaked {ten}"),
        Stage("policy_loss", "bench_policy_loss.py", tuple(f"{large} {ten}".split())),
        Stage("profile", "suite_profile.py", ("--head", "qwen3_4b", "--tokens", "16384"), 60.0),
        head("rows_and_frozen", f"{large} --jobs tenth_live half_zero frozen --data peaked {ten} --rivals entrocraft "
             "entrocraft_cache entrocraft_policy_loss trl_chunked liger_scaled_ce cce verl_triton eager_bf16"),
        head("llama31_8b", f"--heads llama31_8b --tokens 16384 --jobs both --data peaked {ten}"),
        head("ragged_gpt_oss", f"--heads gpt_oss --tokens 3328 --jobs both row_temperature --data peaked {ten}"),
        head("random", f"{large} --jobs logprob mean_loss --data random {ten}"),
        Stage("logits", "bench_logits_logprob.py", tuple(f"--heads qwen3_4b --tokens 8192 {ten}".split())),
        Stage("speed", "measure_head.py", ("--shapes", "llama31_8b", "--sections", "speed", "zero_rows", "memory")),
    ]  # fmt: skip


def long() -> list[Stage]:
    """The quick stages, then the matrix: every head, T of 2,048 to 131,072, ragged ones, both data, scaling."""
    stages, thirty = quick(), "--bench-rounds 30 --data peaked random"
    for name in ("qwen3_4b", "qwen3_8b", "llama31_8b", "gemma3_4b", "gpt_oss", "llama3_70b"):
        for tokens in ("2048 3328 8192", "16385", "32768", "131072"):
            stages.append(head(f"{name}_{tokens.split()[-1]}", f"--heads {name} --tokens {tokens} {thirty}", 3600.0))
    sizes = "--tokens 2048 8192 32768 --vocab 32768 65536 131072 262144"
    stages.append(head("scaling", f"--heads qwen3_4b {sizes} --jobs both statistics --data peaked", 3600.0))
    stages += [*_rest(thirty.partition(" --data")[0])]
    step = "--head qwen3_4b --layers 4 --prompt 128 --response 512 --rollouts 64 --microbatch 8 16 32 --largest"
    stages.append(Stage("step_against_trl", "suite_trl_step.py", tuple(step.split()), 1800.0))
    every = ("--sections", "tiles", "sanitizer", "profile", "speed", "zero_rows", "memory")
    return [*stages, Stage("measure_head", "measure_head.py", every, 1800.0)]


def _rest(rounds: str) -> Iterator[Stage]:
    """The other files of benchmarks at the matrix's sizes; of logits and gradients 131,072 rows fit nowhere."""
    for name in ("qwen3_4b", "qwen3_8b", "llama31_8b", "gemma3_4b", "gpt_oss", "llama3_70b"):
        sizes = f"--heads {name} --tokens 2048 8192 32768 {rounds}"
        for kind in ("policy_loss", "logits_logprob", "scoring"):
            more = " 131072" if kind != "logits_logprob" else ""
            arguments = sizes.replace("32768", f"32768{more}").split()
            yield Stage(f"{kind}_{name}", f"bench_{kind}.py", tuple(arguments), 3600.0)
    yield Stage("train_step", "bench_train_step.py", tuple(rounds.split()))
    yield Stage("rejection", "bench_rejection.py", tuple(rounds.split()))


def smoke() -> list[Stage]:
    """The smallest rows, in Triton's interpreter, of those who need nothing but what the suite needs."""
    small = "--device cpu --heads tiny --tokens 16 --vocab 300 --bench-rounds 2"
    loss = f"{small.replace('16', '32')} --rivals entrocraft_policy_loss entrocraft_two_steps eager_fp32"
    correct = "--device cpu --shapes least --sections correctness repeatability"
    return [
        Stage("correctness", "measure_head.py", tuple(correct.split())),
        head("both", f"{small} --jobs both statistics --data peaked --rivals entrocraft eager_fp32"),
        Stage("policy_loss", "bench_policy_loss.py", tuple(loss.split())),
        Stage("profile", "suite_profile.py", tuple(["--device", "cpu", "--head", "tiny", "--tokens", "16"])),
    ]


def environment(out: Path, smoke: bool) -> dict[str, Any]:
    """Machine and driver, into environment.json."""
    from suite_machine import machine

    found = machine("cpu" if smoke else "cuda")
    if shutil.which("nvidia-smi"):
        query = "name,driver_version,power.limit,clocks.max.sm,clocks.max.mem,temperature.gpu"
        command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv"]
        found["nvidia_smi"] = subprocess.run(command, capture_output=True, text=True).stdout.splitlines()
    (out / "environment.json").write_text(json.dumps(found, indent=1) + "\n")
    return found


def run_stage(stage: Stage, out: Path, seconds: float) -> dict[str, Any]:
    """Runs it for so long at most, then interrupts it, on which pytest writes what was measured; its output goes to
    NAME.log."""
    started = time.monotonic()
    with (out / f"{stage.name}.log").open("w") as log:
        process = subprocess.Popen(stage.command(out), stdout=log, stderr=subprocess.STDOUT)
        try:
            code: int | None = process.wait(seconds)
        except subprocess.TimeoutExpired:
            code = None
            process.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(LAST_WORDS_S)
        finally:
            process.kill()
            process.wait()
    if stage.script.startswith("bench_"):
        recover(out / f"{stage.name}.json")
    took = round(time.monotonic() - started, 1)
    said = {0: "done", None: f"cut off after {seconds:.0f} s"}.get(
        code, f"failed, exit status {code}: {stage.name}.log"
    )
    return {"stage": stage.name, "result": said, "seconds": took, "command": stage.told()}


def unfinished(stage: Stage, result: str) -> dict[str, Any]:
    """The entry of a stage that has not ended."""
    return {"stage": stage.name, "result": result, "seconds": 0.0, "command": stage.told()}


def write_report(out: Path, found: dict[str, Any], stages: list[dict[str, Any]]) -> None:
    """report.md and stages.json of what there is so far."""
    (out / "stages.json").write_text(json.dumps(stages, indent=1) + "\n")
    lines = [f"# {found['device']}, commit {found['commit']}", "", "| stage | result | seconds |", "|---|---|---|"]
    lines += [f"| {one['stage']} | {one['result']} | {one['seconds']} |" for one in stages]
    for one in stages:
        if (out / f"{one['stage']}.log").is_file():
            lines += _section(out, one)
    (out / "report.md").write_text("\n".join(lines) + "\n")


def _section(out: Path, one: dict[str, Any]) -> list[str]:
    """A stage's command, its tables (its output where there are none), and who was skipped and why."""
    from entrocraft.train.bench_file import load_results
    from entrocraft.train.bench_table import as_markdown

    name = one["stage"]
    log = (out / f"{name}.log").read_text().splitlines()
    lines = ["", f"## {name}", "", f"`{one['command'].replace(str(BENCH.parent) + '/', '')}`", ""]
    try:
        lines.append(as_markdown(load_results(out / f"{name}.json")))
    except (ValueError, FileNotFoundError):
        inner = out / name / "measure_head.md"
        text = "\n".join(log[-100:])
        lines.append(inner.read_text() if inner.is_file() else f"```\n{text}\n```")
    said = "\n".join(lines)  # tables name their skips themselves
    skipped = [line.partition(": ")[2] for line in log if line.startswith("SKIPPED")]
    return [*lines, "", *(f"- {told}" for told in dict.fromkeys(skipped) if told.partition(": ")[2] not in said)]


def main(arguments: list[str] | None = None) -> int:
    """Run the stages that there is time for; 1 if one failed or none began, 2 for a wrong option or no GPU."""
    parser = argparse.ArgumentParser(prog="gpu_suite.sh", description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--long", action="store_true", help="the whole matrix: hours")
    parser.add_argument("--smoke", action="store_true", help="the smallest rows, interpreted, without a GPU")
    parser.add_argument("--minutes", type=float, help=f"most that it may take (default: {MINUTES:g}; --long: no limit)")
    parser.add_argument("--only", nargs="+", metavar="STAGE", help="these stages alone")
    given = parser.parse_args(arguments)
    stages = smoke() if given.smoke else long() if given.long else quick()
    names = [stage.name for stage in stages]
    for name in given.only or names:
        if name not in names:
            parser.error(f"--only {name}: no such stage; there are {', '.join(names)}")
    if given.minutes is not None and not given.minutes > 0:
        parser.error(f"--minutes {given.minutes:g}: expected more than 0, or leave it out")
    if given.smoke:
        os.environ["TRITON_INTERPRET"] = "1"
    import torch

    if not given.smoke and not torch.cuda.is_available():
        print("gpu_suite.sh: torch sees no GPU here; --smoke runs the smallest rows without one", file=sys.stderr)
        return 2
    minutes = given.minutes if given.minutes is not None else 1e6 if given.long else MINUTES
    return run_all([stage for stage in stages if stage.name in (given.only or names)], given.out, minutes, given.smoke)


def run_all(stages: list[Stage], out: Path, minutes: float, smoke: bool) -> int:
    """Stage after stage while there is time, the report written before and after each; 1 if one failed or none began.

    The report says of each stage how it ended, or that it was not begun.
    """
    ends = time.monotonic() + 60 * minutes
    out.mkdir(parents=True, exist_ok=True)
    for stage in stages:  # of an earlier run into the same folder
        (out / f"{stage.name}.log").unlink(missing_ok=True)
    found = environment(out, smoke)
    done = [unfinished(stage, "not begun") for stage in stages]
    for number, stage in enumerate(stages):
        left = ends - time.monotonic()
        if left < LEAST_S:
            done[number] = unfinished(stage, f"not begun: no time left of {minutes:g} minutes")
        else:
            done[number] = unfinished(stage, "begun, and not ended")
            write_report(out, found, done)
            done[number] = run_stage(stage, out, min(left - LAST_WORDS_S, stage.most_s))
        print(f"{stage.name}: {done[number]['result']} ({done[number]['seconds']} s)", flush=True)
        write_report(out, found, done)
    results = [one["result"] for one in done]
    return int(any(said.startswith("failed") for said in results) or all(said.startswith("not") for said in results))


if __name__ == "__main__":
    sys.exit(main())
