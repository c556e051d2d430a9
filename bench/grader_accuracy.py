r"""How often math_verify agrees with the gold answers of a data set, graded against themselves.

    python bench/grader_accuracy.py gsm8k_test.jsonl --answer-pattern '####\s*(.+)$' --solution-field answer
    python bench/grader_accuracy.py aime24.jsonl --solution-field solution

Each gold is written in the ways a model writes it and must be right; the gold's neighbours in value, and the next
problem's gold where it differs, must be wrong. With `--solution-field` the reference solution itself is graded too.
What went wrong is listed, then one line of counts; the exit code is 1 if anything did. No model is involved.
"""

import argparse
import json
import sys
import time
from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path

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


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", type=Path, help="JSONL file of problems")
    parser.add_argument("--answer-field", default="answer")
    parser.add_argument("--answer-pattern", help="regular expression whose one group is the gold")
    parser.add_argument("--solution-field", help="field that holds a worked solution")
    options = parser.parse_args(argv)
    fields = {"prompt_field": options.answer_field, "answer_field": options.answer_field}
    if options.solution_field:
        fields["prompt_field"] = options.solution_field
        problems = load_problems(options.path, answer_pattern=options.answer_pattern, **fields)
        solutions: list[str | None] = [problem.prompt for problem in problems]
    else:
        rows = [json.loads(line) for line in options.path.read_text().splitlines() if line.strip()]
        fields["prompt_field"] = next(name for name, value in rows[0].items() if isinstance(value, str))
        problems = load_problems(options.path, answer_pattern=options.answer_pattern, **fields)
        solutions = [None] * len(problems)
    begun = time.perf_counter()
    graded = list(disagreements([problem.answer for problem in problems], solutions))
    seconds = time.perf_counter() - begun
    wrong = [row for row in graded if not row[0]]
    for _, completion, gold, score in wrong:
        print(f"gold {gold!r}, score {score}: ...{completion[-100:]!r}")
    print(
        f"{options.path.name}: {len(problems)} problems, {len(graded)} completions graded, {len(wrong)} disagree, "
        f"{1e3 * seconds / len(graded):.1f} ms each"
    )
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
