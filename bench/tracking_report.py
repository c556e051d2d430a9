"""Everything the entropy-tracking benchmark writes beside its runs."""

from __future__ import annotations

import json
from pathlib import Path

from tracking_cases import TASKS
from tracking_figures import plot_curves, plot_failure, plot_frontier
from tracking_runs import read_runs, summarise
from tracking_tables import (
    LEGEND,
    comparison,
    destroyed,
    frontier,
    markdown,
    paired,
    panels,
    repeated,
    starts,
    with_rloo,
)  # fmt: skip
from tracking_verdict import method_table


def write_report(out: Path) -> str:
    """Writes `summary.json`, `table.md`, `methods.md` and the figures beside `runs.jsonl`; returns the tables."""
    runs = read_runs(out / "runs.jsonl")
    table = summarise(runs.values())
    every = [*runs.values()]
    text = "\n".join(
        [LEGEND, _origin(every), markdown(table), frontier(table), paired(every), comparison(table), with_rloo(every),
         destroyed(every), repeated(every)]
    )  # fmt: skip
    (out / "summary.json").write_text(json.dumps(table, indent=1) + "\n")
    (out / "table.md").write_text(text)
    if (chosen := method_table(table)) is not None:
        (out / "methods.md").write_text(chosen)
    for panel in panels():
        name = "_".join(panel[panel[0] == "sums" :])
        plot_curves(runs, panel, out / f"curves_{name}.png")
    for regime in TASKS["sums"].regimes:
        plot_failure(runs, regime, out / f"failure_{regime}.png")
    for task in sorted({row["task"] for row in table.values()}):
        plot_frontier(table, task, out / ("frontier.png" if task == "sums" else f"frontier_{task}.png"))
    return text


def _origin(runs: list[dict]) -> str:
    """How many runs of which commits, and the seeds whose runs did not begin at one and the same model."""
    commits = sorted({str(run.get("commit"))[:8] for run in runs})
    apart = [f"{task} seed {seed} ({', '.join(f'{entropy:.4f}' for entropy in sorted(found))} nats)"
             for (task, seed), found in sorted(starts(runs).items()) if len(found) > 1]  # fmt: skip
    text = f"{len(runs)} runs of commit {', '.join(commits)}. "
    text += f"NOT one warm start: {'; '.join(apart)}" if apart else "All runs of a seed begin at the same model"
    return text + ".\n"
