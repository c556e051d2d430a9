"""Saved benchmarks, read: what pytest-benchmark, bench/compare_head_cpu.py and bench/suite_trl_step.py write."""

import json
import statistics
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One contender of one group."""

    group: str
    rival: str
    seconds: float
    """Median over its rounds."""
    info: dict[str, Any] = field(default_factory=dict)
    """What the benchmark recorded besides: errors, memory, rates."""


class Skip(NamedTuple):
    """A contender that was not measured."""

    rival: str
    reason: str
    group: str | None = None
    """Where it was left out; None: wherever it does not appear."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Saved:
    """A file of results."""

    path: Path
    machine: dict[str, Any]
    rows: list[Row]
    skipped: list[Skip] = field(default_factory=list)

    def groups(self) -> dict[str, list[Row]]:
        """Rows by group, in the order of the file."""
        found: dict[str, list[Row]] = {}
        for row in self.rows:
            found.setdefault(row.group, []).append(row)
        return found


WRITERS = (
    "expected a file written by `pytest bench --benchmark-json=FILE`, bench/compare_head_cpu.py --out or "
    "bench/suite_trl_step.py --out"
)


def load_results(path: Path) -> Saved:
    """Raises FileNotFoundError, and ValueError for a file that holds no benchmark or is not laid out like one, naming
    the file, what is wrong with it, and what writes one."""
    if path.is_dir():
        raise ValueError(f"{path} is a folder; {WRITERS}")
    try:
        report = json.loads(path.read_text())
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} does not exist; {WRITERS}") from None
    except UnicodeDecodeError:
        raise ValueError(f"{path} is no text; {WRITERS}") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error}; {WRITERS}") from None
    found: Saved | None = None
    try:
        if isinstance(report, dict) and "benchmarks" in report:
            found = _benchmarks(path, report)
        elif isinstance(report, dict) and "results" in report and "size" in report:
            found = _alone(path, report)
    except _LaidOutOtherwise as error:
        raise ValueError(f"{path}: {error}; {WRITERS}") from None
    if found is None or not found.rows:
        raise ValueError(f"{path} holds no benchmark; {WRITERS}")
    return found


class _LaidOutOtherwise(Exception):
    """What a file has and what was expected there."""


def _of_kind(value: Any, kind: type, where: str) -> Any:
    """The value, which must be a dict, list or number. bool is no number."""
    kinds = {dict: "an object", list: "a list", float: "a number"}
    if isinstance(value, (int, float) if kind is float else kind) and not isinstance(value, bool):
        return value
    told = "nothing" if value is None else json.dumps(value)
    raise _LaidOutOtherwise(f"{where} is {told[:40]}, expected {kinds[kind]}")


def _machine(report: dict[str, Any], key: str) -> dict[str, Any]:
    """What the file says of its machine; nothing where it says nothing."""
    machine = _of_kind(report.get(key, {}), dict, key)
    versions = _of_kind(machine.get("versions", {}), dict, f"{key}: versions")
    return {**machine, "versions": versions}


def _benchmarks(path: Path, report: dict[str, Any]) -> Saved:
    """A file of pytest-benchmark."""
    rows = []
    for number, one in enumerate(_of_kind(report["benchmarks"], list, "benchmarks")):
        where = f"benchmarks[{number}]"
        _of_kind(one, dict, where)
        info = _of_kind(one.get("extra_info", {}), dict, f"{where}: extra_info")
        stats = _of_kind(one.get("stats"), dict, f"{where}: stats")
        name = one.get("name") or where
        seconds = _of_kind(stats.get("median"), float, f"{where}: stats: median")
        rows.append(Row(group=one.get("group") or name, rival=info.get("rival", name), seconds=seconds, info=info))
    machine = _of_kind(report.get("machine_info", {}), dict, "machine_info")
    machine = _machine(machine, "entrocraft") if "entrocraft" in machine else machine
    left_out = _of_kind(report.get("skipped", []), list, "skipped")
    skipped = [_skip(one, f"skipped[{number}]") for number, one in enumerate(left_out)]
    return Saved(path=path, machine=machine, rows=rows, skipped=skipped)


def _skip(one: Any, where: str) -> Skip:
    _of_kind(one, dict, where)
    if not {"rival", "reason"} <= set(one) <= set(Skip._fields):
        raise _LaidOutOtherwise(f"{where} has {sorted(one)}, expected rival, reason and, where it matters, group")
    return Skip(**one)


def _alone(path: Path, report: dict[str, Any]) -> Saved:
    """bench/compare_head_cpu.py and bench/suite_trl_step.py: one group, each contender measured in its own process."""
    size = {key: value for key, value in _of_kind(report["size"], dict, "size").items() if key != "dtype"}
    rows, skipped = [], []
    for name, one in _of_kind(report["results"], dict, "results").items():
        where = f"results: {name}"
        if "seconds" not in _of_kind(one, dict, where):
            skipped.append(Skip(name, one.get("reason") or one.get("skipped") or "no reason was recorded"))
        else:
            taken = one["seconds"] if isinstance(one["seconds"], list) else [one["seconds"]]
            if not taken:
                raise _LaidOutOtherwise(f"{where}: seconds is [], expected those of a round at least")
            for seconds in taken:
                _of_kind(seconds, float, f"{where}: seconds")
            info = {"peak_bytes": one.get("transient_bytes", one.get("peak_bytes")), **size}
            info |= {key: one[key] for key in ("best_microbatch", "errors", "settings", "seconds_range") if key in one}
            info |= {"largest_batch": _batch(one)} if "largest_batch" in one else {}
            rows.append(Row(group=_words(size), rival=name, seconds=statistics.median(taken), info=info))
    machine = _machine(report, "machine")
    return Saved(path=path, machine={"device": machine.get("cpu"), **machine}, rows=rows, skipped=skipped)


def _batch(one: dict[str, Any]) -> str:
    """The largest batch, whether there may be a larger one, and in how much memory."""
    limit = one.get("limit_gb")
    least = ">= " if one.get("largest_batch_capped") else ""
    return f"{least}{one['largest_batch']:,}" + (f" in {limit:g} GB" if limit else "")


def _words(size: dict[str, Any]) -> str:
    return " ".join(f"{key}={value:,}" if isinstance(value, int) else str(value) for key, value in size.items())
