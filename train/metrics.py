"""The record of a run: `metrics.jsonl`, `events.jsonl`, TensorBoard scalars, evaluations and samples of text.

One JSON object a line, written and flushed at once, so that a killed run loses at most the line it was
writing, and synced to the disk before each checkpoint. JSON has no NaN; what is not finite is written as null
and read back as None.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TextIO

from entrocraft.train.durable_files import sync
from entrocraft.train.progress import Progress

__all__ = ["MetricsLog", "Progress", "read_evaluations", "read_events", "read_metrics", "read_samples"]

METRICS_FILE = "metrics.jsonl"
EVENTS_FILE = "events.jsonl"
EVALUATIONS_FILE = "evaluations.jsonl"
SAMPLES_FILE = "samples.jsonl"
TENSORBOARD_FOLDER = "tensorboard"


class Sink(Protocol):
    """Another place that takes metrics."""

    def log(self, step: int, row: Mapping[str, Any], /) -> None:
        """One step's row, as JSON can hold it."""
        ...

    def close(self) -> None:
        """No more will come."""
        ...


class MetricsLog:
    """Appends the metrics of each step, and events as they happen, to the files of one run.

    Args:
        run_dir: folder of the run; made if missing.
        resume_step: last step that counts. Lines of later steps are cut off, as is a torn last line, and
            TensorBoard hides its later points: those steps are about to be run again. 0 starts over. None is
            a new run.
        also: where each step's row goes besides; closed with this.

    Raises ValueError if `resume_step` is None and the folder already holds metrics, so that no record is
    mixed with another or lost unasked, or if a line other than the last cannot be read.
    """

    def __init__(self, run_dir: str | Path, *, resume_step: int | None, also: Sequence[Sink] = ()) -> None:
        self.run_dir = Path(run_dir)
        self._also = also
        if resume_step is not None and resume_step < 0:
            raise ValueError(f"resume_step={resume_step} must be 0 or more, or None for a new run")
        self.run_dir.mkdir(parents=True, exist_ok=True)
        metrics, events = self.run_dir / METRICS_FILE, self.run_dir / EVENTS_FILE
        if resume_step is None:
            if metrics.exists() and metrics.stat().st_size:
                raise ValueError(
                    f"{metrics} holds the metrics of an earlier run; resume it, choose another run_dir, "
                    "or pass resume_step=0 to write over it"
                )
        else:
            for name in (METRICS_FILE, EVENTS_FILE, EVALUATIONS_FILE, SAMPLES_FILE):
                _cut(self.run_dir / name, resume_step)
        self._last_step = -1 if resume_step is None else resume_step
        self._metrics: TextIO = metrics.open("a", encoding="utf-8")
        self._events: TextIO = events.open("a", encoding="utf-8")
        # A second of imports, needed only by the one process that writes.
        from torch.utils.tensorboard.writer import SummaryWriter

        self._tensorboard = SummaryWriter(
            str(self.run_dir / TENSORBOARD_FOLDER),
            purge_step=None if resume_step is None else resume_step + 1,
            flush_secs=10,
        )

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        """Record one step: numbers (also numpy's and one-element tensors), strings, or None.

        Steps must rise from call to call. Numbers go to TensorBoard too; strings to the JSON line only.
        Raises ValueError for a step that does not rise or a value that is none of these.
        """
        if step <= self._last_step:
            raise ValueError(f"step={step} must be above the last one recorded, {self._last_step}")
        row = {"step": step} | {name: _plain(name, value) for name, value in values.items() if name != "step"}
        self._last_step = step
        _append(self._metrics, row)
        for name, value in row.items():
            if name != "step" and isinstance(value, int | float):
                self._tensorboard.add_scalar(_tag(name), value, global_step=step)
        for sink in self._also:
            sink.log(step, row)

    def event(self, kind: str, **fields: Any) -> None:
        """Append something worth counting: a skipped step, dropped prompts, time-outs. Pass `step` if it has
        one: events of steps that are run again after a resume are cut off with them.
        """
        _append(self._events, {"kind": kind} | {name: _plain(name, value) for name, value in fields.items()})

    def rows(self, file: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Append rows, each with the `step` it belongs to, to a file of the run other than the metrics. What is not a
        finite number in them becomes null.
        """
        if rows:
            with (self.run_dir / file).open("a", encoding="utf-8") as opened:
                opened.writelines(json.dumps(finite(row), ensure_ascii=False) + "\n" for row in rows)

    def sync(self) -> None:
        """Returns when everything that was recorded is on the disk: before a checkpoint says that its steps are done,
        so that not even a power cut leaves a checkpoint without the lines before it."""
        for name in (METRICS_FILE, EVENTS_FILE, EVALUATIONS_FILE, SAMPLES_FILE):
            if (self.run_dir / name).exists():
                sync(self.run_dir / name)
        sync(self.run_dir)

    def close(self) -> None:
        """Flush and close all files. May be called twice."""
        self._metrics.close()
        self._events.close()
        self._tensorboard.close()
        also, self._also = self._also, ()
        for sink in also:
            sink.close()


def read_metrics(run_dir: str | Path) -> list[dict[str, Any]]:
    """The rows of `metrics.jsonl`, without a torn last line.

    Raises FileNotFoundError if there is no such run, and ValueError (`file:line`) if another line is broken.
    """
    path = Path(run_dir) / METRICS_FILE
    if not path.is_file():
        raise FileNotFoundError(f"no {METRICS_FILE} in {Path(run_dir)}: not the folder of a run, or none has begun")
    return read_rows(path)


def read_events(run_dir: str | Path) -> list[dict[str, Any]]:
    """The rows of `events.jsonl`; none if the run had no events."""
    path = Path(run_dir) / EVENTS_FILE
    return read_rows(path) if path.is_file() else []


def read_samples(run_dir: str | Path) -> list[dict[str, Any]]:
    """The rows of `samples.jsonl`; none if the run saved none."""
    path = Path(run_dir) / SAMPLES_FILE
    return read_rows(path) if path.is_file() else []


def depends_on_the_clock(name: str) -> bool:
    """Whether a metric tells of the machine (wall-clock time, speed, memory) and so differs between equal runs."""
    return not {"seconds", "second", "mfu", "tflops", "memory", "rss"}.isdisjoint(name.split("_"))


def read_evaluations(run_dir: str | Path) -> list[dict[str, Any]]:
    """The rows of `evaluations.jsonl`, one for each set at each evaluation; none if the run was never evaluated."""
    path = Path(run_dir) / EVALUATIONS_FILE
    return read_rows(path) if path.is_file() else []


def finite(value: Any) -> Any:
    """`value` with null for every float that is not finite, and text that UTF-8 can hold."""
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    if isinstance(value, str):  # half of a surrogate pair, as a byte-level model may write, is not UTF-8
        return value.encode("utf-8", "replace").decode("utf-8")
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _append(file: TextIO, row: dict[str, Any]) -> None:
    file.write(json.dumps(row, allow_nan=False) + "\n")
    file.flush()


def _plain(name: str, value: Any) -> Any:
    """`value` as JSON can hold it."""
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, bool | int):
        return int(value)
    if isinstance(value, list | tuple):
        return [_plain(name, item) for item in value]
    try:
        number = value.item() if hasattr(value, "item") else value
        number = int(number) if isinstance(number, int) else float(number)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"metric {name!r} is {value!r:.100} ({type(value).__name__}); expected a number, a string or None"
        ) from error
    return number if math.isfinite(number) else None


def _tag(name: str) -> str:
    """TensorBoard groups tags by what stands before the slash."""
    group, separator, rest = name.partition("_")
    return (
        f"{group}/{rest}"
        if separator and group in ("eval", "kept", "memory", "mfu", "reward", "seconds", "tflops")
        else name
    )


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of one file, without a torn last line. ValueError (`file:line`) if another line is broken."""
    lines = path.read_bytes().splitlines(keepends=True)
    rows: list[dict[str, Any]] = []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
        except ValueError as error:
            if number == len(lines):  # torn: the process was killed while it wrote
                break
            raise ValueError(f"{path}:{number}: not valid JSON: {error}") from error
        # A last line without its newline may be whole by luck ({"a": 1} of {"a": 1}\n), but a resumed run
        # would write its next line onto it, so it counts as torn.
        if number == len(lines) and not line.endswith(b"\n"):
            break
        if not isinstance(row, dict):
            raise ValueError(f"{path}:{number}: expected a JSON object, found {type(row).__name__}")
        rows.append(row)
    return rows


def _cut(path: Path, last_step: int) -> None:
    """Drop the lines of steps after `last_step` and a torn last line, in one atomic replacement."""
    if not path.is_file():
        return
    kept = [row for row in read_rows(path) if row.get("step") is None or row["step"] <= last_step]
    aside = path.with_name(path.name + ".partial")
    with aside.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in kept)
        file.flush()
        os.fsync(file.fileno())
    aside.replace(path)
