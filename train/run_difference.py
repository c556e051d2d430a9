"""What differs between two runs that should be the same: their records from some step on, and their last checkpoints.

Tensors are read from both checkpoints a little at a time, whole and without the model they belong to, so that the
comparison of a large run needs little memory and no GPU.
"""

import json
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import state_dict_loader
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from entrocraft.train.checkpoint import one_process
from entrocraft.train.checkpoint_files import STATE_FILE
from entrocraft.train.metrics import (
    EVALUATIONS_FILE,
    EVENTS_FILE,
    METRICS_FILE,
    SAMPLES_FILE,
    depends_on_the_clock,
    read_rows,
)
from entrocraft.train.random_states import KINDS

_AT_ONCE = 1 << 30  # bytes of tensors in memory for each of the two checkpoints


@dataclass(frozen=True, kw_only=True)
class Compared:
    """One line of the table: what was compared, and the first thing in it that was not the same."""

    what: str
    count: int
    """Numbers, texts or tensors that were looked at."""
    difference: str | None = None
    """The first difference, in the order of steps or names; None: there is none."""
    note: str = ""
    """What a reader should know besides: what was left out, and why."""


def compare_records(one: Path, other: Path, *, after: int) -> list[Compared]:
    """The rows of steps above `after` in every record of two runs; wall-clock times and memory are left out."""
    left_out: set[str] = set()
    lines = []
    for file in (METRICS_FILE, EVALUATIONS_FILE, SAMPLES_FILE, EVENTS_FILE):
        first, second = _rows(one, file, after, left_out), _rows(other, file, after, left_out)
        count = sum(map(len, first))
        lines.append(Compared(what=f"{file}, steps above {after}", count=count, difference=_difference(first, second)))
    if left_out:
        lines[0] = Compared(**vars(lines[0]) | {"note": f"without {', '.join(sorted(left_out))}"})
    return lines


def _rows(run: Path, file: str, after: int, left_out: set[str]) -> list[dict[str, Any]]:
    """The rows that must be the same in both runs; paths in them are made relative to the run."""
    rows = read_rows(run / file) if (run / file).is_file() else []
    kept = []
    for row in rows:
        if (row.get("step") or 0) > after:
            left_out |= {name for name in row if depends_on_the_clock(name)}
            text = {name: value for name, value in row.items() if not depends_on_the_clock(name)}
            kept.append({n: v.replace(str(run), "") if isinstance(v, str) else v for n, v in text.items()})
    return kept


def _difference(first: Sequence[Mapping[str, Any]], second: Sequence[Mapping[str, Any]]) -> str | None:
    for a, b in zip(first, second, strict=False):
        for name in [*a, *(name for name in b if name not in a)]:
            if name not in a or name not in b or a[name] != b[name]:
                at, missing = a.get("step", b.get("step")), "nothing"
                return f"step {at}, {name}: {_short(a.get(name, missing))} and {_short(b.get(name, missing))}"
    if len(first) != len(second):
        longer = max(first, second, key=len)
        step = longer[min(len(first), len(second))]["step"]
        return f"{len(first)} rows and {len(second)}; the first one too many is of step {step}"
    return None


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def compare_statistically(one: Path, other: Path, *, after: int, exact: Sequence[str]) -> list[Compared]:
    """For runs whose rollouts differ: the metrics named in `exact` must be equal in each step above `after`, and the
    mean of each other one over these steps within five standard errors of the other run's (Welch), which for steps that
    resemble each other is too much by chance once in a hundred thousand comparisons.
    """
    rows = [_rows(run, METRICS_FILE, after, set()) for run in (one, other)]
    named = [[{name: row[name] for name in ("step", *exact) if name in row} for row in run] for run in rows]
    names = [name for name in rows[0][0] if name not in ("step", *exact)] if rows[0] else []
    found, count = None, 0
    for name in names:
        values = [[row[name] for row in run if isinstance(row.get(name), int | float)] for run in rows]
        if min(map(len, values)) < 3:  # no spread to compare with
            continue
        count += 1
        means = [statistics.fmean(numbers) for numbers in values]
        error = math.sqrt(sum(statistics.variance(numbers) / len(numbers) for numbers in values))
        if abs(means[0] - means[1]) > 5 * error and found is None:
            found = f"{name}: mean {means[0]:.6g} and {means[1]:.6g}, {error:.2g} being one standard error"
    return [
        Compared(what=f"{', '.join(exact)}, each step", count=sum(map(len, named[0])), difference=_difference(*named)),
        Compared(what=f"means of metrics over steps above {after}", count=count, difference=found),
    ]


def compare_checkpoints(one: Path, other: Path) -> list[Compared]:
    """Two checkpoints, bit for bit: weights, optimizer, random state, and everything else that decides the next
    step."""
    states = [json.loads((folder / STATE_FILE).read_text()) for folder in (one, other)]
    count, differing = len(states[0]), _difference([{"step": states[0]["step"], **states[0]}], [states[1]])
    lines = [Compared(what="data cursor, controller and method", count=count, difference=differing)]
    groups = {"model": "weights", "optimizer": "optimizer"} | {f"{kind}_rng": f"random state, {kind}" for kind in KINDS}
    counts, first = dict.fromkeys(groups, 0), dict.fromkeys(groups, "")
    for name, a, b in _pairs(one, other):
        group = next(prefix for prefix in groups if name.startswith(prefix))
        counts[group] += 1
        if not first[group]:
            first[group] = _unequal(name, a, b) or ""
    return lines + [
        Compared(what=f"final {told}", count=counts[group], difference=first[group] or None)
        for group, told in groups.items()
        if counts[group]
    ]


def _pairs(one: Path, other: Path) -> Iterator[tuple[str, Any, Any]]:
    """Everything that is stored under a name, from both checkpoints; None from one that does not have it."""
    stored = [FileSystemReader(folder).read_metadata().state_dict_metadata for folder in (one, other)]
    names = sorted({*stored[0], *stored[1]})
    while names:
        batch, size = [], 0
        while names and size < _AT_ONCE:
            batch.append(names.pop(0))
            size += max(_bytes(metadata.get(batch[-1])) for metadata in stored)
        a, b = (_read(folder, metadata, batch) for folder, metadata in zip((one, other), stored, strict=True))
        yield from ((name, a.get(name), b.get(name)) for name in batch)


def _bytes(metadata: Any) -> int:
    if not isinstance(metadata, TensorStorageMetadata):
        return 0
    dtype = metadata.properties.dtype
    return math.prod(metadata.size) * dtype.itemsize


def _read(folder: Path, metadata: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for name in names:
        kind = metadata.get(name)
        if isinstance(kind, TensorStorageMetadata):
            values[name] = torch.empty(kind.size, dtype=kind.properties.dtype)
        elif kind is not None:
            values[name] = 0  # replaced by what is stored
    with one_process():
        state_dict_loader.load(values, checkpoint_id=folder, no_dist=True)
    return values


def _unequal(name: str, a: Any, b: Any) -> str | None:
    if not (isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor)):
        return None if a == b else f"{name}: {_short(a)} and {_short(b)}"
    if a.shape != b.shape or a.dtype != b.dtype:
        return f"{name}: {a.dtype} {tuple(a.shape)} and {b.dtype} {tuple(b.shape)}"
    bits = [tensor.contiguous().flatten().view(torch.uint8) for tensor in (a, b)]
    if torch.equal(*bits):
        return None
    apart = (a.double() - b.double()).abs()
    return f"{name}: {int((apart != 0).sum())} of {a.numel()} numbers differ, by up to {float(apart.max()):.3g}"
