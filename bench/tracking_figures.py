"""The figures of the entropy-tracking benchmark: the curves themselves, what tracking costs, and the failure case."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.text import Annotation
from matplotlib.transforms import Bbox
from tracking_cases import FREE, OWN, TARGETED, TASKS, Case
from tracking_runs import Means, Run
from tracking_tables import panel_of

mpl.use("Agg")

# These find room for their names before others.
NAMED = (*OWN, "adaptive_bonus", "adaptive_bonus_wide", "hard", "soft", "switch", "none")
BLUE, ORANGE, RED, GREY = "#0072B2", "#E69F00", "#D55E00", "#888888"


def plot_curves(runs: dict[str, Run], panel: tuple[str, str, str], path: Path) -> None:
    """A small picture a method: entropy against target, of the first seed."""
    here = [run for run in runs.values() if panel_of(run) == panel and run["method"] in TARGETED]
    if not here:
        return
    first, nats = min(run["seed"] for run in here), TASKS[panel[0]].digits
    chosen = [run for run in here if run["seed"] == first]
    columns = 4
    height = -(-len(chosen) // columns)
    figure = Figure(figsize=(3 * columns, 2.1 * height), layout="constrained")
    axes = figure.subplots(height, columns, squeeze=False, sharex=True, sharey=True).flat
    for axis, run in zip(axes, sorted(chosen, key=lambda run: run["error"]), strict=False):
        axis.plot(run["target"], color=GREY, lw=1)
        axis.plot(run["entropy"], color=BLUE, lw=1)
        axis.set_title(f"{run['method']}: {run['error']:.{nats}f} nats", fontsize=9)
    figure.supxlabel("step")
    figure.supylabel("entropy (nats)")
    figure.savefig(path, dpi=110)


def plot_frontier(table: Means, task: str, path: Path) -> None:
    """Tracking error on the falling line against reward and distinct right answers (pass@8 where there is one right
    answer), a point a method with its spread; hollow where a quarter of the steps and more went uncontrolled. A
    name that has no room beside its point is left out, of the loosest first; the table has it."""
    columns = ("final_reward", "distinct" if task == "sums" else "pass_at_8")
    label = {"final_reward": "reward, last tenth of the steps", "distinct": "distinct right answers of 8",
             "pass_at_8": "pass@8"}  # fmt: skip
    figure = Figure(figsize=(12, 9), layout="constrained")
    axes = figure.subplots(2, 2)
    for line, regime in zip(axes, TASKS[task].regimes, strict=True):
        for axis, column in zip(line, columns, strict=True):
            here = [row for row in table.values() if panel_of(row) == (task, "line", regime)]
            for row in sorted(here, key=lambda row: (row["method"] not in NAMED, row["error"])):
                if row["method"] not in FREE | TARGETED:
                    continue
                colour = GREY if row["method"] in FREE else BLUE if row["method"] in OWN else ORANGE
                hollow = (row["bypassed"] or 0.0) >= 0.25
                axis.errorbar(
                    row["error"], row[column], xerr=row["error_spread"], yerr=row[f"{column}_spread"], fmt="o", ms=4,
                    color=colour, mfc="white" if hollow else colour, elinewidth=0.5,
                )  # fmt: skip
                axis.annotate(row["method"], (row["error"], row[column]), fontsize=6, xytext=(3, 2),
                              textcoords="offset points")  # fmt: skip
            axis.set_xscale("log")
            axis.set_xlabel("tracking error (nats)")
            axis.set_ylabel(label[column])
            axis.set_title(regime, fontsize=9)
    kinds = (("this project's", BLUE), ("published, seeks a target", ORANGE), ("seeks none", GREY))
    handles = [Line2D([], [], marker="o", ls="", color=colour, label=name) for name, colour in kinds]
    axes[0, 0].legend(handles=handles, fontsize=7, loc="best")
    figure.draw_without_rendering()  # only then is it known where the points stand
    for axis in axes.flat:
        _place_names(name for name in axis.texts if isinstance(name, Annotation))
    figure.savefig(path, dpi=110)


def _place_names(names: Iterable[Annotation]) -> None:
    """Each name to the first place by its point where it covers no name before it; hidden if there is none."""
    sides = (("left", 3, 2), ("left", 3, -8), ("right", -3, 2), ("right", -3, -8), ("center", 0, 6))
    placed: list[Bbox] = []
    for name in names:
        for side, x, y in sides:
            name.set(horizontalalignment=side, position=(x, y))
            box = name.get_window_extent()
            if not box.count_overlaps(placed):
                placed.append(box)
                break
        else:
            name.set_visible(False)


def plot_failure(runs: dict[str, Run], regime: str, path: Path) -> None:
    """Of the target that is too high, a column a method of the first seed, after that seed's uncontrolled run: entropy
    and target, accuracy, and the rollouts that contribute with a negative advantage (arXiv 2604.26326, Fig. 7); a
    line where control let go."""
    here = [run for run in runs.values() if panel_of(run) == ("sums", "too_high", regime)]
    if not here:
        return
    first = min(run["seed"] for run in here)
    chosen = sorted((run for run in here if run["seed"] == first), key=lambda run: list(TARGETED).index(run["method"]))
    free = runs.get(Case("none", "line", regime, first).name)
    chosen = [*([] if free is None else [free]), *chosen]
    figure = Figure(figsize=(2.6 * len(chosen), 6), layout="constrained")
    axes = figure.subplots(3, len(chosen), squeeze=False, sharex=True, sharey="row")
    for column, run in zip(axes.T, chosen, strict=True):
        for axis, name in zip(column, ("entropy", "reward", "negatives"), strict=True):
            axis.plot([math.nan if value is None else value for value in run[name]], color=BLUE, lw=1)
            if run.get("released_at") is not None:
                axis.axvline(run["released_at"], color=RED, lw=1, ls="--")
        if run["method"] != "none":
            column[0].plot(run["target"], color=GREY, lw=1)
        column[0].set_title(run["method"], fontsize=9)
        column[2].set_xlabel("step")
    for axis, label in zip(axes[:, 0], ("entropy (nats)", "accuracy", "share of contributing negatives"), strict=True):
        axis.set_ylabel(label)
    figure.savefig(path, dpi=110)
