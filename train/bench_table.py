"""`entrocraft bench`: saved benchmarks as tables."""

import math
from collections.abc import Callable
from typing import Any

from entrocraft.train.bench_file import Row, Saved

BASELINES = ("eager_fp32", "eager", "eager_bf16", "trl", "none")  # what ratios are of: the first that is there
H100_BYTES_PER_S, H100_BYTES = 3.35e12, 80e9
MIB = 1 << 20


def baseline(rows: list[Row]) -> Row:
    """The row of a group that ratios are taken of."""
    by_name = {row.rival: row for row in rows}
    return next((by_name[name] for name in BASELINES if name in by_name), rows[0])


def floors(row: Row, machine: dict[str, Any]) -> dict[str, float]:
    """Milliseconds that nobody can go below: on this machine, and for a GPU on an H100 with the same matrix rate."""
    found = {}
    if "floor_ms" in row.info:
        found["this machine"] = row.info["floor_ms"]
    if "capability" in machine and {"useful_products", "T", "H", "V", "gemm_tflops"} <= set(row.info):
        operations = row.info["useful_products"] * 2 * row.info["T"] * row.info["H"] * row.info["V"]
        operations = row.info.get("useful_operations", operations)  # of a whole model there are more
        moved = row.info.get("moved_bytes", 0)
        found["H100"] = max(1e-9 * operations / row.info["gemm_tflops"], 1e3 * moved / H100_BYTES_PER_S)
    return found


def fits_h100(row: Row) -> bool | None:
    """Whether operands, gradients and what stands beside them at the peak fit into 80 GB; None: not known."""
    if not {"T", "H", "V", "peak_bytes"} <= set(row.info):
        return None
    operands = 2 * row.info["H"] * (row.info["T"] + row.info["V"])
    return 2 * operands + row.info["peak_bytes"] <= H100_BYTES


def _short(value: float) -> str:
    """Three digits that count, and whole numbers above 100."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def milliseconds(row: Row) -> str:
    """The median, as a table has it."""
    return _short(1e3 * row.seconds)


def mebibytes(row: Row) -> str:
    """The peak; empty where it was not measured."""
    size = row.info.get("peak_bytes")
    return "" if size is None else _short(size / MIB)


def quotient(value: float | None, base: float | None) -> str:
    """Empty where one of the two is not known."""
    return f"{value / base:.3g}" if value is not None and base else ""


def _number(key: str, text: Callable[[Any], str]) -> Callable[[Row, Row], str]:
    def cell(row: Row, base: Row) -> str:
        value = row.info.get(key, row.info.get("errors", {}).get(key))
        return "" if value is None or (isinstance(value, float) and math.isnan(value)) else text(value)

    return cell


def _error(key: str) -> Callable[[Row, Row], str]:
    """Of `errors` alone: a row may have a loss of the same name."""

    def cell(row: Row, base: Row) -> str:
        value = row.info.get("errors", {}).get(key)
        return "" if value is None else f"{value:.1e}"

    return cell


COLUMNS: dict[str, Callable[[Row, Row], str]] = {
    "ms": lambda row, base: milliseconds(row),
    "range": _number("seconds_range", lambda ends: " to ".join(_short(1e3 * one) for one in ends)),
    "ratio": lambda row, base: quotient(row.seconds, base.seconds),
    "cold ms": _number("cold_ms", _short),
    "MiB": lambda row, base: mebibytes(row),
    "ratio of MiB": lambda row, base: quotient(row.info.get("peak_bytes"), base.info.get("peak_bytes")),
    "useful TFLOP/s": _number("useful_tflops", "{:.3g}".format),
    "executed": _number("executed_tflops", "{:.3g}".format),
    "of GEMM": _number("share_of_gemm", "{:.0%}".format),
    "GB/s": _number("gbs", "{:.3g}".format),
    "log p error": _number("logprob_mean", "{:.1e}".format),
    "log p max": _number("logprob_max", "{:.1e}".format),
    "H error": _number("entropy_mean", "{:.1e}".format),
    "H max": _number("entropy_max", "{:.1e}".format),
    "dX error": _number("hidden_grad", "{:.1e}".format),
    "dW error": _number("weight_grad", "{:.1e}".format),
    "dZ error": _number("logits_grad", "{:.1e}".format),
    "loss error": _error("loss"),
    "norm error": _error("grad_norm"),
    "same bits": _number("repeats", lambda same: "yes" if same else "no"),
    "micro-batch": _number("best_microbatch", str),
    "largest batch": _number("largest_batch", str),
}


def cells(rows: list[Row]) -> list[list[str]]:
    """A head line and a line a contender, fastest first; a column that nobody fills is left out."""
    base = baseline(rows)
    ordered = sorted(rows, key=lambda row: row.seconds)
    made = {name: [cell(row, base) for row in ordered] for name, cell in COLUMNS.items()}
    kept = {name: column for name, column in made.items() if any(column)}
    return [
        ["", *kept],
        *([row.rival, *line] for row, line in zip(ordered, zip(*kept.values(), strict=True), strict=True)),
    ]


def _below(rows: list[Row], machine: dict[str, Any]) -> str:
    """Floors, and who does not fit an H100."""
    texts = [f"{name} {ms:.3g} ms" for name, ms in floors(rows[0], machine).items()]
    line = f"Floor: {', '.join(texts)}." if texts else ""
    fits = {row.rival: fits_h100(row) for row in rows if "capability" in machine}
    for word, wanted in (("Would fit into 80 GB", True), ("Would not", False)):
        names = [name for name, fit in fits.items() if fit is wanted]
        line += f" {word}: {', '.join(names)}." if names else ""
    return line


def _notes(saved: Saved) -> str:
    """What each contender was asked for, and why others were not measured, in a line each."""
    found = {f"{row.rival}: {row.info['settings']}": None for row in saved.rows if "settings" in row.info}
    for skip in saved.skipped:
        where = f" ({skip.group})" if skip.group else ""
        found[f"{skip.rival}: not measured{where}, {skip.reason}"] = None
    return "\n".join(f"- {line}" for line in found)


def about(saved: Saved) -> str:
    """Machine, commit and versions, in a line."""
    machine = saved.machine
    versions = ", ".join(f"{name} {version}" for name, version in machine.get("versions", {}).items())
    where = [str(machine.get("device") or "an unknown device")]
    where += [f"{machine[key]} {key}" for key in ("cores", "threads") if machine.get(key)]
    return f"{', '.join(where)}; commit {machine.get('commit') or 'unknown'}; {versions or 'versions unknown'}"


def aligned(lines: list[list[str]], left: int) -> list[str]:
    """Columns of one width, the first `left` of them flush left."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    sides = [str.ljust if i < left else str.rjust for i in range(len(widths))]
    rows = [zip(sides, line, widths, strict=True) for line in lines]
    return ["  ".join(side(cell, width) for side, cell, width in row).rstrip() for row in rows]


def as_text(saved: Saved) -> str:
    """Every group as aligned columns."""
    parts = [about(saved)]
    for group, rows in saved.groups().items():
        parts.append("\n".join([group, *aligned(cells(rows), 1), _below(rows, saved.machine)]).rstrip())
    return "\n\n".join([*parts, _notes(saved)]).rstrip()


def as_markdown(saved: Saved) -> str:
    """Every group as a Markdown table, with what it was measured on."""
    parts = []
    for group, rows in saved.groups().items():
        lines = cells(rows)
        lines[0][0] = group
        table = ["| " + " | ".join(line) + " |" for line in lines]
        table.insert(1, "|---" * len(lines[0]) + "|")
        below = _below(rows, saved.machine)
        parts.append("\n".join(table) + (f"\n\n{below}" if below else ""))
    return "\n\n".join([*parts, f"Measured on {about(saved)}.", _notes(saved)]).rstrip()
