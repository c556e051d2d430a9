r"""How often math_verify agrees with the gold answers of data sets, graded against themselves.

    python bench/grader_accuracy.py 'gsm8k_test.jsonl:pattern=####\s*(.+)$:solution=answer' \
        aime24.jsonl:solution=solution amc23.jsonl --out bench/results/grader_accuracy.json

A set is a JSONL file, with what is not usual about it: `answer`, the field of the gold; `pattern`, a regular expression
whose one group is the gold; `solution`, a field with a worked solution, which is graded too. Each gold is written in
the ways a model writes it and must be right; the gold's neighbours in value, and the next problem's gold where it
differs, must be wrong. What went wrong is listed, then a line of counts a set; the exit code is 1 if anything did. No
model is involved.
"""

import argparse
import hashlib
import json
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from fractions import Fraction
from importlib import metadata
from pathlib import Path
from typing import Any

from entrocraft.train.data import load_problems
from entrocraft.train.graders import math_verify


def number(text: str) -> Fraction | None:
    """The value of a plain number, or None."""
    try:
        return Fraction(text.replace(",", ""))
    except ValueError:
        return None


def right_forms(gold: str) -> Iterator[str]:
    """Completions that end in the gold."""
    yield rf"Therefore \boxed{{{gold}}}."
    yield rf"First \boxed{{17/3}}, but that was wrong. \[ \boxed{{{gold}}} \]"
    yield f"In 3 steps of 7 each.\n#### {gold}"
    value = number(gold)
    if value is None:
        return
    yield f"The answer is {gold}."
    yield rf"so we find $x = {gold}$"
    yield rf"\boxed{{\textbf{{(B)}}\ {gold}}}"
    yield rf"\boxed{{{gold}\text{{ cm}}}}"
    yield rf"\boxed{{\frac{{{2 * value.numerator}}}{{{2 * value.denominator}}}}}"
    if value.denominator == 1:
        yield rf"\boxed{{{value.numerator}}}"  # without leading zeros
        yield rf"\boxed{{{value.numerator}.0}}"
        yield rf"\boxed{{{value.numerator:,}}}"
        yield rf"\boxed{{{value.numerator:04d}}}"


def wrong_forms(gold: str, other: str) -> Iterator[str]:
    """Completions that do not end in the gold."""
    value = number(gold)
    if value is not None:
        yield from (rf"\boxed{{{value + 1}}}", rf"\boxed{{{gold}0.5}}", rf"\boxed{{{gold} \text{{ or }} {value + 1}}}")
        if value:
            yield rf"\boxed{{{-value}}}"
        if value != number(other):
            yield rf"It is not {gold}, it is \boxed{{{other}}}."
    yield "I cannot say."
    yield rf"\boxed{{{gold}"


def disagreements(golds: Sequence[str], solutions: Sequence[str | None]) -> Iterator[tuple[bool, str, str, object]]:
    """(whether it agrees, completion, gold, score) of everything that is graded."""
    for place, (gold, solution) in enumerate(zip(golds, solutions, strict=True)):
        right = [*right_forms(gold), *([solution] if solution is not None else [])]
        for completion in right:
            score = math_verify(completion, gold, "")
            yield score == 1.0, completion, gold, score
        for completion in wrong_forms(gold, golds[(place + 1) % len(golds)]):
            score = math_verify(completion, gold, "")
            yield score == 0.0, completion, gold, score


def parse(place: str) -> tuple[Path, dict[str, str]]:
    """File and options of a set."""
    path, *options = re.split(":(answer|pattern|solution)=", place)
    return Path(path), dict(zip(options[::2], options[1::2], strict=True))


def read(path: Path, options: dict[str, str]) -> tuple[list[str], list[str | None]]:
    """The golds of a set, and its worked solutions if it has any."""
    answer, solution = options.get("answer", "answer"), options.get("solution")
    rows = [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
    text = solution or next(name for name, value in rows[0].items() if isinstance(value, str))
    problems = load_problems(path, prompt_field=text, answer_field=answer, answer_pattern=options.get("pattern"))
    solutions = [problem.prompt if solution else None for problem in problems]
    return [problem.answer for problem in problems], solutions


def measure(place: str) -> dict[str, Any]:
    """Grades one set, lists what went wrong, and counts."""
    path, options = parse(place)
    golds, solutions = read(path, options)
    begun = time.perf_counter()
    graded = list(disagreements(golds, solutions))
    seconds = time.perf_counter() - begun
    wrong = [row for row in graded if not row[0]]
    for _, completion, gold, score in wrong:
        print(f"gold {gold!r}, score {score}: ...{completion[-100:]!r}")
    print(
        f"{path.name}: {len(golds)} problems, {len(graded)} completions graded, {len(wrong)} disagree, "
        f"{1e3 * seconds / len(graded):.1f} ms each"
    )
    return {
        "problems": len(golds),
        "solutions": sum(solution is not None for solution in solutions),
        "graded": len(graded),
        "disagree": len(wrong),
        "seconds": round(seconds, 1),
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
    }


def machine() -> dict[str, Any]:
    """Where and with what it was measured; a commit with + has changes that are in none."""

    def git(*words: str) -> str:
        root = Path(__file__).resolve().parent
        return subprocess.run(["git", *words], cwd=root, capture_output=True, text=True, timeout=60).stdout.strip()

    changed = "+" if git("status", "--porcelain", "--untracked-files=no") else ""
    facts = Path("/proc/cpuinfo")
    model = re.search(r"model name\s*:\s*(.+)", facts.read_text() if facts.exists() else "")
    names = ("math-verify", "latex2sympy2_extended", "sympy")
    return {
        "commit": git("rev-parse", "--short", "HEAD") + changed,
        "machine": f"{os.cpu_count()} cores of {model.group(1) if model else platform.machine()}",
        "versions": {"python": platform.python_version(), **{name: metadata.version(name) for name in names}},
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Grades the sets; 1 when something was misjudged, else 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sets", nargs="+", metavar="FILE[:NAME=VALUE...]", help="JSONL files of problems")
    parser.add_argument("--out", type=Path, help="JSON file to write counts, commit, machine and versions into")
    options = parser.parse_args(argv)
    where = machine()
    sets = {parse(place)[0].stem: measure(place) for place in options.sets}
    totals = {name: sum(found[name] for found in sets.values()) for name in ("graded", "disagree")}
    print(f"together: {totals['graded']} completions graded, {totals['disagree']} disagree")
    if options.out is not None:
        options.out.write_text(json.dumps({**where, **totals, "sets": sets}, indent=1) + "\n")
    return 1 if totals["disagree"] else 0


if __name__ == "__main__":
    sys.exit(main())
