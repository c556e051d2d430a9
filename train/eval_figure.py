"""The curves of evaluations: pass@k over k, and mean@n over the training prompts of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, NullLocator

from entrocraft.train.figures import BLUE, GREEN, GREY, ORANGE, PINK, SKY, STYLE

_COLOURS = (BLUE, ORANGE, GREEN, PINK, SKY, GREY)


def plot_pass_at_k(summaries: Mapping[str, Mapping[str, Any]], path: Path, *, title: str) -> Figure:
    """Draw pass@k over k, one line a set with its 95 % interval, into a PNG; returns what is drawn. `summaries` are
    those of `summarise`.

    Raises ValueError for no set.
    """
    if not summaries:
        raise ValueError("summaries is empty: expected at least one set")
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(6.4, 4.0), dpi=150, layout="constrained")
        axes = figure.add_subplot()
        for number, (name, summary) in enumerate(summaries.items()):
            ks = sorted(int(key.removeprefix("pass_at_")) for key in summary if key.startswith("pass_at_"))
            colour = _COLOURS[number % len(_COLOURS)]
            values = [summary[f"pass_at_{k}"] for k in ks]
            axes.plot(ks, values, color=colour, marker="o", markersize=3, label=f"{name} ({summary['problems']})")
            bands = [summary["intervals"].get(f"pass_at_{k}") for k in ks]
            if all(band is not None for band in bands):
                low, high = zip(*bands, strict=True)
                axes.fill_between(ks, low, high, color=colour, alpha=0.15, linewidth=0)
        ticks = sorted(
            {int(key.removeprefix("pass_at_")) for s in summaries.values() for key in s if "pass_at_" in key}
        )
        axes.set_xscale("log", base=2)
        axes.set_xticks(ticks, [str(k) for k in ticks])
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_ylim(0, 1.03)
        axes.set_xlabel("k, attempts")
        axes.set_ylabel("pass@k")
        axes.set_title(title)
        axes.legend()
        figure.savefig(path)
    return figure


def plot_over_prompts(evaluations: Sequence[Mapping[str, Any]], path: Path) -> Figure:
    """Draw mean@n and pass@n over the prompts trained on, one panel a set, into a PNG; returns what is drawn.
    `evaluations` are the rows of `evaluations.jsonl`; intervals are 95 %.

    Raises ValueError for none.
    """
    sets = list(dict.fromkeys(str(row["set"]) for row in evaluations))
    if not sets:
        raise ValueError("evaluations is empty: expected at least one row")
    with mpl.rc_context(STYLE):
        rows = (len(sets) + 2) // 3
        figure = Figure(figsize=(10.0, 2.9 * rows), dpi=130, layout="constrained")
        panels = list(figure.subplots(rows, min(3, len(sets)), squeeze=False).flat)
        for axes, name in zip(panels, sets, strict=False):
            of = [row for row in evaluations if row["set"] == name]
            n = of[-1]["samples"]
            for key, label, colour in (("accuracy", f"mean@{n}", BLUE), (f"pass_at_{n}", f"pass@{n}", ORANGE)):
                points = [row for row in of if row.get(key) is not None]
                at = [row["prompts"] for row in points]
                axes.plot(at, [row[key] for row in points], color=colour, marker="o", markersize=3, label=label)
                bands = [row["intervals"].get(key) for row in points]
                if points and all(bands):
                    low, high = zip(*bands, strict=True)
                    axes.fill_between(at, low, high, color=colour, alpha=0.15, linewidth=0)
            axes.set_title(f"{name}, {of[-1]['problems']} problems")
            axes.set_ylim(0, 1.03)
            axes.set_xlabel("training prompts")
            axes.xaxis.set_major_formatter(EngFormatter(sep=""))
            axes.legend()
        for axes in panels[len(sets) :]:
            axes.set_visible(False)
        figure.savefig(path)
    return figure
