"""What a run of the entropy-tracking benchmark is judged by, and the tables and figures of all of them."""

from __future__ import annotations

import json
import math
import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure
from tracking_cases import FREE, OWN, STEP, TARGETED, TASKS, Case
from tracking_verdict import method_table

mpl.use("Agg")

SETTLED = 0.05  # nats: so close counts as having arrived after a step
PATIENCE = 5  # steps it must stay so close
ALLOWED = 15  # steps after a jump of the target that the worst error leaves out

COLUMNS = {
    "error": "error", "worst": "worst", "down": "settles down", "up": "up", "final_reward": "reward",
    "accuracy": "accuracy", "pass_at_8": "pass@8", "distinct": "distinct right", "entropy_end": "entropy at the end",
    "kept": "kept", "tokens": "tokens",
}  # fmt: skip


def judge(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
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


def settling(run: dict[str, Any]) -> dict[str, int | None]:
    """Steps from the jump of the target "down", and from that "up", until the entropy is within 0.05 nats of it and
    stays for 5 steps; None where it never is, and nothing where there is no such jump."""
    entropy, target = run["entropy"], [math.nan if t is None else t for t in run["target"]]
    jumps, found = _jumps(target), {}
    for jump, end in zip(jumps, [*jumps, len(entropy)][1:], strict=True):
        near = [abs(entropy[s] - target[s]) <= SETTLED for s in range(jump, end)]
        waits = (w for w in range(len(near) - PATIENCE + 1) if all(near[w : w + PATIENCE]))
        found["up" if target[jump] > target[jump - 1] else "down"] = next(waits, None)
    return found


def read_runs(path: Path) -> dict[str, dict[str, Any]]:
    """The finished runs, by name; of a name that was run twice the last."""
    if not path.exists():
        return {}
    rows = [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
    return {row["name"]: row for row in rows}


def summarise(runs: Iterable[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Mean and spread (sample standard deviation) over seeds of every column, by the name of a case without its seed.

    A run without a task is one of sums. down, up: of the runs that settled; never: how many did not. final_reward:
    share of right rollouts in the last tenth of the steps.
    """
    groups: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for run in runs:
        case = Case(run["method"], run["schedule"], run["regime"], run["seed"], run.get("task", "sums"))
        groups[case.name.removesuffix(f"-seed{case.seed}")].append(run)
    table = {}
    for key, group in groups.items():
        row: dict[str, Any] = {name: group[0][name] for name in ("method", "schedule", "regime")}
        row["task"] = group[0].get("task", "sums")
        row["seeds"] = len(group)
        jumped = [settling(run) for run in group]
        found = [run | settled | {"final_reward": _final(run["reward"])}
                 for run, settled in zip(group, jumped, strict=True)]  # fmt: skip
        row["never"] = {way: sum(found[way] is None for found in jumped) for way in jumped[0]}
        for column in COLUMNS:
            values = [value for run in found if (value := run.get(column)) is not None]
            row[column] = statistics.fmean(values) if values else None
            row[f"{column}_spread"] = statistics.stdev(values) if len(values) > 1 else None
        table[key] = row
    return table


def _final(reward: Sequence[float]) -> float:
    return statistics.fmean(reward[-max(1, len(reward) // 10) :])


def markdown(table: dict[str, dict[str, Any]]) -> str:
    """One table a task, schedule and regime, the tightest first."""
    lines = []
    for task, schedule, regime in _panels():
        rows = [row for row in table.values() if _panel(row) == (task, schedule, regime)]
        if not rows:
            continue
        lines += [
            "### " + ("" if task == "sums" else f"{task}: ") + f"{schedule}, {regime}", "",
            "| " + " | ".join(["method", "seeks a target", *COLUMNS.values(), "seeds"]) + " |",
            "|---" * (len(COLUMNS) + 3) + "|",
        ]  # fmt: skip
        for row in sorted(rows, key=lambda row: row["error"]):
            cells = [row["method"], "no" if row["method"] in FREE else "yes"]
            cells += [_cell(row, column, TASKS[task].digits) for column in COLUMNS]
            lines.append("| " + " | ".join([*cells, str(row["seeds"])]) + " |")
        lines.append("")
    return "\n".join(lines)


def comparison(table: dict[str, dict[str, Any]]) -> str:
    """A row a curve and form of `budget`: error and pass@8, and those of the tightest published method that seeks a
    target."""
    lines = [
        "### Against the tightest published method", "",
        "| curve | ours | error | pass@8 | published | error | pass@8 | times tighter |",
        "|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for panel in _panels():
        task, schedule, regime = panel
        here = {row["method"]: row for row in table.values() if _panel(row) == panel}
        published = [row for name, row in here.items() if name in TARGETED and name not in OWN]
        if not published:
            continue
        best = min(published, key=lambda row: row["error"])
        digits = TASKS[task].digits
        for name in (name for name in OWN if name.startswith("budget") and name in here):
            cells = [("" if task == "sums" else f"{task}: ") + f"{schedule}, {regime}"]
            for row in (here[name], best):
                cells += [row["method"], _cell(row, "error", digits), _cell(row, "pass_at_8", digits)]
            lines.append("| " + " | ".join([*cells, f"{best['error'] / here[name]['error']:.1f}"]) + " |")
    return "\n".join([*lines, ""]) + "\n"


def destroyed(runs: Iterable[dict[str, Any]]) -> list[str]:
    """Runs that control destroyed: at the end of a falling curve they have less than half of the accuracy of the
    uncontrolled run of the same task, regime and seed."""
    runs = list(runs)
    free = {_arm(run): run for run in runs if run["method"] == "none"}
    found = []
    for run in runs:
        arm = free.get(_arm(run))
        if arm is None or run["method"] not in TARGETED or run["schedule"] not in ("line", "half_cosine"):
            continue
        if run["accuracy"] < 0.5 * arm["accuracy"]:
            found.append(f"{run['name']}: accuracy {run['accuracy']:.2f}, uncontrolled {arm['accuracy']:.2f}")
    return found


def _arm(run: dict[str, Any]) -> tuple[str, str, int]:
    """What a run shares with the uncontrolled run that it is compared with."""
    return run.get("task", "sums"), run["regime"], run["seed"]


def _panels() -> list[tuple[str, str, str]]:
    """Task, schedule and regime of every table, in order."""
    return [(name, s, r) for name, task in TASKS.items() for r in task.regimes for s in task.schedules]


def _panel(row: dict[str, Any]) -> tuple[str, str, str]:
    """The table that a run or a row of means belongs to."""
    return row.get("task", "sums"), row["schedule"], row["regime"]


def _cell(row: dict[str, Any], column: str, nats: int) -> str:
    """Mean and spread; tracking errors with `nats` decimals, the entropy with one less."""
    value, spread = row[column], row[f"{column}_spread"]
    never = row["never"].get(column, 0)
    if value is None:
        return "never" if never else ""
    whole = {"down": 0, "up": 0, "tokens": 0}
    digits = {"error": nats, "worst": nats, "entropy_end": nats - 1, "distinct": 1, **whole}.get(column, 2)
    text = f"{value:.{digits}f}" + ("" if spread is None else f" ± {spread:.{digits}f}")
    return text + (f", {never} of {row['seeds']} never" if never else "")


def plot_curves(runs: dict[str, dict[str, Any]], panel: tuple[str, str, str], path: Path) -> None:
    """A small picture a method: entropy against target, of the first seed."""
    here = [run for run in runs.values() if _panel(run) == panel and run["method"] in TARGETED]
    if not here:
        return
    first, nats = min(run["seed"] for run in here), TASKS[panel[0]].digits
    chosen = [run for run in here if run["seed"] == first]
    columns = 4
    height = -(-len(chosen) // columns)
    figure = Figure(figsize=(3 * columns, 2.1 * height), layout="constrained")
    axes = figure.subplots(height, columns, squeeze=False, sharex=True, sharey=True).flat
    for axis, run in zip(axes, sorted(chosen, key=lambda run: run["error"]), strict=False):
        axis.plot(run["target"], color="#888888", lw=1)
        axis.plot(run["entropy"], color="#0072B2", lw=1)
        axis.set_title(f"{run['method']}: {run['error']:.{nats}f} nats", fontsize=9)
    figure.supxlabel("step")
    figure.supylabel("entropy (nats)")
    figure.savefig(path, dpi=110)


def plot_frontier(table: dict[str, dict[str, Any]], task: str, path: Path) -> None:
    """Tracking error against accuracy and distinct right answers (pass@8 where there is one right answer), a point a
    method, on the falling line."""
    columns = ("accuracy", "distinct" if task == "sums" else "pass_at_8")
    figure = Figure(figsize=(11, 8), layout="constrained")
    axes = figure.subplots(2, 2)
    for line, regime in zip(axes, TASKS[task].regimes, strict=True):
        for axis, column in zip(line, columns, strict=True):
            for row in table.values():
                if _panel(row) != (task, "line", regime):
                    continue
                colour = "#0072B2" if row["method"] in TARGETED else "#888888"
                axis.plot(row["error"], row[column], "o", ms=4, color=colour)
                axis.annotate(row["method"], (row["error"], row[column]), fontsize=6, xytext=(3, 2),
                              textcoords="offset points")  # fmt: skip
            axis.set_xscale("log")
            axis.set_xlabel("tracking error (nats)")
            axis.set_ylabel(f"{column} on held-out prompts")
            axis.set_title(regime, fontsize=9)
    figure.savefig(path, dpi=110)


def plot_failure(runs: dict[str, dict[str, Any]], regime: str, path: Path) -> None:
    """Of the target that is too high, a column a method of the first seed: entropy and target, accuracy, and the
    rollouts that contribute with a negative advantage (arXiv 2604.26326, Fig. 7); a line where control let go."""
    here = [run for run in runs.values() if _panel(run) == ("sums", "too_high", regime)]
    if not here:
        return
    first = min(run["seed"] for run in here)
    chosen = sorted((run for run in here if run["seed"] == first), key=lambda run: list(TARGETED).index(run["method"]))
    figure = Figure(figsize=(2.6 * len(chosen), 6), layout="constrained")
    axes = figure.subplots(3, len(chosen), squeeze=False, sharex=True, sharey="row")
    for column, run in zip(axes.T, chosen, strict=True):
        for axis, name in zip(column, ("entropy", "reward", "negatives"), strict=True):
            axis.plot([math.nan if value is None else value for value in run[name]], color="#0072B2", lw=1)
            if run["released_at"] is not None:
                axis.axvline(run["released_at"], color="#D55E00", lw=1, ls="--")
        column[0].plot(run["target"], color="#888888", lw=1)
        column[0].set_title(run["method"], fontsize=9)
        column[2].set_xlabel("step")
    for axis, label in zip(axes[:, 0], ("entropy (nats)", "accuracy", "share of contributing negatives"), strict=True):
        axis.set_ylabel(label)
    figure.savefig(path, dpi=110)


def write_report(out: Path) -> str:
    """Writes `summary.json`, `table.md`, `methods.md` and the figures beside `runs.jsonl`; returns the table."""
    runs = read_runs(out / "runs.jsonl")
    table = summarise(runs.values())
    lost = destroyed(runs.values())
    text = markdown(table) + "\n" + comparison(table)
    text += "\nRuns that control destroyed: " + ("; ".join(lost) if lost else "none") + ".\n"
    (out / "summary.json").write_text(json.dumps(table, indent=1) + "\n")
    (out / "table.md").write_text(text)
    if (chosen := method_table(table)) is not None:
        (out / "methods.md").write_text(chosen)
    for panel in _panels():
        name = "_".join(panel[panel[0] == "sums" :])
        plot_curves(runs, panel, out / f"curves_{name}.png")
    for regime in TASKS["sums"].regimes:
        plot_failure(runs, regime, out / f"failure_{regime}.png")
    for task in sorted({row["task"] for row in table.values()}):
        plot_frontier(table, task, out / ("frontier.png" if task == "sums" else f"frontier_{task}.png"))
    return text
