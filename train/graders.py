"""Reward functions: what one completion is worth, given the gold answer and the prompt.

A reward is any callable `(completion, answer, prompt) -> float | None`; None means "no verdict", which is
not the same as wrong. Two are built in. Any other is named by its import path, `package.module:function`.
Nothing here knows about processes or time limits: `train/rewards.py` runs these functions under both.
"""

from __future__ import annotations

import difflib
import functools
import importlib
import logging
import re
from collections.abc import Callable
from typing import Any

Reward = Callable[[str, str, str], float | None]

_NUMBER = r"-?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|-?\.\d+"
_PLAIN_NUMBER = re.compile(rf"[$€£]?(?:{_NUMBER})\s*%?")
_LATEX_COMMAND = re.compile(r"\\[a-zA-Z(\[]|\$\$")
_BOX = re.compile(r"\\(?:boxed|fbox)\s*\{")
_SUM = re.compile(r"(0|[1-9][0-9]*)\+(0|[1-9][0-9]*)")


def sum_pair(completion: str, answer: str, prompt: str) -> float:
    """1.0 if the completion is exactly `a+b` with a + b = answer, else 0.0.

    a and b are non-negative decimal integers without leading zeros, with nothing around them, so an answer
    N has N + 1 right completions: a task on which diversity is visible.
    """
    match = _SUM.fullmatch(completion)
    if match is None or max(len(match[1]), len(match[2])) > len(answer.strip()):
        return 0.0
    return float(int(match[1]) + int(match[2]) == int(answer))


def math_verify(completion: str, answer: str, prompt: str) -> float | None:
    r"""1.0 if the final answer of the completion equals the gold answer mathematically, else 0.0.

    The final answer is read in one way only, so that a completion cannot be right by hedging: the last
    `\boxed{}`; else the line after the last `####`; else what math-verify finds in the text (after "answer
    is", else the rightmost expression); for a numeric gold, else the last number. Equality is math-verify's:
    1,200 = 1200.0, 1/2 = 0.5, 12% = 12 = 0.12, leading zeros and units are ignored.

    Returns None if the gold answer itself cannot be parsed. math-verify's own time limits are off: they use
    SIGALRM, which works in the main thread only and cannot interrupt C code.
    """
    from math_verify import verify

    gold = _parsed_gold(answer)
    if not gold:
        return None
    final = _final_answer(completion, numeric=_PLAIN_NUMBER.fullmatch(answer.strip()) is not None)
    return float(bool(final) and verify(list(gold), final, timeout_seconds=None))


@functools.lru_cache(maxsize=4096)
def _parsed_gold(answer: str) -> tuple[Any, ...]:
    """Sympy values of the gold; cached because every completion of a group asks for the same one."""
    # Said once per process, at the first call with its time limits off; ours are in RewardPool.
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    text = answer if _BOX.search(answer) else rf"\boxed{{{answer.strip()}}}"
    return tuple(_parse_latex(_last_box(text) or "")) if answer.strip() else ()


def _final_answer(completion: str, *, numeric: bool) -> list[Any]:
    from math_verify import ExprExtractionConfig, parse

    box = _last_box(completion)
    if box is not None:
        return _parse_latex(box)
    text = completion.replace("\\$", "$")
    if "####" in text:
        text = text.rpartition("####")[2].strip().partition("\n")[0]
    if not numeric or _LATEX_COMMAND.search(text):
        return parse(text, parsing_timeout=None)  # type: ignore[arg-type]
    # Plain numbers only: the LaTeX reader would take "$5 and 2 at $" for a formula.
    found = parse(text, [ExprExtractionConfig()], parsing_timeout=None)  # type: ignore[arg-type]
    numbers = re.findall(_NUMBER, text)
    return found or (_parse_latex(rf"\boxed{{{numbers[-1]}}}") if numbers else [])


def _parse_latex(text: str) -> list[Any]:
    from math_verify import LatexExtractionConfig, parse

    return parse(
        text,
        [LatexExtractionConfig(boxed_match_priority=0)],
        fallback_mode="no_fallback",
        parsing_timeout=None,  # type: ignore[arg-type]
    )


def _last_box(text: str) -> str | None:
    r"""The last `\boxed{...}` with its braces balanced, or None. An unclosed box is none: it was cut off."""
    for start in reversed(list(_BOX.finditer(text))):
        depth = 1
        for at in range(start.end(), len(text)):
            if text[at] in "{}" and text[at - 1] != "\\":
                depth += 1 if text[at] == "{" else -1
            if depth == 0:
                return rf"\boxed{{{text[start.end() : at]}}}"
    return None


BUILT_IN: dict[str, Reward] = {"math_verify": math_verify, "sum_pair": sum_pair}


def load_reward(name: str) -> Reward:
    """The reward called `name`: a built-in, or an import path `package.module:function`.

    Raises ValueError that says what is missing: the built-in (naming the nearest), the module, or the
    function in it.
    """
    if ":" not in name:
        if name in BUILT_IN:
            return BUILT_IN[name]
        nearest = difflib.get_close_matches(name, BUILT_IN, n=1, cutoff=0.4)
        hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
        raise ValueError(
            f"unknown reward {name!r}: built in are {sorted(BUILT_IN)}; "
            f"your own is named by its import path, 'package.module:function'{hint}"
        )
    module_name, _, function_name = name.partition(":")
    if not module_name or module_name == "__main__":
        raise ValueError(f"reward {name!r}: worker processes need it in a module that can be imported")
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # a user's module may fail in any way while it is imported
        raise ValueError(
            f"reward {name!r}: importing {module_name!r} failed: {type(error).__name__}: {error}; a module of your "
            "own is found when its folder is on the path: PYTHONPATH=. python train/train.py ..."
        ) from error
    function = getattr(module, function_name, None)
    if not callable(function):
        public = sorted(key for key, value in vars(module).items() if callable(value) and key[0] != "_")
        nearest = difflib.get_close_matches(function_name, public, n=1, cutoff=0.4)
        hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
        raise ValueError(f"reward {name!r}: {module_name!r} has no function {function_name!r}, it has {public}{hint}")
    return function  # type: ignore[return-value]
