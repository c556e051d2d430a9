"""Problems: questions and gold answers, read from the rows of a data set.

Everything here runs once, before the first step, so each mistake in a data file is reported with the
file, the line and what to change, rather than met hours later as a strange reward.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from entrocraft.train.graders import last_box
from entrocraft.train.sources import rows

BOXED = "boxed"
"""The `answer_pattern` that is no regular expression: what the last \\boxed{} of a worked solution holds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """One prompt and the answer its completions are graded against."""

    index: int
    """Place among the rows of its set, from 0; blank lines are not counted."""
    prompt: str
    """Text the model continues, after the prompt template and before any chat template."""
    answer: str
    """Gold answer, after `answer_pattern`."""
    question: str = ""
    """The problem as its set has it, before any template."""


class UnusableRowError(ValueError):
    """A row without text or without an answer; collections of problems have some."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RowFormat:
    """How a row becomes a problem. ValueError for a template without its place or a pattern that cannot be used."""

    prompt_field: str
    """Column of the question; its value must be a non-empty string."""
    answer_field: str
    """Column of the gold answer; a string or a number (27.0 is read as "27")."""
    prompt_template: str = "{prompt}"
    r"""Text in which the literal `{prompt}` is replaced by the question. Other braces, as in `\boxed{}`, are left
    alone."""
    answer_pattern: str | None = None
    r"""Regular expression with exactly one group, searched in the answer; the group is the gold. GSM8K:
    `r"####\s*(.+)$"`. "boxed" takes what the last `\boxed{}` holds."""

    def __post_init__(self) -> None:
        if "{prompt}" not in self.prompt_template:
            raise ValueError(f"prompt_template={self.prompt_template!r} does not contain '{{prompt}}'")
        _extractor(self.answer_pattern)  # raises for a bad one


def load_problems(
    path: str | Path,
    *,
    limit: int | None = None,
    split: str = "train",
    subset: str = "",
    revision: str = "",
    **row_format: Any,
) -> list[Problem]:
    """As `read_problems`, for a set of which every row must be usable; the other arguments are those of `RowFormat`."""
    return read_problems(path, RowFormat(**row_format), limit=limit, split=split, subset=subset, revision=revision)[0]


def read_problems(
    path: str | Path,
    row_format: RowFormat,
    *,
    limit: int | None = None,
    on_missing: Literal["error", "drop"] = "error",
    split: str = "train",
    subset: str = "",
    revision: str = "",
) -> tuple[list[Problem], list[str]]:
    """The problems of a set, and what was wrong with each row that was dropped.

    Args:
        path: a JSONL or parquet file, a folder of them, or a hub id.
        row_format: which columns are read, and what becomes of them.
        limit: read at most this many problems, from the top of the set.
        on_missing: "drop" leaves out rows without a question or an answer instead of raising.
        split, subset, revision: which part of a folder or of a data set of the hub.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a bad argument, a line that is not a JSON object, a missing column, an unusable row (with
            "error"), an answer the pattern does not match (each with its place), or a set without problems.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit={limit} must be at least 1, or None for the whole file")
    extract = _extractor(row_format.answer_pattern)
    columns = [row_format.prompt_field, row_format.answer_field]
    problems: list[Problem] = []
    dropped: list[str] = []
    for index, (place, row) in enumerate(rows(path, columns, split=split, subset=subset, revision=revision)):
        try:
            problems.append(_problem(index, row, place, row_format, extract))
        except UnusableRowError as error:
            if on_missing == "error":
                raise
            dropped.append(str(error))
        if limit is not None and len(problems) == limit:
            break
    if not problems:
        reason = f"; the first of {len(dropped)} rows that were dropped: {dropped[0]}" if dropped else ""
        raise ValueError(f"{path} holds no problems: expected one JSON object a line, or rows with columns{reason}")
    return problems, dropped


def _problem(
    index: int, row: dict[str, Any], place: str, row_format: RowFormat, extract: Callable[[str, str], str]
) -> Problem:
    prompt = _field(row, row_format.prompt_field, place, argument="prompt_field")
    value = _field(row, row_format.answer_field, place, argument="answer_field")
    question = _question(prompt, row_format.prompt_field, place)
    answer = extract(_answer_text(value, row_format.answer_field, place), place)
    text = row_format.prompt_template.replace("{prompt}", question)
    return Problem(index=index, prompt=text, answer=answer, question=question)


def _extractor(answer_pattern: str | None) -> Callable[[str, str], str]:
    """What turns the answer column's text into the gold."""
    if answer_pattern == BOXED:
        return _boxed_answer
    pattern = _one_group_pattern(answer_pattern)
    return (
        (lambda text, place: text) if pattern is None else (lambda text, place: _matched_answer(pattern, text, place))
    )


def _boxed_answer(text: str, place: str) -> str:
    found = last_box(text)
    if found is None or not found.strip():
        tail = text if len(text) <= 80 else "..." + text[-77:]
        raise UnusableRowError(f"{place}: answer_pattern='boxed' finds no \\boxed{{}} in {tail!r}")
    return found.strip()


def _one_group_pattern(answer_pattern: str | None) -> re.Pattern[str] | None:
    if answer_pattern is None:
        return None
    try:
        pattern = re.compile(answer_pattern, re.MULTILINE)
    except re.error as error:
        raise ValueError(f"answer_pattern={answer_pattern!r} is not a regular expression: {error}") from error
    if pattern.groups != 1:
        raise ValueError(
            f"answer_pattern={answer_pattern!r} has {pattern.groups} groups; exactly one must enclose the "
            "answer (write (?:...) for the others)"
        )
    return pattern


def _question(value: Any, name: str, where: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise UnusableRowError(f"{where}: field {name!r} must be a non-empty string, it is {value!r}")
    return value


def _field(row: dict[str, Any], name: str, where: str, *, argument: str) -> Any:
    if name in row:
        return row[name]
    nearest = difflib.get_close_matches(name, row, n=1, cutoff=0.5)
    hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
    raise ValueError(f"{where}: no field {name!r} ({argument}); the line has {sorted(row)}{hint}")


def _answer_text(value: Any, name: str, where: str) -> str:
    # bool is an int in Python, and "True" is no answer to a problem.
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise UnusableRowError(f"{where}: field {name!r} must be a string or a number, it is {value!r}")
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    text = str(value).strip()
    if not text:
        raise UnusableRowError(f"{where}: field {name!r} is empty")
    return text


def _matched_answer(pattern: re.Pattern[str], answer: str, where: str) -> str:
    match = pattern.search(answer)
    if match is None or not (match.group(1) or "").strip():
        tail = answer if len(answer) <= 80 else "..." + answer[-77:]
        raise UnusableRowError(
            f"{where}: answer_pattern={pattern.pattern!r} finds no answer in {tail!r}; "
            "change the pattern, or leave it out if the field holds nothing but the answer"
        )
    return match.group(1).strip()
