"""Training problems that repeat a held-out one, found by the word sequences the two have in common.

A problem becomes its lower-case words and numbers, without punctuation, LaTeX's commands counting as words. For each
held-out problem the share of its sequences of n words that also occur in one training problem is the overlap; from
`share` on the training problem repeats it. Single sequences in common do not count: half of a competition's problems
end in "where m and n are relatively prime positive integers". A held-out problem of fewer than n words is repeated by
an equal one alone.

Paraphrases, translations and changed numbers are not found. One pass over the training set, a dictionary over the
held-out ones: half a million problems against a few hundred take about a minute.
"""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

_WORD = re.compile(r"[^\W_]+")
REPORT_FILE = "contamination.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Overlap:
    """One training problem and the held-out problem that it repeats most."""

    train: int
    """Place among the training texts."""
    held_out_set: str
    """Name of the held-out set."""
    held_out: int
    """Place in that set."""
    share: float
    """Share of the held-out problem's word sequences that the training problem has; 1 for equal short ones."""


def words(text: str) -> tuple[str, ...]:
    """Lower-case words and numbers of a text."""
    return tuple(_WORD.findall(text.lower()))


def find_overlaps(
    train: Sequence[str], held_out: Mapping[str, Sequence[str]], *, length: int, share: float
) -> list[Overlap]:
    """Training texts that repeat a held-out one, in their order, each with the worst of its overlaps.

    Args:
        train: training problems, without templates.
        held_out: held-out problems by the name of their set, without templates.
        length: n, words in a sequence.
        share: least share of a held-out problem's sequences, in (0, 1].

    Raises ValueError for a length below 2 or a share outside (0, 1].
    """
    if length < 2 or not 0 < share <= 1:
        raise ValueError(f"length={length}, share={share}: expected 2 or more words and a share in (0, 1]")
    places = [(name, place) for name, texts in held_out.items() for place in range(len(texts))]
    owners: defaultdict[tuple[str, ...], set[int]] = defaultdict(set)
    short: dict[tuple[str, ...], int] = {}
    sizes: list[int] = []
    for number, (name, place) in enumerate(places):
        text = words(held_out[name][place])
        sequences = _sequences(text, length)
        sizes.append(len(sequences))
        for sequence in sequences:
            owners[sequence].add(number)
        if not sequences and text:
            short.setdefault(text, number)
    found = []
    for at, text in enumerate(map(words, train)):
        worst, overlap = _worst(text, length, owners, sizes, short)
        if overlap >= share:
            name, place = places[worst]
            found.append(Overlap(train=at, held_out_set=name, held_out=place, share=overlap))
    return found


def _worst(
    text: tuple[str, ...],
    length: int,
    owners: Mapping[tuple[str, ...], set[int]],
    sizes: Sequence[int],
    short: Mapping[tuple[str, ...], int],
) -> tuple[int, float]:
    """(number of the held-out problem with the largest overlap, its overlap); an overlap of 0 for none."""
    if text in short:
        return short[text], 1.0
    common = Counter(owner for sequence in _sequences(text, length) for owner in owners.get(sequence, ()))
    return max(((n, count / sizes[n]) for n, count in common.items()), key=lambda pair: pair[1], default=(0, 0.0))


def _sequences(text: tuple[str, ...], length: int) -> set[tuple[str, ...]]:
    return {text[at : at + length] for at in range(len(text) - length + 1)}


def write_report(
    path: Path, overlaps: Sequence[Overlap], train: Sequence[str], held_out: Mapping[str, Sequence[str]]
) -> None:
    """Write the overlaps as JSON: counts by set, then each pair with both texts, cut at 300 characters."""
    pairs = [
        asdict(found)
        | {"train_text": train[found.train][:300], "text": held_out[found.held_out_set][found.held_out][:300]}
        for found in overlaps
    ]
    counts = {name: _counts(name, texts, overlaps) for name, texts in held_out.items()}
    path.write_text(json.dumps({"sets": counts, "pairs": pairs}, indent=1) + "\n")


def _counts(name: str, texts: Sequence[str], overlaps: Sequence[Overlap]) -> dict[str, int]:
    ours = [found for found in overlaps if found.held_out_set == name]
    return {
        "problems": len(texts),
        "repeated": len({found.held_out for found in ours}),
        "training_problems": len(ours),
    }
