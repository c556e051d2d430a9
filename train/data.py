"""Problems from JSONL, the seeded order in which they are visited, and their prompts as token ids.

Everything here runs once, before the first step, so each mistake in a data file is reported with the
file, the line and what to change, rather than met hours later as a strange reward.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """One prompt and the answer its completions are graded against."""

    index: int
    """Place among the problems of its file, from 0; blank lines are not counted."""
    prompt: str
    """Text the model continues, after the prompt template and before any chat template."""
    answer: str
    """Gold answer, after `answer_pattern`."""


def load_problems(
    path: str | Path,
    *,
    prompt_field: str,
    answer_field: str,
    prompt_template: str = "{prompt}",
    answer_pattern: str | None = None,
    limit: int | None = None,
) -> list[Problem]:
    r"""Read problems from a JSONL file, one object a line.

    Args:
        prompt_field: key of the question; its value must be a non-empty string.
        answer_field: key of the gold answer; a string or a number (27.0 is read as "27").
        prompt_template: text in which the literal `{prompt}` is replaced by the question. Other braces,
            as in `\boxed{}`, are left alone.
        answer_pattern: regular expression with exactly one group, searched in the answer; the group is
            the gold. GSM8K: `r"####\s*(.+)$"`.
        limit: read at most this many problems, from the top of the file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a bad argument, a line that is not a JSON object, a missing or unusable field, an answer
            the pattern does not match (each with `file:line`), or a file without problems.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"no data file at {path} (looked in {path.absolute().parent}); give the path of a JSONL file"
        )
    if "{prompt}" not in prompt_template:
        raise ValueError(f"prompt_template={prompt_template!r} does not contain '{{prompt}}'")
    if limit is not None and limit < 1:
        raise ValueError(f"limit={limit} must be at least 1, or None for the whole file")
    pattern = _one_group_pattern(answer_pattern)

    problems: list[Problem] = []
    for where, row in _json_objects(path):
        prompt = _field(row, prompt_field, where, argument="prompt_field")
        if not isinstance(prompt, str) or not prompt.strip():
            raise ValueError(f"{where}: field {prompt_field!r} must be a non-empty string, it is {prompt!r}")
        answer = _answer_text(_field(row, answer_field, where, argument="answer_field"), answer_field, where)
        if pattern is not None:
            answer = _matched_answer(pattern, answer, where)
        text = prompt_template.replace("{prompt}", prompt)
        problems.append(Problem(index=len(problems), prompt=text, answer=answer))
        if limit is not None and len(problems) == limit:
            break
    if not problems:
        raise ValueError(f"{path} holds no problems: expected one JSON object a line")
    return problems


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


def _json_objects(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield ("file:line", object) for every line that is not blank."""
    with path.open("rb") as file:
        for number, raw in enumerate(file, start=1):
            if not raw.strip():
                continue
            where = f"{path}:{number}"
            try:
                row = json.loads(raw.decode("utf-8"))
            except UnicodeDecodeError as error:
                raise ValueError(f"{where}: not UTF-8 ({error.reason} at byte {error.start})") from error
            except json.JSONDecodeError as error:
                raise ValueError(f"{where}: not valid JSON: {error.msg} at column {error.colno}") from error
            if not isinstance(row, dict):
                raise ValueError(f"{where}: expected a JSON object, found {type(row).__name__}")
            yield where, row


def _field(row: dict[str, Any], name: str, where: str, *, argument: str) -> Any:
    if name in row:
        return row[name]
    nearest = difflib.get_close_matches(name, row, n=1, cutoff=0.5)
    hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
    raise ValueError(f"{where}: no field {name!r} ({argument}); the line has {sorted(row)}{hint}")


def _answer_text(value: Any, name: str, where: str) -> str:
    # bool is an int in Python, and "True" is no answer to a problem.
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise ValueError(f"{where}: field {name!r} must be a string or a number, it is {value!r}")
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    text = str(value).strip()
    if not text:
        raise ValueError(f"{where}: field {name!r} is empty")
    return text


def _matched_answer(pattern: re.Pattern[str], answer: str, where: str) -> str:
    match = pattern.search(answer)
    if match is None or not (match.group(1) or "").strip():
        tail = answer if len(answer) <= 80 else "..." + answer[-77:]
        raise ValueError(
            f"{where}: answer_pattern={pattern.pattern!r} finds no answer in {tail!r}; "
            "change the pattern, or leave it out if the field holds nothing but the answer"
        )
    return match.group(1).strip()


class PromptOrder:
    """Which problems each step uses: one seeded permutation an epoch, without end.

    Epoch e visits the permutation drawn from `SeedSequence([seed, e])`, so the order needs no stored random
    state: epoch and position are enough to go on exactly where a run stopped. A batch may span the end of an
    epoch.
    """

    def __init__(self, size: int, seed: int) -> None:
        if size < 1:
            raise ValueError(f"size={size} must be at least 1")
        if seed < 0:
            raise ValueError(f"seed={seed} must not be negative")
        self.size = size
        self.seed = seed
        self.epoch = 0
        self.position = 0
        self._order = self._permutation()

    def _permutation(self) -> list[int]:
        generator = np.random.default_rng(np.random.SeedSequence([self.seed, self.epoch]))
        return generator.permutation(self.size).tolist()

    def next(self, n: int) -> list[int]:
        """Return the next n indices. ValueError unless 1 <= n <= size."""
        if not 1 <= n <= self.size:
            raise ValueError(
                f"n={n} prompts asked for at once, expected between 1 and the {self.size} there are; "
                "lower prompts_per_step or give more data"
            )
        taken = self._order[self.position : self.position + n]
        self.position += len(taken)
        if self.position == self.size:
            self.epoch += 1
            self._order = self._permutation()
            self.position = n - len(taken)
            taken += self._order[: self.position]
        return taken

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self.epoch, "position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on from a saved state. ValueError if it cannot belong to a data set of this size."""
        epoch, position = state["epoch"], state["position"]
        if epoch < 0 or not 0 <= position < self.size:
            raise ValueError(
                f"state {state} does not fit {self.size} problems (position must be below it); "
                "the run was started on other data"
            )
        self.epoch, self.position = epoch, position
        self._order = self._permutation()


def encode_prompts(
    problems: Sequence[Problem],
    tokenizer: Any,
    *,
    chat_template: bool,
    max_prompt_tokens: int,
    on_long: Literal["error", "drop"] = "error",
) -> list[tuple[int, ...]]:
    """Token ids of every prompt, aligned with `problems`.

    Args:
        tokenizer: a Hugging Face tokenizer.
        chat_template: True sends the prompt as one user turn through the tokenizer's chat template; False
            encodes it as it stands, with the special tokens the tokenizer puts in front (a closing
            end-of-text token is left out, since the model is to continue from here).
        max_prompt_tokens: longest prompt allowed, in tokens.
        on_long: "error" raises at the first longer prompt; "drop" gives it the empty tuple, which no other
            prompt has. `drop_long` takes those out and says which they were.

    Raises:
        ValueError: a prompt over the limit (with "error"), a prompt that encodes to nothing, no prompt left,
            or a tokenizer without a chat template.
    """
    if on_long not in ("error", "drop"):
        raise ValueError(f"on_long={on_long!r} must be 'error' or 'drop'")
    if max_prompt_tokens < 1:
        raise ValueError(f"max_prompt_tokens={max_prompt_tokens} must be at least 1")
    if chat_template and not getattr(tokenizer, "chat_template", None):
        raise ValueError(
            f"chat_template=True, but the tokenizer {type(tokenizer).__name__} has none; "
            "set chat_template to false for a raw prompt, or use a tokenizer that has one"
        )
    encoded: list[tuple[int, ...]] = []
    for problem in problems:
        ids = _prompt_ids(problem.prompt, tokenizer, chat_template=chat_template)
        if not ids:
            raise ValueError(f"problem {problem.index} ({problem.prompt[:60]!r}) encodes to no tokens")
        if len(ids) <= max_prompt_tokens:
            encoded.append(tuple(ids))
        elif on_long == "drop":
            encoded.append(())
        else:
            raise ValueError(
                f"problem {problem.index} ({problem.prompt[:60]!r}...) is {len(ids)} tokens long, the limit "
                f"max_prompt_tokens is {max_prompt_tokens}; raise the limit or set on_long='drop' to leave "
                "such problems out"
            )
    if not any(encoded):
        raise ValueError(f"none of {len(problems)} prompts fits into max_prompt_tokens={max_prompt_tokens}; raise it")
    return encoded


def _prompt_ids(prompt: str, tokenizer: Any, *, chat_template: bool) -> list[int]:
    if chat_template:
        turns = [{"role": "user", "content": prompt}]
        text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        # The template has already written the special tokens into the text.
        return list(tokenizer.encode(text, add_special_tokens=False))
    ids = list(tokenizer.encode(prompt))
    eos = getattr(tokenizer, "eos_token_id", None)
    if ids and ids[-1] == eos and list(tokenizer.encode(prompt, add_special_tokens=False))[-1:] != [eos]:
        ids.pop()
    return ids


def drop_long(
    problems: Sequence[Problem], encoded: Sequence[tuple[int, ...]]
) -> tuple[list[Problem], list[tuple[int, ...]], list[Problem]]:
    """Split what `encode_prompts(on_long="drop")` gave: kept problems, their prompts, dropped problems."""
    pairs = list(zip(problems, encoded, strict=True))
    kept = [(problem, ids) for problem, ids in pairs if ids]
    dropped = [problem for problem, ids in pairs if not ids]
    return [problem for problem, _ in kept], [ids for _, ids in kept], dropped
