"""Writes what a run did, or several, as one page that needs nothing else: no network, no other file.

`write_report` makes `report.html` and `curves.png` of one run, `compare_runs` makes `compare.html` and
`compare.png` of several.
"""

from __future__ import annotations

import base64
import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2

from entrocraft.train.arms_figure import plot_arms
from entrocraft.train.eval_figure import plot_over_prompts
from entrocraft.train.figures import Rows, column, plot_run
from entrocraft.train.metrics import METRICS_FILE, read_evaluations, read_events, read_metrics, read_samples
from entrocraft.train.report_page import COMPARE_PAGE, REPORT_PAGE

__all__ = ["compare_runs", "plot_arms", "summarise", "write_report"]

CONFIG_FILE = "config.yaml"

_DECISIONS = 12
"""Last decisions of the controller shown on the page."""
_EVENTS = 20
"""Last events shown on the page; all are counted."""
_SAMPLES = 12
"""Last saved rollouts shown on the page, of training and of evaluation each."""
_SAMPLE_LENGTH = 1_500
"""Characters of a prompt or response shown; `samples.jsonl` has all of it."""
_HIDDEN = ("step", "reason")
"""Columns of metrics.jsonl that the table of final numbers leaves out."""


def write_report(run_dir: str | Path) -> Path:
    """Write `report.html` and `curves.png` into the folder of a run, finished or not; returns the page's path.

    Raises FileNotFoundError if there is no such run, ValueError if it has not finished a step.
    """
    run_dir = Path(run_dir)
    rows = _rows(run_dir)
    events = read_events(run_dir)
    curves = run_dir / "curves.png"
    plot_run(rows, curves)
    config = run_dir / CONFIG_FILE
    page = _render(
        REPORT_PAGE,
        name=run_dir.absolute().name,
        summary=summarise(rows),
        picture=_data_uri(curves),
        metrics=_metric_table(rows),
        evaluations=_evaluation_table(rows),
        evaluation_picture=_evaluation_picture(run_dir),
        decisions=[row for row in rows if row.get("reason")][-_DECISIONS:][::-1],
        event_counts=Counter(str(event.get("kind")) for event in events).most_common(),
        events=events[-_EVENTS:][::-1],
        samples=_samples(run_dir),
        config=config.read_text(encoding="utf-8") if config.is_file() else None,
    )
    path = run_dir / "report.html"
    path.write_text(page, encoding="utf-8")
    return path


def compare_runs(dirs: Sequence[str | Path], out_dir: str | Path) -> Path:
    """Write `compare.html` and `compare.png` of several runs into `out_dir`; returns the page's path.

    A run is called by its folder's name; folders of the same name by as much of their path as tells them apart.

    Raises ValueError for fewer than two folders or the same one twice, and what `write_report` raises.
    """
    folders = [Path(folder).absolute() for folder in dirs]
    if len(folders) < 2:
        raise ValueError(f"dirs={[str(folder) for folder in dirs]}: expected the folders of at least two runs")
    if len(set(folders)) < len(folders):
        raise ValueError(f"dirs={[str(folder) for folder in dirs]} names a folder twice")
    arms = {name: _rows(folder) for name, folder in zip(_short_names(folders), folders, strict=True)}
    out_dir = Path(out_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    picture = out_dir / "compare.png"
    plot_arms(arms, picture, title="  |  ".join(arms) if len(arms) <= 4 else f"{len(arms)} runs")
    summaries = {name: summarise(rows) for name, rows in arms.items()}
    labels = list(dict.fromkeys(label for summary in summaries.values() for label in summary))
    page = _render(COMPARE_PAGE, arms=list(arms), labels=labels, summaries=summaries, picture=_data_uri(picture))
    path = out_dir / "compare.html"
    path.write_text(page, encoding="utf-8")
    return path


def summarise(rows: Rows) -> dict[str, float]:
    """The few numbers one looks at first, by name; those a run does not have are missing.

    "at the end" is the mean over the last tenth of the steps. The tracking error is the mean of
    |entropy - target| in nats over the steps after the first third, which are given to reach the target.
    """
    summary: dict[str, float] = {"steps": float(rows[-1]["step"])}
    _put(summary, "training samples", column(rows, "samples")[1][-1:])
    gaps = _gaps(rows)
    _put(summary, "tracking error (nats)", gaps[len(gaps) // 3 :])
    _put(summary, "entropy at the start", column(rows, "entropy")[1][:1])
    for label, name in (
        ("entropy at the end", "entropy"),
        ("target at the end", "target"),
        ("reward at the end", "reward"),
        ("accuracy at the end", "accuracy"),
    ):
        values = column(rows, name)[1]
        _put(summary, label, values[-max(1, len(values) // 10) :])
    for name in _evaluation_names(rows):
        _put(summary, f"{_spoken(name)} (last)", column(rows, name)[1][-1:])
    _put(summary, "kept fraction (mean)", column(rows, "kept_fraction")[1])
    for label, name in (
        ("steps bypassed", "bypassed"),
        ("steps released", "released"),
        ("steps skipped", "steps_skipped"),
        ("reward time-outs", "reward_timeouts"),
        ("reward errors", "reward_errors"),
        ("seconds", "seconds"),
    ):
        values = column(rows, name)[1]
        if len(values):
            summary[label] = float(values.sum())
    return summary


def _put(summary: dict[str, float], label: str, values: Any) -> None:
    if len(values):
        summary[label] = float(sum(values) / len(values))


def _gaps(rows: Rows) -> list[float]:
    def known(value: Any) -> bool:
        return isinstance(value, int | float) and math.isfinite(value)

    pairs = [(row.get("entropy"), row.get("target")) for row in rows]
    return [abs(h - t) for h, t in pairs if known(h) and known(t)]  # type: ignore[operator]


def _rows(run_dir: Path) -> list[dict[str, Any]]:
    if not run_dir.is_dir():
        raise FileNotFoundError(f"no run at {run_dir}: there is no such folder")
    rows = read_metrics(run_dir)
    if not rows:
        raise ValueError(f"{run_dir / METRICS_FILE} has no finished step yet; nothing to report")
    return rows


def _evaluation_names(rows: Rows) -> list[str]:
    return list(dict.fromkeys(name for row in rows for name in row if name.startswith("eval_")))


def _evaluation_table(rows: Rows) -> dict[str, Any] | None:
    every = _evaluation_names(rows)
    # Of several sets the page shows the means; the rest is in the metrics and in evaluations.jsonl.
    names = every if len(every) <= 12 else [name for name in every if name.endswith("accuracy") or "pass_at" in name]
    if not names:
        return None
    if any("prompts" in row for row in rows):
        names = ["prompts", *names]
    evaluated = [row for row in rows if any(row.get(name) is not None for name in every)]
    return {"names": names, "rows": [[row["step"], *(row.get(name) for name in names)] for row in evaluated]}


def _evaluation_picture(run_dir: Path) -> str | None:
    """The curves over training prompts, also written to `evaluations.png`; None before the second evaluation."""
    evaluations = read_evaluations(run_dir)
    if len({row["step"] for row in evaluations}) < 2:
        return None
    picture = run_dir / "evaluations.png"
    plot_over_prompts(evaluations, picture)
    return _data_uri(picture)


def _samples(run_dir: Path) -> list[dict[str, Any]]:
    """The newest saved rollouts, of training first, texts cut to a readable length."""
    rows = read_samples(run_dir)
    kinds = ("training", "evaluation")
    newest = [row for kind in kinds for row in [row for row in rows if row.get("kind") == kind][-_SAMPLES:]]
    return [row | {name: _cut(str(row.get(name, ""))) for name in ("prompt", "response")} for row in newest]


def _cut(text: str) -> str:
    half = _SAMPLE_LENGTH // 2
    return text if len(text) <= _SAMPLE_LENGTH else f"{text[:half]}\n[...]\n{text[-half:]}"


def _metric_table(rows: Rows) -> list[tuple[str, float, float, float, float, float]]:
    """(metric, first, last, mean of the last tenth, lowest, highest), in the order they were recorded."""
    names = dict.fromkeys(name for row in rows for name in row if name not in _HIDDEN)
    table = []
    for name in names:
        values = column(rows, name)[1]
        if len(values):
            tail = values[-max(1, len(values) // 10) :]
            table.append((name, values[0], values[-1], tail.mean(), values.min(), values.max()))
    return table


def _short_names(folders: Sequence[Path]) -> list[str]:
    depth = 1
    while True:
        names = ["/".join(folder.parts[-depth:]) for folder in folders]
        if len(set(names)) == len(names):
            return names
        depth += 1


def _data_uri(picture: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(picture.read_bytes()).decode("ascii")


def _spoken(name: str) -> str:
    return name.removeprefix("eval_").replace("_", " ")


def _shown(value: Any) -> str:
    """A number as one reads it: integers whole, others to four figures, nothing as a dash."""
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return "-"
    if isinstance(value, str):
        return value
    if float(value).is_integer() and abs(value) < 1e15:
        return f"{int(value):,}".replace(",", " ")
    return f"{value:.4g}"


def _render(page: str, **values: Any) -> str:
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    environment.filters["shown"] = _shown
    environment.filters["spoken"] = _spoken
    return environment.from_string(page).render(**values)
