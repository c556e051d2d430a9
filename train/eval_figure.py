"""The pass@k curve: how much a policy gains from more attempts."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from entrocraft.train.figures import BLUE, GREEN, GREY, ORANGE, PINK, SKY, STYLE

_COLOURS = (BLUE, ORANGE, GREEN, PINK, SKY, GREY)


def plot_pass_at_k(summaries: Mapping[str, Mapping[str, Any]], path: Path, *, title: str) -> None:
    """Draw pass@k over k, one line a set with its 95 % interval, into a PNG. `summaries` are those of `summarise`.

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
        axes.set_ylim(0, 1)
        axes.set_xlabel("k, attempts")
        axes.set_ylabel("pass@k")
        axes.set_title(title)
        axes.legend()
        figure.savefig(path)
