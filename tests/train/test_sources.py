"""Rows from real files through the real libraries: pyarrow for parquet, datasets for folders and hub ids."""

import json
from typing import Any

import datasets.config
import pyarrow
import pytest
from pyarrow import parquet

from entrocraft.train.problems import RowFormat, load_problems, read_problems
from entrocraft.train.sources import rows

ROWS = [
    {"problem": "2 + 2?", "solution": "It is $\\boxed{4}$.", "answer": "4", "level": 1},
    {
        "problem": "Half of one?",
        "solution": "First \\boxed{1}, then \\boxed{\\frac{1}{2}}.",
        "answer": "1/2",
        "level": 2,
    },
    {"problem": "Prove it.", "solution": "Clear.", "answer": None, "level": 3},
]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Laid out as a repository of the hub: two splits, the first in two files."""
    (tmp_path / "set" / "data").mkdir(parents=True)
    for name, part in (
        ("train-00000-of-00002", ROWS[:1]),
        ("train-00001-of-00002", ROWS[1:]),
        ("test-00000-of-00001", ROWS[:1]),
    ):
        parquet.write_table(
            pyarrow.Table.from_pylist(part, schema=pyarrow.Table.from_pylist(ROWS).schema),
            tmp_path / "set" / "data" / f"{name}.parquet",
        )
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return tmp_path / "set"


@pytest.fixture
def file(tmp_path):
    parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "set.parquet", row_group_size=2)
    return tmp_path / "set.parquet"


def test_parquet_and_folder_give_what_jsonl_gives(tmp_path, file, folder):
    lines = tmp_path / "set.jsonl"
    lines.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    fields = RowFormat(prompt_field="problem", answer_field="answer")
    (expected, dropped), *others = (read_problems(path, fields, on_missing="drop") for path in (lines, file, folder))
    assert [(p.index, p.question, p.answer) for p in expected] == [(0, "2 + 2?", "4"), (1, "Half of one?", "1/2")]
    assert dropped == [f"{lines}:3: field 'answer' must be a string or a number, it is None"]
    for problems, dropped in others:
        assert problems == expected
        assert len(dropped) == 1
    assert "row 2: field 'answer'" in others[0][1][0]
    assert "train row 2" in others[1][1][0]


def test_only_the_columns_that_are_asked_for_are_read(file, folder):
    for path in (file, folder):
        assert [row for _, row in rows(path, ["problem", "level"])][1] == {"problem": "Half of one?", "level": 2}
        assert set(next(rows(path, ["problems"]))[1]) == set(ROWS[0])  # a wrong name: all, to name the nearest
        with pytest.raises(ValueError, match="did you mean 'problem'"):
            load_problems(path, prompt_field="problems", answer_field="answer")


def test_splits(folder):
    fields: dict[str, Any] = {"prompt_field": "problem", "answer_field": "answer"}
    assert len(load_problems(folder, split="test", **fields)) == 1
    with pytest.raises(ValueError, match=r"split 'dev'.*can be loaded: .*dev"):
        load_problems(folder, split="dev", **fields)


def test_answers_out_of_worked_solutions(file):
    fields: dict[str, Any] = {"prompt_field": "problem", "answer_field": "solution", "answer_pattern": "boxed"}
    problems, dropped = read_problems(file, RowFormat(**fields), on_missing="drop")
    assert [problem.answer for problem in problems] == ["4", "\\frac{1}{2}"]
    assert "finds no \\boxed{} in 'Clear.'" in dropped[0]
    with pytest.raises(ValueError, match=r"row 2: answer_pattern='boxed' finds no"):
        load_problems(file, **fields)


def test_a_set_of_unusable_rows_is_refused_with_the_first_reason(tmp_path):
    (tmp_path / "proofs.jsonl").write_text(json.dumps(ROWS[2]) + "\n")
    with pytest.raises(ValueError, match=r"holds no problems.* first of 1 rows .*'answer' must be"):
        read_problems(
            tmp_path / "proofs.jsonl", RowFormat(prompt_field="problem", answer_field="answer"), on_missing="drop"
        )


def test_what_is_not_there_is_told(tmp_path):
    with pytest.raises(ValueError, match=r"^nobody/nothing \(split 'train'\): neither a file nor a data set that"):
        next(rows("nobody/nothing", ["problem"]))  # the network is off in tests
    with pytest.raises(FileNotFoundError, match="no data file at problems"):
        next(rows("problems", ["problem"]))
    with pytest.raises(FileNotFoundError, match=r"no data file at sub/set\.jsonl"):
        next(rows("sub/set.jsonl", ["problem"]))
    (tmp_path / "broken.parquet").write_bytes(b"no")
    with pytest.raises(ValueError, match=r"broken\.parquet: not a parquet file that can be read"):
        next(rows(tmp_path / "broken.parquet", ["problem"]))


@pytest.mark.parametrize(("package", "path"), [("pyarrow", "set.parquet"), ("datasets", "set")])
def test_a_missing_package_is_named_with_its_remedy(file, folder, monkeypatch, package, path):
    monkeypatch.setitem(__import__("sys").modules, package, None)  # as if it were not installed
    with pytest.raises(ValueError, match=rf"needs the package `{package}`: pip install 'entrocraft\[data\]'"):
        next(rows(file.parent / path, ["problem"]))
