"""The examples run as they stand, and do what they say."""

import importlib.util
import re
import warnings
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).parents[2] / "docs" / "examples"


def _load(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_loop_follows_its_line_and_without_control_does_not(capsys):
    example = _load("grpo_loop")
    errors, rewards = {}, {}
    for rule in ("budget", "none"):
        with torch.random.fork_rng():
            entropies = example.main(["--steps", "40", "--rule", rule])
        start = entropies[0]
        assert start == pytest.approx(2.3, abs=0.05)  # log 10
        gaps = [abs(e - (start + (1.9 - start) * s / 40)) for s, e in enumerate(entropies)]
        errors[rule] = sum(gaps[13:]) / len(gaps[13:])
        rewards[rule] = [float(found) for found in re.findall(r"reward (\S+);", capsys.readouterr().out)]
    assert errors["budget"] < 0.02
    assert errors["none"] > 0.25
    for reward in rewards.values():
        assert reward[0] == pytest.approx(0.5, abs=0.1)
        assert reward[-1] > 0.88


def test_the_loop_is_sixty_lines_with_no_trainer_behind_it():
    text = (EXAMPLES / "grpo_loop.py").read_text()
    assert len(text.splitlines()) <= 60
    assert "entrocraft.train" not in text


def test_the_rule_of_ones_own_keeps_the_extremes():
    with warnings.catch_warnings(), torch.random.fork_rng():
        warnings.simplefilter("error")
        kept = _load("own_rule").main()
    # Above the band: advantages >= 0 (rollouts 0, 2 and 7), and the first of the worst in each prompt.
    assert kept == [True, True, True, False, True, False, False, True]


def test_a_schedule_of_ones_own():
    schedule = _load("own_rule").staircase(1000)
    assert [schedule(s) for s in (0, 99, 100, 250)] == pytest.approx([0.8, 0.8, 0.72, 0.648])
