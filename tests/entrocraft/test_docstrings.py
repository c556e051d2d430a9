"""Whatever can be chosen by name says its equation, what it averages over, its source, and what it does to entropy.

And what was not seen in its primary source says so.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest

from entrocraft import ImportanceWeights, PeakKeeper, handle_truncated, kl, overlong_penalty, token_weights
from entrocraft.advantages import ADVANTAGES
from entrocraft.kl import ESTIMATORS
from entrocraft.losses import AGGREGATIONS
from entrocraft.methods import METHODS
from entrocraft.registry import resolve
from entrocraft.rules import RULES
from entrocraft.surrogates import LOSSES

SAYS: dict[str, Callable[[str], Any]] = {
    "Source:": re.compile(r"\bSource: \S").search,
    "Entropy:": re.compile(r"\bEntropy: \S").search,
    "Aggregation:": re.compile(r"\bAggregation: \S").search,
    # A name and what it is, `A_i = R_i` or `c <- c + delta`; but neither `r = 1` nor `p >= 0`.
    "an equation": re.compile(r"(?<=\s)= (?!-?[\d.]+(?! [-+*/])[ ,;:.`)])|<- ").search,
    "Experimental": re.compile(r"\bExperimental\b.*\w").search,
}
ALWAYS = ("Source:", "Entropy:")
LOSS = (*ALWAYS, "Aggregation:", "an equation")

REGISTRIES: dict[str, tuple[Mapping[str, Any], tuple[str, ...]]] = {
    "advantage": (ADVANTAGES, LOSS),
    "loss": (LOSSES, LOSS),
    "method": (METHODS, LOSS),
    "rule": (RULES, (*ALWAYS, "Aggregation:")),
    "kl": (ESTIMATORS, LOSS),
}
OTHERS = {
    "token_weights": (token_weights, ALWAYS),
    "kl": (kl, ALWAYS),
    "ImportanceWeights": (ImportanceWeights, LOSS),
    "overlong_penalty": (overlong_penalty, (*ALWAYS, "an equation")),
    "handle_truncated": (handle_truncated, (*ALWAYS, "Aggregation:")),
}
# Paper texts that were not read, or read in part; programs that were not seen. A new one belongs here.
UNSEEN = {
    "loss": ("gspo", "cispo", "probability_clip"),
    "method": (
        "aent", "entropic", "repo", "repo_r", "polarity", "adaptive_clip", "clip_b", "clip_v", "flexible_clip",
    ),
    "rule": ("soft", "budget", "tempered"),
}  # fmt: skip


def cases() -> Iterator[Any]:
    for noun, (registry, needs) in REGISTRIES.items():
        for name in registry:
            unseen = ("Experimental",) if name in UNSEEN.get(noun, ()) else ()
            yield pytest.param(resolve(registry, name, noun), (*needs, *unseen), id=f"{noun}-{name}")
    for name, (entry, needs) in OTHERS.items():
        yield pytest.param(entry, needs, id=name)
    yield pytest.param(PeakKeeper, ("Source:", "Experimental"), id="PeakKeeper")


def unsaid(text: str, needs: tuple[str, ...]) -> list[str]:
    flat = " ".join(text.split())
    return [need for need in needs if not SAYS[need](flat)]


@pytest.mark.parametrize(("entry", "needs"), list(cases()))
def test_what_can_be_chosen_says(entry: Any, needs: tuple[str, ...]) -> None:
    assert unsaid(entry.__doc__ or "", needs) == []


def test_every_aggregation_is_in_the_table() -> None:
    missing = [name for name in AGGREGATIONS if not re.search(rf"\b{name}\b", token_weights.__doc__ or "")]
    assert missing == []


def test_what_is_unseen_can_be_chosen() -> None:
    strangers = [(noun, name) for noun, names in UNSEEN.items() for name in names if name not in REGISTRIES[noun][0]]
    assert strangers == []


@pytest.mark.parametrize(
    ("text", "missing"),
    [
        ("`A = R`. Aggregation: any. Entropy: none. Source: this.", []),
        ("lam = 1 - 2 k. Aggregation: any. Entropy: none. Source: this.", []),
        ("At r = 1, p >= 0 and K = 10: Aggregation: any. Entropy: none. Source: this.", ["an equation"]),
        ("c <- c + 1. Aggregation: any. Entropy falls. Source:", ["Source:", "Entropy:"]),
        ("l = -r A. Entropy: none. Source: this.", ["Aggregation:"]),
    ],
)
def test_what_is_left_out_is_found(text: str, missing: list[str]) -> None:
    assert unsaid(text, LOSS) == missing
