"""The curves of one run, drawn from the rows of `metrics.jsonl`, and what all our figures share.

Matplotlib's object interface is used throughout, never pyplot: no global state, no display, no window.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

Rows = Sequence[Mapping[str, Any]]

STYLE: dict[Any, Any] = {
    "font.size": 9.0,
    "axes.titlesize": 10.0,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.edgecolor": "#999999",
    "axes.labelcolor": "#444444",
    "axes.grid": True,
    "grid.color": "#e8e8e8",
    "grid.linewidth": 0.8,
    "axes.axisbelow": True,
    "xtick.color": "#666666",
    "ytick.color": "#666666",
    "legend.frameon": False,
    "legend.fontsize": 8.0,
    "lines.linewidth": 1.6,
    "lines.solid_capstyle": "round",
}
# Okabe and Ito's palette, which readers who see few colours can tell apart; its yellow is too pale for lines.
BLUE, ORANGE, GREEN, PINK, SKY, GREY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#8A8A8A"
TARGET_COLOUR = "#222222"


@dataclass(frozen=True, slots=True, kw_only=True)
class Panel:
    """One set of axes: which metrics, under which names."""

    title: str
    unit: str
    lines: tuple[tuple[str, str], ...]
    """(metric, label) pairs; metrics that a run does not have are left out, and so is a panel without any."""
    from_zero: bool = True
    shifted: tuple[str, ...] = ()
    """Metrics that speak of the step after theirs, drawn there."""


RUN_PANELS = (
    Panel(
        title="Reward",
        unit="mean",
        lines=(("reward", "reward"), ("accuracy", "accuracy"), ("eval_accuracy", "held out")),
    ),
    Panel(
        title="Kept",
        unit="fraction",
        lines=(
            ("kept_fraction", "rollouts"),
            ("kept_token_fraction", "tokens"),
            ("kept_fraction_positive", "advantage > 0"),
            ("kept_fraction_negative", "advantage < 0"),
            ("active_fraction_negative", "of all, teach by advantage < 0"),
        ),
    ),
    Panel(title="Chance of being kept", unit="mean", lines=(("acceptance_mean", "all rollouts"),)),
    Panel(
        title="Change of entropy in a step",
        unit="nats",
        lines=(("realised_change", "realised"), ("predicted_change", "predicted before it")),
        from_zero=False,
        shifted=("predicted_change",),
    ),
    Panel(title="Distinct right answers, held out", unit="per prompt", lines=(("eval_distinct_correct", "mean"),)),
    Panel(
        title="Clipped tokens",
        unit="fraction",
        lines=(("clip_fraction_low", "lower clip"), ("clip_fraction_high", "upper clip")),
    ),
    Panel(
        title="Clipped tokens of each sign",
        unit="fraction",
        lines=(
            ("clip_fraction_low_positive", "lower, advantage > 0"),
            ("clip_fraction_low_negative", "lower, < 0"),
            ("clip_fraction_high_positive", "upper, > 0"),
            ("clip_fraction_high_negative", "upper, < 0"),
        ),
    ),
    Panel(title="Gain: realised over predicted change", unit="ratio", lines=(("gain", "gain"),)),
    Panel(
        title="Response length",
        unit="tokens",
        lines=(
            ("response_length", "mean"),
            ("response_length_right", "right"),
            ("response_length_wrong", "wrong"),
        ),
    ),
    Panel(title="Truncated responses", unit="fraction", lines=(("truncated_fraction", "truncated"),)),
    Panel(title="Groups of equal reward", unit="groups", lines=(("zero_variance_groups", "groups"),)),
    Panel(
        title="Throughput",
        unit="tokens / s",
        lines=(
            ("tokens_per_second", "whole step"),
            ("tokens_per_second_sample", "sample"),
            ("tokens_per_second_score", "score"),
            ("tokens_per_second_update", "update"),
        ),
    ),
    Panel(
        title="Model FLOPs utilisation",
        unit="fraction of peak",
        lines=(("mfu_sample", "sample"), ("mfu_score", "score"), ("mfu_update", "update")),
    ),
    Panel(
        title="Memory",
        unit="GB",
        lines=(("memory_sample", "sample"), ("memory_score", "score"), ("memory_update", "update")),
    ),
    Panel(
        title="Time of a step",
        unit="s",
        lines=(
            ("seconds", "whole step"),
            ("seconds_sample", "sample"),
            ("seconds_score", "score"),
            ("seconds_update", "update"),
        ),
    ),
    Panel(title="Gradient norm, before clipping", unit="norm", lines=(("grad_norm", "norm"),)),
    Panel(title="Divergence of the old policy from the new", unit="nats per token", lines=(("kl", "KL"),)),
)


def column(rows: Rows, name: str) -> tuple[np.ndarray, np.ndarray]:
    """(steps, values) of a metric, in rows where it is a finite number."""
    found = [
        (row["step"], row[name])
        for row in rows
        if isinstance(row.get(name), int | float) and math.isfinite(row[name]) and "step" in row
    ]
    steps, values = zip(*found, strict=True) if found else ((), ())
    return np.asarray(steps, dtype=float), np.asarray(values, dtype=float)


def moving_average(values: np.ndarray, window: int) -> np.ndarray:
    """Centred mean over `window` values, over fewer at the ends."""
    if window <= 1:
        return values
    total = np.concatenate(([0.0], np.cumsum(values)))
    places = np.arange(len(values))
    first = np.maximum(places - window // 2, 0)
    last = np.minimum(places + (window + 1) // 2, len(values))
    return (total[last] - total[first]) / (last - first)


def plot_run(rows: Rows, path: str | Path) -> None:
    """Draw every curve of one run into a PNG: the entropy with its target on top, panels in pairs below.

    Steps are on the lower axes, training samples on the upper.
    """
    panels = [panel for panel in RUN_PANELS if any(len(column(rows, name)[0]) for name, _ in panel.lines)]
    below = math.ceil(len(panels) / 2)
    heights = [2.2] + [1.45] * below
    # Laid out by hand, in inches: matplotlib's constrained layout triples the time for so many axes. The title
    # is placed by hand too, above the upper axis.
    gap, foot = 0.95, 0.55
    height = sum(heights) + gap * len(heights) + foot
    style: dict[Any, Any] = STYLE | {"axes.titley": 1.0, "axes.titlepad": 22.0}
    with mpl.rc_context(style):
        figure = Figure(figsize=(11, height))
        grid = figure.add_gridspec(
            1 + below,
            2,
            height_ratios=heights,
            hspace=gap * len(heights) / sum(heights),
            wspace=0.2,
            left=0.075,
            right=0.985,
            top=1 - gap / height,
            bottom=foot / height,
        )
        top = figure.add_subplot(grid[0, :])
        _draw_entropy(top, rows)
        add_samples_axis(top, rows, labelled=True)
        for place, panel in enumerate(panels):
            axes = figure.add_subplot(grid[1 + place // 2, place % 2], sharex=top)
            _draw_panel(axes, panel, rows)
            axes.set_xlabel("step" if place >= len(panels) - 2 else "")
            add_samples_axis(axes, rows, labelled=False)
        figure.savefig(path, dpi=140, facecolor="white")


def _draw_entropy(axes: Axes, rows: Rows) -> None:
    steps, low = column(rows, "band_low")
    _, high = column(rows, "band_high")
    if len(low) and len(low) == len(high):
        axes.fill_between(steps, low, high, color=BLUE, alpha=0.13, linewidth=0, label="band")
    axes.plot(*column(rows, "target"), color=TARGET_COLOUR, linestyle=(0, (5, 3)), linewidth=1.3, label="target")
    steps, entropy = column(rows, "entropy")
    axes.plot(steps, entropy, color=BLUE, linewidth=2.0, label="measured", marker="o" if len(steps) == 1 else None)
    steps, bypassed = column(rows, "bypassed")
    marks = steps[bypassed > 0]
    if len(marks) and len(entropy):
        axes.plot(marks, np.interp(marks, *column(rows, "entropy")), "o", ms=3, color=ORANGE, label="control bypassed")
    axes.set_title("Entropy")
    axes.set_ylabel("nats per token")
    axes.set_xlabel("step")
    start_at_zero(axes)
    _legend_above(axes)


def _draw_panel(axes: Axes, panel: Panel, rows: Rows) -> None:
    for (name, label), colour in zip(panel.lines, (BLUE, ORANGE, GREEN, PINK), strict=False):
        steps, values = column(rows, name)
        if not len(steps):
            continue
        draw_curve(axes, steps + (name in panel.shifted), values, name, colour, label)
    axes.set_title(panel.title)
    axes.set_ylabel(panel.unit)
    if panel.from_zero:
        start_at_zero(axes)
    else:
        axes.axhline(0.0, color="#bbbbbb", linewidth=0.8)
    if len(axes.get_legend_handles_labels()[1]) > 1:
        _legend_above(axes)


def draw_curve(axes: Axes, steps: np.ndarray, values: np.ndarray, name: str, colour: str, label: str = "") -> None:
    """Evaluations as points; what is measured at every step as a faint line under its moving average."""
    if name.startswith("eval_") or len(steps) == 1:
        axes.plot(steps, values, color=colour, label=label, marker="o", ms=3.5)
        return
    axes.plot(steps, values, color=colour, linewidth=0.8, alpha=0.3)
    axes.plot(steps, moving_average(values, len(values) // 20), color=colour, label=label)


def start_at_zero(axes: Axes) -> None:
    top = axes.dataLim.y1
    axes.set_ylim(0.0, top * 1.06 if math.isfinite(top) and top > 0 else 1.0)


def _legend_above(axes: Axes) -> None:
    """On the line of the title, to its right, where it covers no curve."""
    handles, labels = axes.get_legend_handles_labels()
    axes.legend(
        handles,
        labels,
        ncols=len(labels),
        loc="lower right",
        bbox_to_anchor=(1.01, 1.0),
        borderaxespad=1.9,  # in units of the font size: clear of the upper axis
        handlelength=1.4,
        columnspacing=1.1,
    )


def add_samples_axis(axes: Axes, rows: Rows, *, labelled: bool) -> None:
    """A second x-axis on top that counts training samples. Left out if the run did not record them."""
    steps, samples = column(rows, "samples")
    if len(steps) < 2 or np.any(np.diff(samples) <= 0):
        return
    # Extrapolated at both ends, since the axis reaches a little past the data.
    steps = np.concatenate(([2 * steps[0] - steps[1]], steps, [2 * steps[-1] - steps[-2]]))
    samples = np.concatenate(([2 * samples[0] - samples[1]], samples, [2 * samples[-1] - samples[-2]]))

    def to_samples(x: Any) -> Any:
        return _interpolate(x, steps, samples)

    def to_steps(x: Any) -> Any:
        return _interpolate(x, samples, steps)

    top = axes.secondary_xaxis("top", functions=(to_samples, to_steps))
    top.spines["top"].set_visible(False)
    top.tick_params(labelsize=7.5, length=2, colors="#999999")
    top.xaxis.set_major_formatter(lambda value, _: f"{value / 1000:g}k" if abs(value) >= 1000 else f"{value:g}")
    if labelled:
        top.set_xlabel("training samples", fontsize=8, color="#888888")


def _interpolate(x: Any, given: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Piecewise linear through the points, and on in a straight line beyond both ends."""
    x = np.asarray(x, dtype=float)
    slope_low = (wanted[1] - wanted[0]) / (given[1] - given[0])
    slope_high = (wanted[-1] - wanted[-2]) / (given[-1] - given[-2])
    inside = np.interp(x, given, wanted)
    low = wanted[0] + (x - given[0]) * slope_low
    high = wanted[-1] + (x - given[-1]) * slope_high
    return np.where(x < given[0], low, np.where(x > given[-1], high, inside))
