"""The benchmark's second task: three-digit addition, digit by digit, with one right answer.

    352+471=   2+1+0=03;5+7+0=12;3+4+1=08;823

Prompt, then a column a clause from the right: both digits, the carry, their sum in two digits; then the result. With
the end mark that is 31 or 32 tokens, bytes, of which a policy that has learnt the form is in doubt about few. Where
there is one right answer entropy is error, so holding it has a price here, which the first task does not show. The
warm start's noisy demonstrations slip in one column in five and go on from there without another mistake.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

from entrocraft.schedules import Schedule, cosine, linear, measured
from entrocraft.train.warm_start import Lessons

SMALLEST, LARGEST = 100, 999
SLIP = 0.2  # chance of a noisy demonstration to slip in a column, where the slip fits: four in ten are wrong somewhere
SLIPS = (-10, -2, -1, 1, 2, 10)
TRAIN, HELD_OUT = 1024, 64  # problems

END = 0.3  # of the measured start: where a falling curve ends, and about where the uncontrolled policy does


def line(steps: int) -> Schedule:
    """From the measured entropy straight down to where the uncontrolled policy ends."""
    return measured(lambda entropy: linear(entropy, END * entropy, steps))


def half_cosine(steps: int) -> Schedule:
    """The same fall along half a cosine."""
    return measured(lambda entropy: cosine(entropy, END * entropy, steps))


def demonstration(rng: random.Random, noisy: bool) -> str:
    """A problem with its working and result; a noisy one is wrong in a column with probability `SLIP`."""
    a, b = rng.randint(SMALLEST, LARGEST), rng.randint(SMALLEST, LARGEST)
    slips = [rng.choice(SLIPS) if noisy and rng.random() < SLIP else 0 for _ in range(3)]
    return f"{a}+{b}={working(a, b, slips)}"


def working(a: int, b: int, slips: tuple[int, ...] | list[int] = (0, 0, 0)) -> str:
    """The columns of a + b and the result. `slips[k]` is added to the sum of column k, counted from the right, where
    that leaves it within 0..19; what follows builds on the wrong sum."""
    clauses, digits, carry = [], "", 0
    for k, slip in enumerate(slips):
        first, second = a // 10**k % 10, b // 10**k % 10
        total = first + second + carry
        total += slip if 0 <= total + slip <= 19 else 0
        clauses.append(f"{first}+{second}+{carry}={total:02d}")
        carry, digits = total // 10, str(total % 10) + digits
    return ";".join([*clauses, f"{carry or ''}{digits}"])


def score(completion: str, answer: str, prompt: str) -> float:
    """1.0 if what stands after the last semicolon is exactly the answer, else 0.0; the working is not looked at."""
    _, semicolon, result = completion.rpartition(";")
    return float(bool(semicolon) and result == answer)


def is_held_out(a: int, b: int) -> bool:
    """One pair in ten is kept from reinforcement; the warm start, like any pretraining, may see all of them."""
    return (a // 10 + b) % 10 == 3  # two columns have a say, so that no column's digits are kept out altogether


def write_problems(folder: Path) -> tuple[Path, Path]:
    """Writes `train.jsonl` and `held_out.jsonl`, one `{"prompt": "352+471=", "answer": "823"}` a line; returns both
    paths. The problems are the same each time."""
    folder.mkdir(parents=True, exist_ok=True)
    rng, found = random.Random(0), (dict[str, str](), dict[str, str]())
    while len(found[0]) < TRAIN or len(found[1]) < HELD_OUT:
        a, b = rng.randint(SMALLEST, LARGEST), rng.randint(SMALLEST, LARGEST)
        found[is_held_out(a, b)][f"{a}+{b}="] = str(a + b)
    paths = folder / "train.jsonl", folder / "held_out.jsonl"
    for path, problems, wanted in zip(paths, found, (TRAIN, HELD_OUT), strict=True):
        rows = [json.dumps({"prompt": prompt, "answer": answer}) + "\n" for prompt, answer in problems.items()]
        path.write_text("".join(rows[:wanted]))
    return paths


LESSONS = Lessons(key="addition 1", demonstration=demonstration, prompt_tokens=len("352+471="), steps=600, batch=64)
