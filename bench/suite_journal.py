"""What a group of contenders has shown so far, on disk after each of its steps.

pytest-benchmark writes its JSON when everything is over. A process that is killed before (a segmentation fault, a limit
of time or memory) leaves FILE.partial.json beside it, which `entrocraft bench` reads like any other. It goes when all
went well.
"""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

SIZES = ("T", "H", "V")


def partial_path(target: Path) -> Path:
    """Where the rows of an unfinished run stand: head.json -> head.partial.json."""
    return target.with_suffix(".partial.json")


class Journal:
    """Rows of all groups of a process. Without a path it writes nothing."""

    def __init__(self) -> None:
        self.path: Path | None = None
        self.machine: dict[str, Any] = {}
        self._rows: dict[str, dict[str, Any]] = {}
        self._refused: dict[str, dict[str, str]] = {}
        self._test, self._info = ("", ""), {}

    def open(self, target: Path, machine: dict[str, Any]) -> None:
        """From here on to the file beside `target`."""
        self.path, self.machine = partial_path(target), machine
        self.path.unlink(missing_ok=True)  # another run's

    def begin(self, name: str, contender: str, info: dict[str, Any]) -> None:
        """The benchmark whose group is measured now: its name in the report, and which part of it is the contender."""
        before, _, after = name.rpartition(contender)
        self._test, self._info = (before, after), info

    def row(self, contender: str, seconds: list[float], info: dict[str, Any]) -> None:
        """A contender's rounds so far. Call `write` after the last of them."""
        name = self._name(contender)
        self._rows[name] = {
            "name": name,
            "group": self._group(),
            "stats": {"median": statistics.median(seconds), "rounds": len(seconds)},
            "extra_info": {"rival": contender, **self._info, **info},
        }

    def refuse(self, contender: str, reason: str) -> None:
        """Why one has no row."""
        self._rows.pop(self._name(contender), None)
        self._refused[self._name(contender)] = {"rival": contender, "group": self._group(), "reason": reason}

    def _name(self, contender: str) -> str:
        before, after = self._test
        return f"{before}{contender}{after}"

    def _group(self) -> str:
        before, _ = self._test
        return f"{before.partition('[')[2].rstrip('-').replace('-', ' ') or before.rstrip('[-')} (cut off)"

    def write(self) -> None:
        """All rows, in one step, so that nobody reads half a file."""
        if self.path is None:
            return
        report = {
            "machine_info": {"entrocraft": self.machine},
            "benchmarks": list(self._rows.values()),
            "skipped": list(self._refused.values()),
        }
        draft = self.path.with_suffix(".tmp")
        draft.write_text(json.dumps(report, indent=1) + "\n")
        draft.replace(self.path)

    def close(self, *, whole: bool) -> None:
        """The end of the process; whole: the report has all that stands here."""
        if self.path is not None and whole:
            self.path.unlink(missing_ok=True)


JOURNAL = Journal()


def recover(target: Path) -> None:
    """Puts what a process that did not end well left beside its report, and the report lacks, into the report."""
    partial = partial_path(target)
    if not partial.is_file():
        return
    found = json.loads(partial.read_text())
    try:
        report = json.loads(target.read_text())
    except (FileNotFoundError, json.JSONDecodeError):  # killed before it was written, or while it was
        report = found
    there = {one["name"] for one in report["benchmarks"]}
    report["benchmarks"] += [one for one in found["benchmarks"] if one["name"] not in there]
    known = report.setdefault("skipped", [])
    known += [one for one in found["skipped"] if one not in known]
    target.write_text(json.dumps(report, indent=1) + "\n")
    partial.unlink()


def group_info(params: dict[str, Any]) -> dict[str, Any]:
    """What the parameters of a benchmark say of its group: sizes, head, job and data."""
    shape = params.get("shape")
    found = dict(zip(SIZES, shape, strict=True)) if shape is not None else {}
    named = {"head": "head", "job_name": "job", "data": "data"}
    return found | {name: params[key] for key, name in named.items() if key in params}
