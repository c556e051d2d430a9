"""What a run of the entropy-tracking benchmark is judged by, and the means over seeds."""

from __future__ import annotations

import json
import math
import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from tracking_cases import STEP, Case

Run = dict[str, Any]
Means = dict[str, dict[str, Any]]

SETTLED = 0.05  # nats: so close counts as having arrived after a step
PATIENCE = 5  # steps it must stay so close, and must have been before the step
ALLOWED = 15  # steps after a jump of the target that the worst error leaves out

COLUMNS = {
    "error": "error", "whole": "error, all steps", "worst": "worst", "down": "settles down", "up": "up",
    "final_reward": "reward", "accuracy": "accuracy", "pass_at_8": "pass@8", "distinct": "distinct right",
    "entropy_end": "entropy at the end", "kept": "kept", "bypassed": "uncontrolled", "let_go": "let go at",
    "tokens": "tokens",
}  # fmt: skip
# Of these, steps at which something happened, or did not.
EVENTS = ("down", "up", "let_go")


def judge(rows: Sequence[dict[str, Any]]) -> Run:
    """Numbers of one run from its metrics, one row a step.

    error: mean |entropy - target| over the last two thirds of the steps, nats. worst: the largest there, leaving out
    the 15 steps after a jump of the target. accuracy, pass_at_8, distinct: on held-out prompts after the last step.
    kept: mean share of tokens. tokens: response tokens in all. bypassed: share of the steps that went uncontrolled.
    released_at: first step at which control had let go. reward, negatives: a number a step, accuracy of the rollouts
    and the share of them that taught with an advantage below 0. entropy, target: the two curves, nats.
    """
    entropy = [row.get("entropy") for row in rows]
    target = [row.get("target") for row in rows]
    known = [math.nan if t is None else t for t in target]
    jumps = _jumps(known)
    late = range(len(rows) // 3, len(rows))
    errors = {s: abs(e - known[s]) for s in late if (e := entropy[s]) is not None and target[s] is not None}
    calm = [error for s, error in errors.items() if not any(0 <= s - jump < ALLOWED for jump in jumps)]
    last = rows[-1]
    return {
        "error": statistics.fmean(errors.values()),
        "worst": max(calm or errors.values()),
        "accuracy": last["eval_accuracy"],
        "pass_at_8": last["eval_pass_at_8"],
        "distinct": last["eval_distinct_correct"],
        "entropy_end": last["eval_entropy"],
        "kept": statistics.fmean(row["kept_token_fraction"] for row in rows if "kept_token_fraction" in row),
        "tokens": sum(row["tokens_per_second"] * row["seconds"] for row in rows),
        "bypassed": statistics.fmean(row["bypassed"] for row in rows if "bypassed" in row),
        "released_at": next((s for s, row in enumerate(rows) if row.get("released")), None),
        "skipped": sum(row.get("steps_skipped", 0.0) for row in rows),
        "reward": [round(row["accuracy"], 4) for row in rows],
        "negatives": [round(row["active_fraction_negative"], 3) for row in rows],
        "entropy": [None if e is None else round(e, 4) for e in entropy],
        "target": [None if t is None else round(t, 4) for t in target],
    }


def _jumps(target: Sequence[float]) -> list[int]:
    return [s for s in range(1, len(target)) if abs(target[s] - target[s - 1]) > STEP / 2]


def _gaps(run: Run) -> list[float]:
    """|entropy - target| of every step, NaN where one of them is not known."""
    return [
        math.nan if entropy is None or target is None else abs(entropy - target)
        for entropy, target in zip(run["entropy"], run["target"], strict=True)
    ]


def settling(run: Run) -> dict[str, tuple[bool, int | None]]:
    """Of the jump of the target "down", and of that "up": whether the entropy was within 0.05 nats of the target on the
    5 steps before, and the steps until it is so near the new one and stays for 5.

    None where it never is, or was not before: to be near the new level by chance is not to have followed. Nothing where
    there is no such jump.
    """
    near = [gap <= SETTLED for gap in _gaps(run)]
    target = [math.nan if t is None else t for t in run["target"]]
    jumps, found = _jumps(target), {}
    for jump, end in zip(jumps, [*jumps, len(near)][1:], strict=True):
        held = jump >= PATIENCE and all(near[jump - PATIENCE : jump])
        waits = (w - jump for w in range(jump, end - PATIENCE + 1) if all(near[w : w + PATIENCE]))
        found["up" if target[jump] > target[jump - 1] else "down"] = (held, next(waits, None) if held else None)
    return found


def read_runs(path: Path) -> dict[str, Run]:
    """The finished runs, by name; of a name that was run twice the last."""
    if not path.exists():
        return {}
    rows = [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
    return {row["name"]: row for row in rows}


def final_reward(run: Run) -> float:
    """Share of right rollouts in the last tenth of the steps: thousands of them."""
    reward = run["reward"]
    return statistics.fmean(reward[-max(1, len(reward) // 10) :])


def derived(run: Run) -> Run:
    """What follows from what is recorded of a run.

    final_reward. whole: mean |entropy - target| over all steps, nats. down, up: `settling`. let_go: the step control
    let go at, None if it did not. kept: of the steps that were under control.
    """
    gaps = [gap for gap in _gaps(run) if not math.isnan(gap)]
    uncontrolled = run.get("bypassed", 0.0)  # all of these keep everything
    return {
        "final_reward": final_reward(run),
        "whole": statistics.fmean(gaps) if gaps else None,
        **{way: steps for way, (_, steps) in settling(run).items()},
        "let_go": run.get("released_at"),
        "kept": (run["kept"] - uncontrolled) / (1.0 - uncontrolled) if uncontrolled < 1.0 else None,
    }


def summarise(runs: Iterable[Run]) -> Means:
    """Mean and spread (sample standard deviation) over seeds of every column, by the name of a case without its seed.

    A run without a task is one of sums. down, up, let_go: of the runs where it happened; `happened` has their number,
    and `held` the number of runs that were near the level before a jump.
    """
    groups: dict[str, list[Run]] = defaultdict(list)
    for run in runs:
        case = Case(run["method"], run["schedule"], run["regime"], run["seed"], run.get("task", "sums"))
        groups[case.name.removesuffix(f"-seed{case.seed}")].append(run)
    table = {}
    for key, group in groups.items():
        row: dict[str, Any] = {name: group[0][name] for name in ("method", "schedule", "regime")}
        row["task"] = group[0].get("task", "sums")
        row["seeds"] = len(group)
        jumped = [settling(run) for run in group]
        row["held"] = {way: sum(found[way][0] for found in jumped) for way in jumped[0]}
        found = [run | derived(run) for run in group]
        row["happened"] = {event: sum(one.get(event) is not None for one in found) for event in EVENTS}
        for column in COLUMNS:
            values = [value for one in found if (value := one.get(column)) is not None]
            row[column] = statistics.fmean(values) if values else None
            row[f"{column}_spread"] = statistics.stdev(values) if len(values) > 1 else None
        table[key] = row
    return table


def event(row: dict[str, Any], name: str) -> str:
    """Mean step of an event, and in how many of the seeds it happened where not in all.

    Of a jump: "not held" where no seed was near the level before it, "never" where none met the new one.
    """
    happened, seeds = row["happened"][name], row["seeds"]
    if happened:
        return f"{row[name]:.0f}" + (f" ({happened} of {seeds})" if happened < seeds else "")
    if name not in row["held"]:
        return ""
    return "never" if row["held"][name] else "not held"
