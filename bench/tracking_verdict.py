"""The table that a reader chooses a method by: what each reaches, follows and costs, from the means of the grid.

A row says in words what its numbers, beside it, allow; `THRESHOLDS` is where a word begins.
"""

from __future__ import annotations

from tracking_cases import OWN, OWN_FORM, REGIMES, TARGETED, WITH_RLOO
from tracking_runs import Means, event

# Mean |entropy - target| of a curve, nats, up to which a method is said to do it, in both regimes.
THRESHOLDS = {"level": 0.04, "line": 0.02, "half_cosine": 0.02, "wave": 0.04}
FALLING = ("line", "half_cosine")
COLUMNS = [
    *("method", "reaches a target", "follows a curve", "any advantage", "error: level", "error: line", "error: cosine"),
    *("error: wave", "error: step", "settles down", "settles up", "reward", "distinct right of 8"),
    *("second task: error", "reward there"),
]


def does(table: Means, method: str, curves: tuple[str, ...]) -> bool | None:
    """Whether the mean error is within the threshold on all these curves and regimes.

    None if no error is beyond it, but a curve was not run.
    """
    rows = [table.get(f"{method}-{curve}-{regime}") for curve in curves for regime in REGIMES]
    known = [row["error"] <= THRESHOLDS[row["schedule"]] for row in rows if row is not None]
    return False if not all(known) else True if len(known) == len(rows) else None


def reaches(table: Means, method: str) -> str:
    """Whether the method holds the constant that the model starts at."""
    return {None: "not run", True: "yes", False: "no"}[does(table, method, ("level",))]


def follows(table: Means, method: str) -> str:
    """Which curves the method follows: the wave too, those that fall, or none."""
    falls, turns = does(table, method, FALLING), does(table, method, ("wave",))
    if falls is False:
        return "no"
    if falls is None:
        return "not run"
    return {True: "yes", False: "falling ones", None: "falling ones; wave not run"}[turns]


def any_advantage(method: str) -> str:
    """Whether the method leaves the advantage and the scale of the reward to the user.

    That what it makes of each advantage is its equation, `tests/entrocraft/test_every_combination.py` holds; how it
    tracks with another than GRPO's, `tracking_tables.with_rloo` shows.
    """
    return "yes" if f"rloo_{method}" in WITH_RLOO else "no"


def method_table(table: Means) -> str | None:
    """Markdown, a row a method that seeks a target, the tightest on the falling line first, and `none` below.

    None where `none` or all others lack a regime of that line. A column that nobody fills is left out.
    """
    whole = [name for name in ("none", *TARGETED) if all(f"{name}-line-{regime}" in table for regime in REGIMES)]
    if "none" not in whole or len(whole) == 1:
        return None
    rows = [COLUMNS]
    ranked = sorted(whole[1:], key=lambda name: sum(table[f"{name}-line-{regime}"]["error"] for regime in REGIMES))
    for name in [*ranked, "none"]:
        words = [f"`{name}`" + (" *" if name in OWN else " †" if name in OWN_FORM else "")]
        words += (
            ["no", "no", "yes"] if name == "none" else [reaches(table, name), follows(table, name), any_advantage(name)]
        )
        words += [_pair(table, name, curve, "error", 3) for curve in ("level", *FALLING, "wave")]
        words += [_pair(table, name, "step_down_up", "error", 3)]
        words += [_settles(table, name, way) for way in ("down", "up")]
        words += [_pair(table, name, "line", "final_reward", 2), _pair(table, name, "line", "distinct", 1)]
        there = f"addition-{name}"
        words += [_pair(table, there, "line", "error", 3), _pair(table, there, "line", "final_reward", 2)]
        rows.append(words)
    filled = [column for column in zip(*rows, strict=True) if any(column[1:])]
    head, *rest = ["| " + " | ".join(words) + " |" for words in zip(*filled, strict=True)]
    lines = [head, "|---" * len(filled) + "|", *rest]
    shown = [row for row in table.values() if row["method"] in whole and row["schedule"] != "too_high"]
    counts = [sorted({row["seeds"] for row in shown if row["task"] == task}) for task in ("sums", "addition")]
    means = f"Means over {_counted(counts[0])}" + (
        f", of the second task over {_counted(counts[1])}" if counts[1] else ""
    )
    return "\n".join([*lines, "", f"{means}; one pass / re-used batches.", ""])


def _counted(seeds: list[int]) -> str:
    """`1 seed`, `3 seeds`, `1 to 3 seeds`."""
    range_of = f"{seeds[0]} to {seeds[-1]}" if seeds[1:] else f"{seeds[0]}"
    return f"{range_of} seed" + ("" if seeds[-1] == 1 else "s")


def _pair(table: Means, method: str, curve: str, column: str, digits: int) -> str:
    """A column's means in both regimes; empty where the curve was not run."""
    rows = [table.get(f"{method}-{curve}-{regime}") for regime in REGIMES]
    if all(row is None for row in rows):
        return ""
    return " / ".join("-" if row is None else f"{row[column]:.{digits}f}" for row in rows)


def _settles(table: Means, method: str, way: str) -> str:
    """Steps to settle in both regimes, and in how many of the seeds; empty where the step was not run."""
    rows = [table.get(f"{method}-step_down_up-{regime}") for regime in REGIMES]
    if all(row is None for row in rows):
        return ""
    return " / ".join("-" if row is None else event(row, way) for row in rows)
