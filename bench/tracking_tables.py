"""The tables of the entropy-tracking benchmark, in Markdown: every mean, the frontier, and who is ahead of whom."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

from tracking_cases import FREE, OWN, REGIMES, TARGETED, TASKS, VARIANTS
from tracking_runs import COLUMNS, EVENTS, Means, Run, event, final_reward

FALLING = ("line", "half_cosine")
# What others are compared with, pair by pair.
REFERENCE = "budget_token"

LEGEND = """\
Means ± sample standard deviation over seeds. Errors in nats: mean |entropy - target| over the last two thirds of the
steps, and over all; worst: the largest of the last two thirds, leaving out 15 steps after a jump. Settles: steps from
the jump until the entropy is within 0.05 nats and stays for 5 steps; "not held" where it was not so near before the
jump, so that it had nothing to leave. Reward: of the training rollouts in the last tenth of the steps. Accuracy,
pass@8, distinct right answers of 8: on held-out prompts after the last step. Kept: share of tokens on steps under
control. Uncontrolled: share of steps on which a guard let everything through; let go at: the step from which it did so
for longer.
"""


def panels() -> list[tuple[str, str, str]]:
    """Task, schedule and regime of every table, in order."""
    return [(name, s, r) for name, task in TASKS.items() for r in task.regimes for s in task.schedules]


def panel_of(row: Run) -> tuple[str, str, str]:
    """The table that a run or a row of means belongs to."""
    return row.get("task", "sums"), row["schedule"], row["regime"]


def title(panel: tuple[str, str, str]) -> str:
    """`line, reused`; with the task in front where it is not the first."""
    task, schedule, regime = panel
    return ("" if task == "sums" else f"{task}: ") + f"{schedule}, {regime}"


def markdown(table: Means) -> str:
    """One table a task, schedule and regime, the tightest first."""
    lines = []
    for panel in panels():
        rows = [row for row in table.values() if panel_of(row) == panel]
        if not rows:
            continue
        lines += ["### " + title(panel), "", *_head("method", "seeks a target", *COLUMNS.values(), "seeds")]
        for row in sorted(rows, key=lambda row: row["error"]):
            cells = [row["method"], "no" if row["method"] in FREE else "yes"]
            cells += [cell(row, column) for column in COLUMNS]
            lines.append(_line(*cells, str(row["seeds"])))
        lines.append("")
    return "\n".join(lines)


def cell(row: dict[str, Any], column: str) -> str:
    """Mean and spread of a column; the second task's tracking errors have a decimal more."""
    if column in EVENTS:
        return event(row, column)
    value, spread, nats = row[column], row[f"{column}_spread"], TASKS[row["task"]].digits
    if value is None:
        return ""
    digits = {"error": nats, "whole": nats, "worst": nats, "entropy_end": nats - 1, "distinct": 1, "tokens": 0}
    digits |= {"final_reward": 3}
    places = digits.get(column, 2)
    return f"{value:.{places}f}" + ("" if spread is None else f" ± {spread:.{places}f}")


def frontier(table: Means) -> str:
    """Of every curve that can be followed, the methods that no other beats in both error and reward.

    Whatever error is allowed, the last row within it gives up least reward for it.
    """
    lines = [
        "### Least reward given up for the same error", "",
        "The methods that no other beats in both. The winner at an allowed error is the last row within it.", "",
    ]  # fmt: skip
    columns = ("error", "final_reward", "pass_at_8", "distinct", "bypassed")
    lines += _head("curve", "method", *(COLUMNS[column] for column in columns), "reward below `none`", "seeds")
    for panel in panels():
        task, schedule, regime = panel
        prefix = "" if task == "sums" else f"{task}-"
        free = table.get(f"{prefix}none-line-{regime}")
        here = [row for row in table.values() if panel_of(row) == panel and row["method"] in TARGETED]
        if free is None or schedule == "too_high":
            continue
        best = -math.inf
        for row in sorted(here, key=lambda row: row["error"]):
            if row["final_reward"] <= best:
                continue
            best = row["final_reward"]
            cells = [title(panel), row["method"], *(cell(row, column) for column in columns)]
            lines.append(_line(*cells, f"{free['final_reward'] - best:.3f}", str(row["seeds"])))
    return "\n".join([*lines, ""])


def paired(runs: Iterable[Run]) -> str:
    """Differences to `budget_token` in the same task, curve, regime and seed, over the falling curves, with their
    standard errors."""
    of_case: dict[tuple[Any, ...], dict[str, Run]] = defaultdict(dict)
    for run in runs:
        if run["schedule"] in FALLING and run["method"] not in FREE:
            of_case[*panel_of(run), run["seed"]][run["method"]] = run
    lines = [
        f"### Against `{REFERENCE}` on falling curves, pair by pair", "",
        "Mean difference ± its standard error, over pairs of the same curve, regime and seed.", "",
        *_head("task", "method", "error", "reward", "distinct right", "pairs"),
    ]  # fmt: skip
    for task in TASKS:
        cases = [case for key, case in of_case.items() if key[0] == task and REFERENCE in case]
        rows = []
        for method in TARGETED | VARIANTS:
            pairs = [(case[method], case[REFERENCE]) for case in cases if method in case]
            if method == REFERENCE or len(pairs) < 2:
                continue
            digits = TASKS[task].digits
            error = [one["error"] - other["error"] for one, other in pairs]
            reward = [final_reward(one) - final_reward(other) for one, other in pairs]
            distinct = [one["distinct"] - other["distinct"] for one, other in pairs]
            cells = [_mean(error, digits), _mean(reward, 3), _mean(distinct, 1)]
            rows.append((statistics.fmean(error), _line(task, method, *cells, str(len(pairs)))))
        lines += [line for _, line in sorted(rows)]
    return "\n".join([*lines, ""])


def comparison(table: Means) -> str:
    """A row a curve and method of this project's: error, reward and pass@8, and those of the tightest published method
    that seeks a target.

    Of a step, a method that was not near the level before it is left out.
    """
    lines = ["### Against the tightest published method", ""]
    names = ("error", "reward", "pass@8")
    lines += _head("curve", "ours", *names, "published", *names, "times tighter")
    for panel in panels():
        here = {row["method"]: row for row in table.values() if panel_of(row) == panel}
        published = [
            row for name, row in here.items() if name in TARGETED and name not in OWN and row["held"].get("down", 1)
        ]
        if panel[1] == "too_high" or not published:
            continue
        best = min(published, key=lambda row: row["error"])
        for name in (name for name in OWN if name in here):
            cells = [title(panel)]
            for row in (here[name], best):
                cells += [row["method"], *(cell(row, column) for column in ("error", "final_reward", "pass_at_8"))]
            lines.append(_line(*cells, f"{best['error'] / here[name]['error']:.1f}"))
    return "\n".join([*lines, ""])


def with_rloo(runs: Iterable[Run]) -> str:
    """Errors of the falling line with RLOO's advantages beside those with GRPO's, means over the seeds that have both;
    empty where nothing was run."""
    of_case: dict[tuple[str, str], dict[int, Run]] = defaultdict(dict)
    for run in runs:
        if panel_of(run)[:2] == ("sums", "line"):
            of_case[run["method"], run["regime"]][run["seed"]] = run
    lines = ["### The line with RLOO's advantages", "", "Error and reward with RLOO's, and with GRPO's.", ""]
    lines += _head("method", "regime", "error", "GRPO", "reward", "GRPO", "seeds")
    found = 0
    for method in TARGETED:
        for regime in REGIMES:
            ours, others = of_case[f"rloo_{method}", regime], of_case[method, regime]
            both = sorted(ours.keys() & others.keys())
            if not both:
                continue
            error = [statistics.fmean(arm[seed]["error"] for seed in both) for arm in (ours, others)]
            reward = [statistics.fmean(final_reward(arm[seed]) for seed in both) for arm in (ours, others)]
            cells = [*(f"{value:.3f}" for value in error), *(f"{value:.2f}" for value in reward)]
            lines.append(_line(method, regime, *cells, str(len(both))))
            found += 1
    return "\n".join([*lines, ""]) if found else ""


def destroyed(runs: Iterable[Run]) -> str:
    """Which runs ended with less than half of the reward of the uncontrolled run of their task, regime and seed: on
    falling curves, and on the others."""
    runs = list(runs)
    free = {_arm(run): final_reward(run) for run in runs if run["method"] == "none"}
    seeking = [run for run in runs if run["method"] in TARGETED]
    falling = [run for run in seeking if run["schedule"] in FALLING and _arm(run) in free]
    alone = sum(_arm(run) not in free for run in seeking if run["schedule"] in FALLING)

    def lost(some: list[Run]) -> str:
        found = [run for run in some if _arm(run) in free and final_reward(run) < 0.5 * free[_arm(run)]]
        return (
            "; ".join(f"{run['name']} ({final_reward(run):.2f} for {free[_arm(run)]:.2f})" for run in found) or "none"
        )

    others = [run for run in seeking if run["schedule"] not in FALLING]
    return (
        "### Less than half of the uncontrolled run's reward at the end\n\n"
        f"Falling curves, of {len(falling)} runs: {lost(falling)}."
        + (f" Without an uncontrolled run of their seed: {alone}." if alone else "")
        + f"\n\nOther curves, of {len(others)} runs: {lost(others)}.\n"
    )


def repeated(runs: Iterable[Run]) -> str:
    """Which methods are one and the same run, step by step, in every seed that both have.

    On one pass nothing moves within a step, so that no clip binds; a rule that reads the sign of the entropy's error
    alone does the same on any two curves that it stays above."""
    curves: dict[tuple[str, str, str], dict[str, dict[int, tuple[Any, ...]]]] = defaultdict(lambda: defaultdict(dict))
    for run in runs:
        curves[panel_of(run)][run["method"]][run["seed"]] = tuple(run["entropy"])
    lines = ["### One and the same run", "", "Methods whose entropy is equal on every step of every seed.", ""]
    for panel in panels():
        groups: list[list[str]] = []
        for method, seeds in curves.get(panel, {}).items():
            for group in groups:
                other = curves[panel][group[0]]
                both = seeds.keys() & other.keys()
                if both and all(seeds[seed] == other[seed] for seed in both):
                    group.append(method)
                    break
            else:
                groups.append([method])
        lines += [f"- {title(panel)}: {', '.join(group)}" for group in groups if len(group) > 1]
    return "\n".join([*lines, ""])


def starts(runs: Iterable[Run]) -> dict[tuple[str, int], set[float]]:
    """Entropies of the first step by task and seed: one each, where all runs of a seed begin at the same model."""
    found: dict[tuple[str, int], set[float]] = defaultdict(set)
    for run in runs:
        found[run.get("task", "sums"), run["seed"]].add(run["entropy"][0])
    return dict(found)


def _arm(run: Run) -> tuple[str, str, int]:
    """What a run shares with the uncontrolled run that it is compared with."""
    return run.get("task", "sums"), run["regime"], run["seed"]


def _mean(values: list[float], digits: int) -> str:
    error = statistics.stdev(values) / math.sqrt(len(values))
    return f"{statistics.fmean(values):+.{digits}f} ± {error:.{digits}f}"


def _head(*names: str) -> list[str]:
    return [_line(*names), "|---" * len(names) + "|"]


def _line(*cells: str) -> str:
    return "| " + " | ".join(cells) + " |"
