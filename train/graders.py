"""Reward functions: what one completion is worth, given the gold answer and the prompt.

A reward is any callable `(completion, answer, prompt) -> float | None`, `async` or not; None means "no verdict",
which is not the same as wrong. Three are built in. Any other is named by its import path, `package.module:function`.
Nothing here knows about processes or time limits: `train/rewards.py` runs these functions under both.
"""

from __future__ import annotations

import difflib
import functools
import importlib
import logging
import re
from collections.abc import Awaitable, Callable
from typing import Any

Reward = Callable[[str, str, str], float | Awaitable[float | None] | None]

_NUMBER = r"-?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|-?\.\d+"
_PLAIN_NUMBER = re.compile(rf"[$€£]?(?:{_NUMBER})\s*%?")
_LATEX_COMMAND = re.compile(r"\\[a-zA-Z(\[]|\$\$")
_CHOICE = re.compile(r"\(?[A-E]\)?|\\text\{\s*\(?[A-E]\)?\s*\}")
_BRACE = re.compile(r"(?<!\\)[{}]")
_BOX = re.compile(r"\\(?:boxed|fbox)\s*\{")
_SUM = re.compile(r"(0|[1-9][0-9]*)\+(0|[1-9][0-9]*)")
_STYLE = r"\\(?:text|textbf|textrm|textup|mathrm|mathbf|mathsf|bf|rm)\s*\{\s*"
_LABEL = re.compile(rf"(?:{_STYLE}\(?[A-E]\)\s*:?\s*(?:\\[ ,;:~])?\s*\}}|\([A-E]\))\s*(?:\\[ ,;:~]|\\quad|~)?\s*(?=\S)")
_STYLED_NUMBER = re.compile(rf"{_STYLE}\(?({_NUMBER})\)?\s*\.?\s*\}}")
_LONGEST = 1_000
"""Characters of a final answer beyond which it is wrong unread, unless the gold is longer. MATH-500's longest gold has
under 200; sympy takes minutes over a number of 50,000 digits."""
_DEEPEST = 50
"""Brackets within brackets of a final answer beyond which it is wrong unread: parsing time explodes with them."""
_TAIL = 20_000
"""Last characters of a completion in which a final answer without a box is looked for."""
_STRICT_TAIL = 100
"""Last characters in which `strict_box` sees a box."""


def sum_pair(completion: str, answer: str, prompt: str) -> float:
    """1.0 if the completion is exactly `a+b` with a + b = answer, else 0.0.

    a and b are non-negative decimal integers without leading zeros, with nothing around them, so an answer
    N has N + 1 right completions: a task on which diversity is visible.
    """
    match = _SUM.fullmatch(completion)
    if match is None or max(len(match[1]), len(match[2])) > len(answer.strip()):
        return 0.0
    return float(int(match[1]) + int(match[2]) == int(answer))


def strict_box(completion: str, answer: str, prompt: str) -> float:
    r"""1.0 if the last `\boxed{}` within the last 100 characters holds the gold answer character for character.

    No value is read: "25" is not "025", nor "1/2" "0.5". This is how the published AIME results were graded; record
    it beside `math_verify` (`reward.also: {strict_box: 0}`) to compare with them.
    """
    box = last_box(completion[-_STRICT_TAIL:])
    return float(box is not None and box == answer)


def math_verify(completion: str, answer: str, prompt: str) -> float | None:
    r"""1.0 if the final answer of the completion equals the gold answer mathematically, else 0.0.

    The final answer is read in one way only, so that a completion cannot be right by hedging: the last
    `\boxed{}`; else the line after the last `####`; else what math-verify finds in the text (after "answer
    is", else the rightmost expression); for a numeric gold, else the last number. Equality is math-verify's:
    1,200 = 1200.0, 1/2 = 0.5, 12% = 12 = 0.12, leading zeros and units are ignored. A box may carry the
    letter of a multiple choice before the value, `\textbf{(C) }12`, and a full stop after it.

    Returns None if the gold answer itself cannot be parsed. A final answer of over 1,000 characters (and longer
    than the gold), or with brackets nested over 50 deep, is wrong. math-verify's own time limits are off: they
    use SIGALRM, which works in the main thread only and cannot interrupt C code.
    """
    from math_verify import verify

    gold = _parsed_gold(answer)
    if not gold:
        return None
    final = _final_answer(completion, answer.strip())
    return float(bool(final) and verify(list(gold), final, timeout_seconds=None))


@functools.lru_cache(maxsize=4096)
def _parsed_gold(answer: str) -> tuple[Any, ...]:
    """Sympy values of the gold; cached because every completion of a group asks for the same one."""
    # Said once per process, at the first call with its time limits off; ours are in RewardPool.
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    text = last_box(answer) if _BOX.search(answer) else answer.strip()
    return tuple(_parse_latex(_bare(text))) if text else ()


def _final_answer(completion: str, answer: str) -> list[Any]:
    from math_verify import ExprExtractionConfig, parse

    box = last_box(completion)
    if box is not None:
        box = box if _CHOICE.fullmatch(answer) else _LABEL.sub("", box.strip(), count=1)
        bare = _bare(box)
        return [] if _unreasonable(bare, answer) else _parse_latex(bare)
    text = completion[-_TAIL:].replace("\\$", "$")
    if "####" in text:
        text = text.rpartition("####")[2].strip().partition("\n")[0]
    if _unreasonable(text, text):  # its brackets only
        return []
    if not _PLAIN_NUMBER.fullmatch(answer) or _LATEX_COMMAND.search(text):
        return parse(text, parsing_timeout=None)  # type: ignore[arg-type]
    # Plain numbers only: the LaTeX reader would take "$5 and 2 at $" for a formula.
    found = parse(text, [ExprExtractionConfig()], parsing_timeout=None)  # type: ignore[arg-type]
    numbers = re.findall(_NUMBER, text)
    return found or (_parse_latex(numbers[-1]) if numbers else [])


def _bare(box: str) -> str:
    """What a box holds without a full stop after it, and a number without the type it is set in."""
    box = box.strip().removesuffix(".").removesuffix(",").rstrip()
    styled = _STYLED_NUMBER.fullmatch(box)
    return styled[1] if styled else box


def _unreasonable(final: str, answer: str) -> bool:
    if len(final) > max(_LONGEST, len(answer)):
        return True
    depth = deepest = 0
    for character in final:
        depth += (character in "({[") - (character in ")}]")
        deepest = max(deepest, depth)
    return deepest > _DEEPEST


def _parse_latex(content: str) -> list[Any]:
    from math_verify import LatexExtractionConfig, parse

    return parse(
        rf"\boxed{{{content}}}",
        [LatexExtractionConfig(boxed_match_priority=0)],
        fallback_mode="no_fallback",
        parsing_timeout=None,  # type: ignore[arg-type]
    )


def last_box(text: str) -> str | None:
    r"""What the last `\boxed{...}` with balanced braces holds, or None. An unclosed box is none: it was cut off."""
    opened = {match.end() - 1: match.end() for match in _BOX.finditer(text)}
    if not opened:
        return None
    # One pass, whatever the text: for each brace its partner. The last box is the one that begins last.
    stack: list[int] = []
    last: tuple[int, int] | None = None
    for match in _BRACE.finditer(text, min(opened)):
        at = match.start()
        if text[at] == "{":
            stack.append(at)
        elif stack:
            begin = stack.pop()
            if begin in opened and (last is None or begin > last[0]):
                last = (begin, at)
    return None if last is None else text[last[0] + 1 : last[1]]


BUILT_IN: dict[str, Reward] = {"math_verify": math_verify, "strict_box": strict_box, "sum_pair": sum_pair}


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
