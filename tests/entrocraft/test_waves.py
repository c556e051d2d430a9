"""Sizes of waves by hand, the learnt share, and a subsample in which every kept rollout has the same chance."""

import json
from typing import Any

import numpy as np
import pytest
import torch

from entrocraft.waves import Waves, effective_share, loss_scale, step_scale, subsample


def test_sizes_by_hand() -> None:
    waves = Waves(target=30, samples=8)  # budget floor(120 / 8) 8 = 120
    assert waves.next_size(0, 0) == 64  # 30 / 0.5 = 60, 7.5 groups
    assert waves.next_size(16, 64, wave=1) == 32  # 14 / 0.5 = 28
    assert waves.next_size(20, 112, wave=2) == 8  # would be 24, the budget has 8
    assert waves.next_size(20, 120, wave=2) == 0
    assert waves.next_size(20, 96, wave=3) == 0
    assert waves.next_size(30, 64, wave=1) == 0
    assert Waves(target=3, samples=8, max_factor=1.0).next_size(0, 0) == 8  # at least one group


def test_the_share_is_learnt_by_direction() -> None:
    waves = Waves(target=32, samples=8, ema=0.9)
    waves.observe(16, 64, direction=1)
    assert waves.share(1) == pytest.approx(0.9 * 0.5 + 0.1 * 0.25)
    assert waves.share(0) == waves.share(-1) == 0.5
    assert waves.next_size(0, 0, direction=1) == 72  # 32 / 0.475 = 67.4
    assert waves.group_size(1) == 17
    waves.observe(0, 0, direction=1)
    assert waves.share(1) == pytest.approx(0.475)
    copy = Waves(target=32, samples=8)
    copy.load_state_dict(json.loads(json.dumps(waves.state_dict())))
    assert copy.state_dict() == waves.state_dict()


def test_a_rule_that_keeps_nothing_stays_within_the_budget() -> None:
    waves = Waves(target=32, samples=8, ema=0.0)
    waves.observe(0, 128)
    assert waves.next_size(0, 0) == 128
    assert waves.group_size() == 32
    for factor, largest in ((1.9, 15), (1.0, 8), (4.0, 32)):
        small = Waves(target=2, samples=8, max_factor=factor, ema=0.0)
        small.observe(0, 16)
        assert small.group_size() == largest


@pytest.mark.parametrize("share", [0.15, 0.4, 0.9])
def test_a_driven_step_meets_the_target_or_spends_the_budget(share: float) -> None:
    rng, waves = np.random.default_rng(0), Waves(target=64, samples=8)
    met = 0
    for _ in range(60):
        kept = generated = wave = 0
        while size := waves.next_size(kept, generated, wave=wave):
            assert size % 8 == 0
            kept, generated, wave = kept + int(rng.binomial(size, share)), generated + size, wave + 1
        waves.observe(kept, generated)
        assert generated <= 4 * 64
        met += kept >= 64
    # 256 rollouts at 0.15 keep 38 on average: never 64. The other two can, and 60 steps learn the share.
    assert (met == 0) if share == 0.15 else (met >= 55)
    assert waves.share(0) == pytest.approx(share, abs=0.05)


def _batch() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    group_R = np.repeat(np.arange(10), 6)
    keep_R = np.random.default_rng(1).random(60) < np.repeat(np.linspace(0.1, 1.0, 10), 6)
    return keep_R, group_R, np.tile(np.arange(6), 10)


def test_subsample_is_exact_uniform_and_cuts_two_groups_at_most() -> None:
    keep_R, group_R, _ = _batch()
    kept, target, draws = int(keep_R.sum()), 20, 3000
    count_R = np.zeros(60)
    for step in range(draws):
        chosen_R = subsample(keep_R, group_R, target, seed=2, step=step)
        assert chosen_R.sum() == target
        assert not (chosen_R & ~keep_R).any()
        taken = np.bincount(group_R[chosen_R], minlength=10)
        assert int(((taken > 0) & (taken < np.bincount(group_R[keep_R], minlength=10))).sum()) <= 2
        count_R += chosen_R
    chance = target / kept
    # Five standard deviations for each of the kept.
    assert np.abs(count_R[keep_R] / draws - chance).max() <= 5 * (chance * (1 - chance) / draws) ** 0.5


def test_subsample_does_not_depend_on_the_order() -> None:
    keep_R, group_R, sample_R = _batch()
    straight_R = subsample(keep_R, group_R, 20, seed=2, step=5, sample_R=sample_R)
    order_R = np.random.default_rng(3).permutation(60)
    shuffled_R = subsample(keep_R[order_R], group_R[order_R], 20, seed=2, step=5, sample_R=sample_R[order_R])
    assert (shuffled_R == straight_R[order_R]).all()
    assert (subsample(keep_R, group_R, 20, seed=2, step=5) == straight_R).all()
    assert (subsample(keep_R, group_R, 20, seed=3, step=5) != straight_R).any()
    few_R = subsample(keep_R, group_R, 60, seed=2, step=5)
    assert (few_R == keep_R).all()


def test_scales_and_effective_share() -> None:
    assert [loss_scale(kept, 64) for kept in (0, 16, 64, 99)] == [0.0, 0.25, 1.0, 1.0]
    assert [step_scale(kept, 64) for kept in (0, 16, 64, 99)] == [0.0, 0.5, 1.0, 1.0]
    assert effective_share(np.ones(7)) == pytest.approx(1.0)
    assert effective_share(np.array([1.0, 0.0, 0.0, 0.0])) == 0.25
    assert effective_share(np.array([3.0, 1.0])) == pytest.approx(16 / 20)
    assert effective_share(np.zeros(3)) == 0.0


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("target", 0), ("samples", 0), ("max_waves", 0), ("max_factor", 0.5), ("ema", 1.0), ("initial_share", 0.0),
    ],
)  # fmt: skip
def test_arguments_out_of_range(name: str, value: float) -> None:
    arguments: dict[str, Any] = {"target": 8, "samples": 4} | {name: value}
    with pytest.raises(ValueError, match=f"{name} = {value}"):
        Waves(**arguments)


def test_bad_input_is_named() -> None:
    waves = Waves(target=8, samples=4)
    keep_R, group_R, _ = _batch()
    for call, message in (
        (lambda: waves.next_size(5, 4), "kept = 5 of generated = 4"),
        (lambda: waves.next_size(0, 0, wave=-1), "wave = -1"),
        (lambda: waves.next_size(0, 0, direction=2), "direction = 2"),
        (lambda: waves.observe(5, 4), "kept = 5"),
        (lambda: waves.load_state_dict({"share_below": 0.5}), "state of Waves has"),
        (lambda: waves.load_state_dict(waves.state_dict() | {"share_above": 0.0}), "share_above = 0.0"),
        (lambda: subsample(keep_R.astype(float), group_R, 3, seed=0, step=0), "keep_R is a ndarray of shape .60"),
        (lambda: subsample(torch.from_numpy(keep_R), group_R, 3, seed=0, step=0), "Tensor .* expected a NumPy array"),  # type: ignore[arg-type]
        (lambda: subsample(keep_R, group_R[1:], 3, seed=0, step=0), "group_R has shape"),
        (lambda: subsample(keep_R, group_R, 0, seed=0, step=0), "target = 0"),
        (lambda: loss_scale(3, 0), "target = 0"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
