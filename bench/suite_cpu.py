"""Everything that documents quote of a CPU, measured again, and written into bench/results and into the documents.

    python bench/suite_cpu.py                            # on an idle machine
    python bench/suite_cpu.py --only head_cpu            # one of its parts
    python bench/suite_cpu.py --smallest --out DIR       # seconds; documents stay as they are

`--head-python` names an interpreter that has verl too, so that the comparison of the head has verl's row; without it,
that of `make test-verl` where it is there. A table that has lost a contender is not quoted. Files of pytest-benchmark
are kept without what does not matter to a reader.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from entrocraft.train.bench_figure import draw
from entrocraft.train.bench_file import Saved, load_results
from entrocraft.train.bench_table import as_markdown

BENCH = Path(__file__).resolve().parent
ROOT = BENCH.parent
QUOTED = {
    "head_cpu": ("README.md", "docs/benchmarks.md", "kernels/README.md"),
    "step_cpu": ("docs/benchmarks.md",),
}
SCALING = (
    "--device cpu --heads cpu --jobs both --data peaked --tokens 32 128 512 --vocab 4096 16384 65536 --bench-rounds 3 "
    "--rivals entrocraft entrocraft_cache eager_fp32 eager_bf16 trl_chunked liger_scaled_ce"
)


def commands(head_python: str, out: Path, *, smallest: bool) -> dict[str, list[str]]:
    """Name of a file of results -> what writes it."""

    def benchmarks(name: str, what: Path, options: str) -> list[str]:
        told = ["-q", "-rs", "--benchmark-columns=min,median,stddev,rounds", f"--benchmark-json={out / name}.json"]
        least = ["--bench-rounds", "1"] if smallest else []
        return [sys.executable, "-P", "-m", "pytest", str(what), *told, *options.split(), *least]

    head = ""
    step = "--head small --layers 2 --rollouts 16 --prompt 32 --response 128 --microbatch 4 8 16"
    step += " --rounds 5 --processes 3 --largest --limit-gb 4"
    suite, scaling, files = "--device cpu", SCALING, BENCH
    if smallest:
        head, step, files = "--T 8 --H 16 --V 64 --repeats 1", "--rounds 1", BENCH / "bench_rejection.py"
        scaling = SCALING.replace("32 128 512", "16 32").replace("4096 16384 65536", "64 128").replace(
            "--heads cpu", "--heads tiny").replace(" entrocraft_cache eager_fp32 eager_bf16", "")  # fmt: skip
    script = [head_python, str(BENCH / "compare_head_cpu.py"), "--out", str(out / "head_cpu.json")]
    update = [sys.executable, str(BENCH / "suite_trl_step.py"), "--device=cpu", "--out", str(out / "step_cpu.json")]
    return {
        "head_cpu": [*script, *head.split()],
        "step_cpu": [*update, *step.split()],
        "suite_cpu": benchmarks("suite_cpu", files, suite),
        "scaling_cpu": benchmarks("scaling_cpu", BENCH / "bench_linear_logprob.py", scaling),
    }


def slim(report: dict[str, Any]) -> dict[str, Any]:
    """A report of pytest-benchmark without every round, and without what it says of the machine beyond our own."""
    kept = ("min", "max", "median", "stddev", "rounds")
    rows = []
    for one in report["benchmarks"]:
        stats = {key: one["stats"][key] for key in kept}
        rows.append({"name": one["name"], "group": one["group"], "extra_info": one["extra_info"], "stats": stats})
    machine = {"entrocraft": report["machine_info"]["entrocraft"]}
    found = {"machine_info": machine, "datetime": report["datetime"], "benchmarks": rows}
    return found | {"skipped": report.get("skipped", [])}


def quote(text: str, table: str, name: str) -> str:
    """The document with this table, or tables, in the place of the one of the same size that it has, or of the comment
    `<!-- name -->` where nothing was measured yet. The notes below a table go with it.

    Raises:
        ValueError: it has neither, and the message has the table to put there; or its table has a contender that this
            one has lost.
    """
    if f"<!-- {name} -->" in text:
        return text.replace(f"<!-- {name} -->", table)
    first = table.partition("\n")[0].split("|")[1].strip()
    pattern = rf"^\| {re.escape(first)} \|.*?^Measured on [^\n]*(?:\n\n- \w+: [^\n]*(?:\n- \w+: [^\n]*)*)?"
    there = re.search(pattern, text, re.DOTALL | re.MULTILINE)
    if there is None:
        raise ValueError(f"no table begins with {first!r}; put this one where it belongs:\n\n{table}")
    lost = _contenders(there[0]) - _contenders(table)
    if lost:
        raise ValueError(
            f"the new table has lost {', '.join(sorted(lost))}: measure where it is installed (verl_torch: in the "
            ".venv-verl of `make test-verl`, or with --head-python), or take its row out of the document"
        )
    return text[: there.start()] + table + text[there.end() :]


def _contenders(table: str) -> set[str]:
    """First cells of its rows."""
    return set(re.findall(r"^\| (\w+) \|", table, re.MULTILINE))


def scaling_sentence(saved: Saved) -> str:
    """How both of our modes stand to eager with fp32 logits at the sizes of the figure."""
    of_default, of_cache = [], []
    most = max(row.info["V"] for row in saved.rows)
    for rows in saved.groups().values():
        seconds = {row.rival: row.seconds for row in rows}
        of_default.append(seconds["entrocraft"] / seconds["eager_fp32"])
        if rows[0].info["V"] == most:
            of_cache.append(seconds["entrocraft_cache"] / seconds["eager_fp32"])
    default, cache = (f"{min(ratios):.2f} to {max(ratios):.2f} times" for ratios in (of_default, of_cache))
    than = "as long as eager with fp32 logits"
    return f"At these sizes the default takes {default} {than}, and the cache at V = {most:,} {cache}."


def write_down(name: str, out: Path, root: Path | None) -> None:
    """Slims the file, writes NAME.md, the figure of scaling, and, given the root, the documents that quote it."""
    path = out / f"{name}.json"
    report = json.loads(path.read_text())
    if "machine_info" in report:
        path.write_text(json.dumps(slim(report), indent=1) + "\n")
    saved = load_results(path)
    if name in ("suite_cpu", "scaling_cpu"):
        (out / f"{name}.md").write_text(as_markdown(saved) + "\n")
    if name == "scaling_cpu":
        draw([saved], out / "scaling_cpu.png")
    for document in QUOTED.get(name, ()) if root else ():
        assert root is not None
        place = root / document
        place.write_text(quote(place.read_text(), as_markdown(saved), name))
    if name == "scaling_cpu" and root:
        place, figure = root / "docs/benchmarks.md", "![Time and memory](../bench/results/scaling_cpu.png)"
        text = place.read_text().replace("<!-- scaling_cpu -->", figure)
        place.write_text(re.sub(r"^At these sizes the default .*$", scaling_sentence(saved), text, flags=re.MULTILINE))


def main(arguments: list[str] | None = None, run: Callable[..., Any] = subprocess.run) -> int:
    """Runs every part; 1 if one failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=BENCH / "results")
    parser.add_argument("--only", nargs="+", choices=["head_cpu", "step_cpu", "suite_cpu", "scaling_cpu"])
    parser.add_argument("--smallest", action="store_true", help="the least sizes, to see that it runs")
    verl = ROOT / ".venv-verl" / "bin" / "python"
    parser.add_argument("--head-python", default=str(verl) if verl.is_file() else sys.executable)
    given = parser.parse_args(arguments)
    given.out.mkdir(parents=True, exist_ok=True)
    failed = 0
    for name, command in commands(given.head_python, given.out.resolve(), smallest=given.smallest).items():
        if given.only and name not in given.only:
            continue
        started = time.monotonic()
        code = run(command).returncode
        print(f"{name}: {f'exit status {code}' if code else 'done'} ({time.monotonic() - started:.0f} s)", flush=True)
        failed += code != 0
        if code == 0:
            try:
                write_down(name, given.out, None if given.smallest else ROOT)
            except ValueError as error:
                print(f"{name}: not written into the documents: {error}", file=sys.stderr)
                failed += 1
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
