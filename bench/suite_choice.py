"""Options of a run, checked: counts, and which contenders are measured: all, or those that `--rivals` names."""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Iterable
from typing import Any

import pytest
from suite_cases import shapes


def positive(text: str) -> int:
    """An option that counts something."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no count: expected a whole number of at least 1")
    return int(text)


def known_contenders() -> tuple[str, ...]:
    """The names that `--rivals` takes, of all files."""
    from bench_logits_logprob import CALLS as LOGITS
    from bench_policy_loss import CALLS as POLICY
    from bench_scoring import CALLS as SCORING
    from bench_train_step import NAMES
    from rivals import all_rivals

    return tuple(dict.fromkeys([*(rival.name for rival in all_rivals()), *POLICY, *LOGITS, *SCORING, *NAMES]))


def check_rivals(wanted: list[str]) -> None:
    """Raises pytest.UsageError for a name that no file knows, with the nearest."""
    known = known_contenders() if wanted else ()
    for name in wanted:
        if name not in known:
            near = difflib.get_close_matches(name, known, 1, 0.0)[0]
            raise pytest.UsageError(f"--rivals {name}: no such contender; nearest: {near}; all: {', '.join(known)}")


def chosen(config: Any, names: Iterable[str]) -> tuple[str, ...]:
    """Those that `--rivals` names; all without it."""
    wanted = config.getoption("rivals")
    return tuple(name for name in names if wanted is None or name in wanted)


def nobody(config: Any, arguments: int, names: Iterable[str]) -> Any:
    """A parameter of a file none of whose contenders was named: skipped, with the reason."""
    reason = f"--rivals {' '.join(config.getoption('rivals') or ())}: not among {', '.join(names)}"
    return pytest.param(*[None] * arguments, marks=pytest.mark.skip(reason=reason), id="nobody")


def spread(metafunc: pytest.Metafunc, names: Iterable[str]) -> None:
    """Parameters head, shape and name: a benchmark for each head, T, V and chosen contender."""
    config: Any = metafunc.config
    sizes = shapes(*map(config.getoption, ("heads", "tokens", "vocab")))
    cases = [
        pytest.param(head, shape, name, id=f"{head}-T{shape.T}-V{shape.V}-{name}")
        for head, shape in sizes
        for name in chosen(config, names)
    ]
    metafunc.parametrize(("head", "shape", "name"), cases or [nobody(config, 3, names)])
