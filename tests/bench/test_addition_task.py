"""The benchmark's second task: its format against plain arithmetic, its reward, its problems, its share of slips."""

import json
import random
import re
import sys
from pathlib import Path

import pytest
from transformers import ByT5Tokenizer

BENCH = Path(__file__).parents[2] / "bench"
sys.path.insert(0, str(BENCH))

from addition_task import LESSONS, demonstration, half_cosine, is_held_out, line, score, working, write_problems  # noqa: E402

from entrocraft.schedules import anchored  # noqa: E402
from entrocraft.train.graders import load_reward  # noqa: E402

CHAIN = re.compile(r"(\d{3})\+(\d{3})=((?:\d\+\d\+[01]=[01]\d;){3})(\d{3,4})")


def _columns_wrong(text):
    """How many of the three column sums are wrong, each judged by the digits and the carry it names itself; whether
    the chain is otherwise of one piece: digits of the operands, carries and result taken from the sums before."""
    match = CHAIN.fullmatch(text)
    assert match is not None, text
    wrong, carry, digits = 0, 0, 0
    for k, clause in enumerate(match[3].rstrip(";").split(";")):
        left, total = clause.split("=")
        first, second, brought = map(int, left.split("+"))
        assert (first, second, brought) == (int(match[1][2 - k]), int(match[2][2 - k]), carry), text
        wrong += first + second + brought != int(total)
        carry, digits = int(total) // 10, digits + int(total) % 10 * 10**k
    assert int(match[4]) == carry * 1000 + digits, text
    return wrong


def test_the_format_by_hand():
    assert working(352, 471) == "2+1+0=03;5+7+0=12;3+4+1=08;823"
    assert working(999, 999) == "9+9+0=18;9+9+1=19;9+9+1=19;1998"
    assert working(352, 471, (0, 1, 0)) == "2+1+0=03;5+7+0=13;3+4+1=08;833"  # goes on from the wrong sum
    assert working(352, 471, (10, -10, 0)) == "2+1+0=13;5+7+1=03;3+4+0=07;733"
    assert working(352, 471, (0, 10, -10)) == working(352, 471)  # 22 and -2 are no column sums


def test_right_demonstrations_are_right_and_noisy_ones_wrong_in_half():
    rng = random.Random(0)
    right = [demonstration(rng, False) for _ in range(500)]
    noisy = [demonstration(rng, True) for _ in range(4000)]
    assert all(_columns_wrong(text) == 0 for text in right)
    wrong = [_columns_wrong(text) for text in noisy]
    # A slip needs room within 0..19, here counted over all digits and carries as if they were equally likely.
    totals = [a + b + carry for a in range(10) for b in range(10) for carry in (0, 1)]
    room = [0 <= total + slip <= 19 for total in totals for slip in (-10, -2, -1, 1, 2, 10)]
    expected = 0.2 * sum(room) / len(room)
    assert sum(wrong) / (3 * len(wrong)) == pytest.approx(expected, abs=0.015)
    assert sum(w == 0 for w in wrong) / len(wrong) == pytest.approx((1 - expected) ** 3, abs=0.03)
    for text in right[:50]:
        prompt, answer = re.fullmatch(r"(.*?=)(.*)", text).groups()  # type: ignore[union-attr]
        assert score(answer, str(eval(prompt.rstrip("="))), prompt) == 1.0


def test_responses_are_chains_of_30_to_60_tokens():
    tokenizer, rng = ByT5Tokenizer(extra_ids=0), random.Random(1)
    lengths = {len(tokenizer.encode(demonstration(rng, True))) - LESSONS.prompt_tokens for _ in range(500)}
    assert lengths == {31, 32}  # the end mark among them


@pytest.mark.parametrize(
    ("completion", "reward"),
    [
        ("2+1+0=03;5+7+0=12;3+4+1=08;823", 1.0),
        ("2+1+0=13;823", 1.0),  # the working is not looked at
        ("823", 0.0),  # but has to be there
        ("2+1+0=03;0823", 0.0),
        ("2+1+0=03;823;", 0.0),
        ("2+1+0=03;823 ", 0.0),
        ("2+1+0=03;824", 0.0),
        ("", 0.0),
    ],
)
def test_the_reward_takes_the_exact_result_alone(completion, reward):
    assert load_reward("addition_task:score") is score
    assert score(completion, "823", "352+471=") == reward


def test_problems_are_kept_apart_and_the_same_each_time(tmp_path):
    paths = write_problems(tmp_path / "a")
    train, held_out = ([json.loads(line) for line in path.read_text().splitlines()] for path in paths)
    assert (len(train), len(held_out)) == (1024, 64)
    assert len({row["prompt"] for row in train + held_out}) == 1024 + 64
    for rows, wanted in ((train, False), (held_out, True)):
        for row in rows:
            a, b = map(int, row["prompt"].rstrip("=").split("+"))
            assert str(a + b) == row["answer"]
            assert 100 <= min(a, b) <= max(a, b) <= 999
            assert is_held_out(a, b) == wanted
    columns = {(row["prompt"][k], row["prompt"][4 + k]) for row in train for k in (0, 1, 2)}
    assert len(columns) == 100  # every pair of digits is trained on somewhere
    assert [path.read_bytes() for path in paths] == [path.read_bytes() for path in write_problems(tmp_path / "b")]


def test_curves_fall_to_three_tenths_of_the_measured_start():
    for make in (line, half_cosine):
        curve = anchored(make(80), 0.1)
        assert [curve(0), curve(40), curve(80)] == pytest.approx([0.1, 0.065, 0.03])
    assert anchored(line(80), 0.1)(20) == pytest.approx(0.0825)
    assert anchored(half_cosine(80), 0.1)(20) == pytest.approx(0.065 + 0.035 / 2**0.5)
