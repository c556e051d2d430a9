"""Updates of suite_trl_step.py in processes of their own: the best micro-batch, the largest batch, who disagrees."""

from __future__ import annotations

import json
import math
import resource
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from suite_watch import out_of_memory

SCRIPT = Path(__file__).resolve().with_name("suite_trl_step.py")
GROUP = 4  # rollouts of a prompt
GB = 1e9


class Size(NamedTuple):
    """One update."""

    head: str
    layers: int
    rollouts: int
    prompt: int
    response: int
    microbatch: int
    """Rollouts of TRL's micro-batch, and as many times prompt + response tokens of ours."""


def limit_memory(device: str, limit_gb: float) -> None:
    """No more than this for the process: on a CPU of data, beyond what it has when this is called; on a GPU of all that
    torch allocates."""
    if device == "cuda":
        torch.cuda.set_per_process_memory_fraction(limit_gb * GB / torch.cuda.get_device_properties(0).total_memory)
    else:
        size = data_bytes() + int(limit_gb * GB)
        resource.setrlimit(resource.RLIMIT_DATA, (size, size))


def data_bytes() -> int:
    """What RLIMIT_DATA counts of this process; 0 where /proc does not say."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.is_file() else []
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("VmData")), 0)


def alone(name: str, size: Size, device: str, *options: str) -> dict[str, Any]:
    """What a contender measures in a process of its own; {"reason": ..., "no_room": whether that is memory} where it
    does not fit or cannot run."""
    command = [sys.executable, str(SCRIPT), "--only", name, "--device", device, *options]
    command += [f"--{field}={value}" for field, value in size._asdict().items()]
    run = subprocess.run(command, capture_output=True, text=True)
    if run.returncode == 0:
        return json.loads(run.stdout.splitlines()[-1])
    said = run.stderr.strip().splitlines() or [f"ended by signal {-run.returncode}, without a word"]
    # The kernel kills whom it takes memory from, and a library that gets none may abort or read address 0.
    killed = run.returncode == -9 or (run.returncode in (-6, -11) and "--limit-gb" in " ".join(options))
    return {"reason": said[-1], "no_room": killed or out_of_memory(run.stderr)}


def sweep(
    names: Sequence[str], size: Size, device: str, rounds: int, microbatches: list[int], processes: int
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each contender so many times at each micro-batch, with what is its best so far. They take turns, and another
    begins every time: what else the machine does meanwhile is spread over all."""
    made: dict[str, dict[int, list[dict[str, Any]]]] = {name: {one: [] for one in microbatches} for name in names}
    for turn in range(processes):
        first = turn % len(names)
        for name in (*names[first:], *names[:first]):
            for one in microbatches:
                made[name][one].append(alone(name, size._replace(microbatch=one), device, f"--rounds={rounds}"))
            yield name, best(made[name])


def best(made: dict[int, list[dict[str, Any]]]) -> dict[str, Any]:
    """Of what processes measured at each micro-batch: the fastest, by the median of its processes, with their range;
    where there are several micro-batches, also which it is, and what the others took."""
    found = {one: _median(runs) for one, runs in made.items()}
    ran = {one: what for one, what in found.items() if "reason" not in what}
    if not ran:
        return next(iter(found.values()))
    fastest = min(ran, key=lambda one: ran[one]["seconds"])
    if len(made) == 1:
        return ran[fastest]
    tried = {str(one): what.get("seconds", what.get("reason")) for one, what in found.items()}
    return {**ran[fastest], "best_microbatch": fastest, "tried": tried}


def _median(runs: list[dict[str, Any]]) -> dict[str, Any]:
    failed = [one for one in runs if "reason" in one]
    if failed or len(runs) == 1:
        return (failed or runs)[0]
    seconds = [one["seconds"] for one in runs]
    spread = {"processes": len(runs), "seconds_range": [min(seconds), max(seconds)]}
    return {**runs[0], "seconds": statistics.median(seconds), **spread}


def fits(name: str, size: Size, device: str, limit_gb: float | None) -> bool:
    """Whether two updates of it fit, the second beside the optimizer's state.

    Raises:
        RuntimeError: it failed of something else than memory.
    """
    limit = () if limit_gb is None else (f"--limit-gb={limit_gb:g}",)
    made = alone(name, size, device, "--fits", *limit)
    if "reason" in made and not made["no_room"]:
        raise RuntimeError(f"{name} with {size.rollouts} rollouts failed, and not of memory: {made['reason']}")
    return "reason" not in made


def largest(holds: Callable[[int], bool], most: int) -> tuple[int, bool]:
    """The most rollouts, a multiple of GROUP, that hold, to one part in eight, and whether the search ended at `most`
    before memory did; 0 if none hold."""
    most = most // GROUP * GROUP
    good, bad, trial = 0, None, min(GROUP, most)
    while bad is None and good < most:
        if holds(trial):
            good, trial = trial, min(2 * trial, most)
        else:
            bad = trial
    while bad is not None and bad - good > max(GROUP, good // 8):
        middle = (good + bad) // 2 // GROUP * GROUP
        good, bad = (middle, bad) if holds(middle) else (good, middle)
    return good, bad is None


def search(name: str, size: Size, device: str, most: int, limit_gb: float | None) -> dict[str, Any]:
    """The largest batch, all of it in one micro-batch, as a report has it."""

    def holds(rollouts: int) -> bool:
        return fits(name, size._replace(rollouts=rollouts, microbatch=rollouts), device, limit_gb)

    try:
        good, capped = largest(holds, most)
    except RuntimeError as error:
        return {"largest_batch_reason": str(error)}
    return {"largest_batch": good, "largest_batch_capped": capped, "limit_gb": limit_gb}


def disagreements(results: dict[str, dict[str, Any]], device: str) -> list[str]:
    """Who differs from ours in the first update: loss by more than 1e-5 on a CPU (fp32) or 2e-2 on a GPU (bf16),
    relative, or norm of the gradient by ten times as much."""
    most, ours = (1e-5 if device == "cpu" else 2e-2), results.get("entrocraft", {})
    found = []
    for name, one in results.items():
        for what, bound in (("loss", most), ("grad_norm", 10 * most)):
            if what in one and what in ours:
                error = abs(one[what] - ours[what]) / abs(ours[what]) if ours[what] else math.inf
                if one[what] != ours[what] and not error <= bound:
                    found.append(f"{name}: {what} {one[what]:.8g}, ours {ours[what]:.8g}: {error:.1e} > {bound:g}")
    return found
