"""Several runs on top of each other, drawn from the rows of their `metrics.jsonl`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from entrocraft.train.figures import (
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    PINK,
    SKY,
    STYLE,
    TARGET_COLOUR,
    Rows,
    add_samples_axis,
    column,
    draw_curve,
    start_at_zero,
)

_CYCLE = (ORANGE, BLUE, GREEN, PINK, SKY, "#333333")


def plot_arms(arms: Mapping[str, Rows], path: str | Path, title: str) -> None:
    """Draw several runs on top of each other into a PNG: entropy against target, reward, diversity, kept.

    Made to be read at a width of 900 pixels; the file has twice that. An arm called `none` is grey.

    Raises ValueError if there is no arm, or one without rows.
    """
    if not arms:
        raise ValueError("arms is empty: expected {name: rows of metrics.jsonl}")
    empty = [name for name, rows in arms.items() if not rows]
    if empty:
        raise ValueError(f"arms {empty} have no rows; run them first")
    colours = arm_colours(list(arms))
    side = _arm_panels(arms)
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(9.0, 4.9), layout="constrained")
        grid = figure.add_gridspec(max(1, len(side)), 2, width_ratios=[1.65, 1.0])
        main = figure.add_subplot(grid[:, 0])
        _draw_arm_entropies(main, arms, colours)
        for place, (key, heading) in enumerate(side):
            axes = figure.add_subplot(grid[place, 1], sharex=main)
            for name, rows in arms.items():
                draw_curve(axes, *column(rows, key), key, colours[name])
            axes.set_title(heading)
            start_at_zero(axes)
            axes.yaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 5, 10]))
            if place == len(side) - 1:
                axes.set_xlabel("step")
            else:
                axes.tick_params(labelbottom=False)
        add_samples_axis(main, next(iter(arms.values())), labelled=True)
        figure.suptitle(title, fontsize=12, fontweight="bold", x=0.01, ha="left")
        figure.get_layout_engine().set(h_pad=0.06, w_pad=0.08, wspace=0.03)  # type: ignore[union-attr]
        figure.savefig(path, dpi=200, facecolor="white")


def arm_colours(names: Sequence[str]) -> dict[str, str]:
    """A colour for each arm: grey for `none`, the palette in turn for the others."""
    others = [name for name in names if name != "none"]
    return {"none": GREY} | {name: _CYCLE[place % len(_CYCLE)] for place, name in enumerate(others)}


def _arm_panels(arms: Mapping[str, Rows]) -> list[tuple[str, str]]:
    """(metric, title) of the small panels: those that at least one arm can fill."""

    def known(name: str) -> bool:
        return any(len(column(rows, name)[0]) for rows in arms.values())

    score = ("accuracy", "Accuracy") if known("accuracy") else ("reward", "Reward")
    wanted = (
        score,
        ("eval_distinct_correct", "Distinct right answers"),
        ("kept_fraction", "Fraction of rollouts kept"),
    )
    return [panel for panel in wanted if known(panel[0])]


def _draw_arm_entropies(axes: Axes, arms: Mapping[str, Rows], colours: Mapping[str, str]) -> None:
    targets = {name: column(rows, "target") for name, rows in arms.items()}
    targets = {name: target for name, target in targets.items() if len(target[0])}
    shared = bool(targets) and all(_same_curve(target, next(iter(targets.values()))) for target in targets.values())
    for place, (name, (steps, values)) in enumerate(targets.items()):
        if shared and place:
            continue
        axes.plot(
            steps,
            values,
            color=TARGET_COLOUR if shared else colours[name],
            linestyle=(0, (5, 3)),
            linewidth=1.4,
            label="target" if shared else f"target of {name}",
            zorder=3,
        )
    for name, rows in arms.items():
        axes.plot(*column(rows, "entropy"), color=colours[name], linewidth=2.0, label=name)
    axes.set_title("Entropy of the policy")
    axes.set_ylabel("nats per token")
    axes.set_xlabel("step")
    start_at_zero(axes)
    axes.legend(loc="best", fontsize=10)


def _same_curve(one: tuple[np.ndarray, np.ndarray], other: tuple[np.ndarray, np.ndarray]) -> bool:
    steps = np.intersect1d(one[0], other[0])
    return bool(np.allclose(np.interp(steps, *one), np.interp(steps, *other), rtol=0.0, atol=1e-3))
