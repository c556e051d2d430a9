"""Time and memory of saved benchmarks against T and against V, the physical floor drawn in."""

from collections.abc import Callable, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from entrocraft.train.bench_file import Row, Saved

Series = dict[str, list[Row]]  # contender -> rows along an axis


def series(saved: Sequence[Saved]) -> dict[tuple[str, str], Series]:
    """(title, "T" or "V") -> contenders with more than one size along it, at the largest size of the other."""
    found: dict[tuple[str, str], Series] = {}
    for number, one in enumerate(saved):
        for row in one.rows:
            info = row.info
            if not {"T", "V"} <= set(info):
                continue
            for axis, other in (("T", "V"), ("V", "T")):
                title = (
                    f"{info.get('job', '')} {info.get('data', '')}, {info.get('head', '')} {other} = {info[other]:,}"
                )
                name = row.rival if number == 0 else f"{row.rival} (second file)"
                found.setdefault((title.strip(), axis), {}).setdefault(name, []).append(row)
    long = {key: {name: rows for name, rows in lines.items() if len(rows) > 1} for key, lines in found.items()}
    # Of a job's panels along an axis, that of the largest size.
    largest: dict[tuple[str, str], tuple[str, Series]] = {}
    for (title, axis), lines in long.items():
        if lines:
            job, _, other = title.partition(" = ")
            before = largest.get((job, axis))
            if before is None or _size(other) > _size(before[0].partition(" = ")[2]):
                largest[job, axis] = (title, lines)
    return {(title, axis): lines for (_, axis), (title, lines) in largest.items()}


def _size(text: str) -> int:
    return int(text.replace(",", ""))


def _lines(axes: Axes, axis: str, lines: Series, value: Callable[[Row], float | None], label: str) -> None:
    for name, rows in lines.items():
        points = sorted((row.info[axis], value(row)) for row in rows if value(row) is not None)
        if points:
            ours = name.startswith("entrocraft")
            axes.plot(*zip(*points, strict=True), marker="o", ms=3, lw=2 if ours else 1, label=name)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xlabel(axis)
    axes.set_ylabel(label)
    axes.grid(alpha=0.3)


def _total(row: Row) -> float | None:
    """MiB at the peak: operands, their gradients and what the call takes besides."""
    if row.info.get("peak_bytes") is None or "H" not in row.info:
        return None
    return (floor_bytes(row) + row.info["peak_bytes"]) / 2**20


def floor_bytes(row: Row) -> int:
    """hidden and weight in bf16, and their gradients: what every contender must hold."""
    return 2 * 2 * row.info["H"] * (row.info["T"] + row.info["V"])


def _floor(axes: Axes, axis: str, lines: Series, value: Callable[[Row], float | None]) -> None:
    points = sorted({(row.info[axis], value(row)) for rows in lines.values() for row in rows if value(row) is not None})
    if points:
        # Each contender recorded the machine's rate at its own time: the lowest of them is the floor of a size.
        least = {size: min(v for s, v in points if s == size and v is not None) for size, _ in points}
        axes.plot(list(least), list(least.values()), "k--", lw=1, label="floor")


def _bars(axes: Axes, saved: Sequence[Saved]) -> None:
    rows = [row for one in saved for row in one.rows]
    names = [f"{row.rival}\n{row.group}" for row in rows]
    axes.barh(range(len(rows)), [1e3 * row.seconds for row in rows], color="0.6")
    for place, row in enumerate(rows):
        if "floor_ms" in row.info:
            axes.plot([row.info["floor_ms"]] * 2, [place - 0.4, place + 0.4], "k--", lw=1)
    axes.set_yticks(range(len(rows)), names, fontsize=5)
    axes.set_xlabel("ms")
    axes.set_xscale("log")


def draw(saved: Sequence[Saved], path: Path) -> None:
    """Writes a PNG: two panels, time and memory, for each scaling that the files hold; bars where there is none."""
    panels = series(saved)
    if not panels:
        rows = sum(len(one.rows) for one in saved)
        figure = Figure(figsize=(8, 1.5 + 0.3 * rows), layout="constrained")
        _bars(figure.subplots(), saved)
    else:
        figure = Figure(figsize=(10, 3.6 * len(panels)), layout="constrained")
        grid = figure.subplots(len(panels), 2, squeeze=False)
        for (left, right), ((title, axis), lines) in zip(grid, panels.items(), strict=True):
            _lines(left, axis, lines, lambda row: 1e3 * row.seconds, "ms")
            _floor(left, axis, lines, lambda row: row.info.get("floor_ms"))
            _lines(right, axis, lines, _total, "peak MiB, operands included")
            _floor(right, axis, lines, lambda row: floor_bytes(row) / 2**20 if "H" in row.info else None)
            left.set_title(title, fontsize=8)
            left.legend(fontsize=6)
    figure.savefig(path, dpi=130)
