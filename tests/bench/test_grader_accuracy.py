"""The accuracy script on problems written here in the formats of the real sets, with a gold that no grader can read."""

import hashlib
import json
import sys
from importlib import metadata
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "bench"))

from grader_accuracy import main, parse

WORDED = [
    ("A shelf holds 4 rows of 6 jars. How many?", "4*6=<<4*6=24>>24 jars.\n#### 24"),
    ("A van costs 12,000 and a trailer 900. Together?", "12,000+900=$<<12000+900=12900>>12,900.\n#### 12,900"),
    ("It is 3 degrees and falls by 8. Now?", "3-8=<<3-8=-5>>-5.\n#### -5"),
]
OLYMPIAD = [
    {"problem": "Find the remainder of 7^2 by 26.", "solution": r"$49 - 26 = \boxed{023}$.", "answer": "023"},
    {"problem": "Find 2^9.", "solution": r"Clearly $\boxed{\textbf{(512)}}.$ ~a reader", "answer": "512"},
]
FLOATS = [{"problem": "Half of 54?", "answer": 27.0}, {"problem": "1 - 2?", "answer": -1.0}]


@pytest.fixture
def accuracy(tmp_path, capsys):
    def grade(rows: list[dict], options: str = "", *more: str) -> tuple[int, str]:
        (tmp_path / "set.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return main([f"{tmp_path / 'set.jsonl'}{options}", *more]), capsys.readouterr().out

    return grade


def test_golds_agree_with_themselves_and_with_nothing_else(accuracy, tmp_path):
    worded = [{"question": question, "answer": answer} for question, answer in WORDED]
    out = tmp_path / "out.json"
    code, told = accuracy(worded, r":pattern=####\s*(.+)$:solution=answer", "--out", str(out))
    assert (code, "3 problems, 60 completions graded, 0 disagree" in told) == (0, True), told
    written = json.loads(out.read_text())
    assert (written["graded"], written["disagree"]) == (60, 0)
    assert {name: written["sets"]["set"][name] for name in ("problems", "solutions", "graded", "disagree")} == {
        "problems": 3,
        "solutions": 3,
        "graded": 60,
        "disagree": 0,
    }
    assert written["sets"]["set"]["sha256"] == hashlib.sha256((tmp_path / "set.jsonl").read_bytes()).hexdigest()
    assert written["versions"]["math-verify"] == metadata.version("math-verify")
    code, told = accuracy(OLYMPIAD, ":solution=solution")
    assert (code, "2 problems, 40 completions graded, 0 disagree" in told) == (0, True), told
    code, told = accuracy(FLOATS)
    assert (code, "2 problems, 38 completions graded, 0 disagree" in told) == (0, True), told


def test_a_disagreement_is_listed_and_fails(accuracy):
    code, told = accuracy([{"problem": "?", "solution": r"so \boxed{8}", "answer": "9"}] * 2)
    assert code == 0, told
    code, told = accuracy([{"problem": "?", "solution": r"so \boxed{8}", "answer": "9"}], ":solution=solution")
    assert code == 1
    assert "gold '9', score 0.0: ...'so \\\\boxed{8}'" in told
    assert "1 disagree" in told


def test_a_pattern_may_hold_the_sign_that_parts_the_options():
    assert parse(r"a:b.jsonl:pattern=(?:is:|=) (\d+)$:solution=worked") == (
        Path("a:b.jsonl"),
        {"pattern": r"(?:is:|=) (\d+)$", "solution": "worked"},
    )
