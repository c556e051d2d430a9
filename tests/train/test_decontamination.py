"""Overlaps counted by hand, on problems written here."""

import json
import random

import pytest

from entrocraft.train.decontamination import Overlap, find_overlaps, words, write_report

FERRY = "A ferry crosses the lake in 40 minutes and returns in 25. What is its mean speed if the lake is 13 km wide?"
TILES = "In how many ways can a 2 by 10 board be covered with dominoes so that no two of them form a square?"
ENDING = "The answer is m/n where m and n are relatively prime positive integers. Find m+n."


def found(train, held_out, length=4, share=0.5):
    return find_overlaps(train, {"set": held_out}, length=length, share=share)


def test_words_are_what_remains_without_signs_and_case():
    assert words("Let $x_1 = \\frac{2}{3}$; Find  X's ÉTÉ.") == (
        "let",
        "x",
        "1",
        "frac",
        "2",
        "3",
        "find",
        "x",
        "s",
        "été",
    )


def test_a_repeated_problem_is_found_whatever_its_type_setting_and_surroundings():
    changed = (
        "Problem 7. A FERRY crosses the lake in $40$ minutes and\nreturns in $25$. What is its mean speed "
        "if the lake is $13$ km wide? (A) 1 (B) 2"
    )
    assert found([TILES, changed], [FERRY]) == [Overlap(train=1, held_out_set="set", held_out=0, share=1.0)]


def test_the_share_is_that_of_the_held_out_problem():
    """24 words, 21 sequences of 4; a changed word takes 4 of them, one in a corner takes 1."""
    assert len(words(FERRY)) == 24
    assert found([FERRY.replace("lake in", "bay in")], [FERRY])[0].share == pytest.approx(17 / 21)
    assert found([FERRY.replace("A ferry", "One ferry")], [FERRY])[0].share == pytest.approx(20 / 21)
    longer = FERRY + " " + TILES
    assert found([longer], [FERRY])[0].share == 1.0  # the held-out one is within the other
    assert found([FERRY], [longer], share=0.1)[0].share == pytest.approx(21 / (len(words(longer)) - 3))


def test_a_common_ending_is_no_repetition_but_would_be_a_shared_sequence():
    first, second = f"{FERRY} {ENDING}", f"{TILES} {ENDING}"
    assert found([first], [second]) == []
    (shared,) = found([first], [second], share=1e-9)
    ending = len(words(ENDING)) - 3
    assert shared.share == pytest.approx(ending / (len(words(second)) - 3))


def test_the_worst_of_several_is_named_by_set_and_place():
    held_out = {"a": [TILES], "b": [ENDING, FERRY]}
    (overlap,) = find_overlaps([FERRY], held_out, length=4, share=0.5)
    assert (overlap.held_out_set, overlap.held_out) == ("b", 1)


def test_short_problems_must_be_equal():
    assert [o.train for o in found(["2 + 3 =", "12 + 3 =", "what is 2 + 3?", "2+3", ""], ["2 + 3", "", "?"])] == [0, 3]


def test_random_texts_against_a_count_by_hand():
    generator = random.Random(1)
    texts = [" ".join(generator.choice("abc") for _ in range(12)) for _ in range(40)]
    train, held = texts[:25], texts[25:]

    def grams(text):
        letters = text.split()
        return {tuple(letters[i : i + 3]) for i in range(10)}

    expected = {}
    for at, text in enumerate(train):
        share = max(len(grams(text) & grams(other)) / len(grams(other)) for other in held)
        if share >= 0.6:
            expected[at] = share
    assert 0 < len(expected) < 25
    assert {o.train: o.share for o in found(train, held, length=3, share=0.6)} == pytest.approx(expected)


def test_bad_arguments():
    for length, share in ((1, 0.5), (4, 0.0), (4, 1.1)):
        with pytest.raises(ValueError, match=f"length={length}, share={share}"):
            found([FERRY], [TILES], length=length, share=share)


def test_the_report_counts_problems_on_both_sides(tmp_path):
    train, held_out = [FERRY, TILES, FERRY], {"a": [FERRY, TILES], "b": [ENDING]}
    overlaps = find_overlaps(train, held_out, length=4, share=0.5)
    write_report(tmp_path / "report.json", overlaps, train, held_out)
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["sets"] == {
        "a": {"problems": 2, "repeated": 2, "training_problems": 3},
        "b": {"problems": 1, "repeated": 0, "training_problems": 0},
    }
    assert report["pairs"][1] == {
        "train": 1, "held_out_set": "a", "held_out": 1, "share": 1.0, "train_text": TILES, "text": TILES
    }  # fmt: skip
