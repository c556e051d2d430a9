"""The release: its statistics against plain loops, each limit just met and just missed, and loops that it saves."""

import json
import math
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from entrocraft import (
    EntropyController,
    rules,
    schedules,
)
from entrocraft.release import Memory, Release, far, reward_mean

# A reward that was 0.8 for certain and a lowest of 0.2: it has fallen below 0.2 + 0.8 x 0.6 = 0.68, is back at 0.74.
KNOWN = Memory(batches=10, reward=0.8, variance=0.0, lowest=0.2, best=0.8)


def _batch(rng: np.random.Generator, chance: float, prompts: int = 32, samples: int = 8) -> tuple[Any, Any]:
    return (rng.random(prompts * samples) < chance).astype(float), np.repeat(np.arange(prompts), samples)


def _judged(release: Release, memory: Memory, **changes: Any) -> tuple[Memory, str]:
    """A step inside the schedule under a verdict that rejects a little, but for `changes`."""
    calm = {"step": 7, "entropy": 1.0, "need": 0.0, "kept": 0.9, "reach": 1.0, "acts": True}
    return release.judged(memory, **(calm | changes))


def test_the_mean_and_its_variance_by_loops() -> None:
    reward = np.array([1.0, 0.0, 1.0, np.nan, 0.5, 0.25, np.nan, 0.0])
    group = np.array([5, 5, 5, 2, 2, 2, 9, 2])
    of_group = [2 / 3, 0.25]  # prompt 9 has no verdict
    mean, variance = reward_mean(reward, group) or (math.nan, math.nan)
    assert mean == pytest.approx(sum(of_group) / 2, rel=1e-15)
    by_prompt = np.var(of_group, ddof=1) / 2
    by_rollout = np.var([1.0, 0.0, 1.0, 0.5, 0.25, 0.0], ddof=1) / 6
    assert by_prompt > by_rollout
    assert variance == pytest.approx(by_prompt, rel=1e-12)
    # Two prompts that agree and rollouts that do not: the larger of the two is theirs.
    assert reward_mean(np.array([0.0, 1.0, 1.0, 0.0]), np.array([0, 0, 1, 1])) == pytest.approx((0.5, 1 / 12))
    assert reward_mean(np.array([0.0, 1.0]), np.array([3, 3])) == pytest.approx((0.5, 0.25))
    assert reward_mean(np.array([np.nan, 1.0]), np.array([0, 1])) is None


def test_the_order_of_rollouts_does_not_matter_to_the_last_bit() -> None:
    rng = np.random.default_rng(0)
    reward, group = rng.standard_normal(999), rng.integers(0, 40, 999)
    order = rng.permutation(999)
    assert reward_mean(reward[order], group[order]) == reward_mean(reward, group)


def test_the_reward_watched_is_the_weighted_mean_it_is_said_to_be() -> None:
    rng = np.random.default_rng(1)
    memory, means, variances, best, lowest = Memory(), [], [], -math.inf, math.inf
    for count in range(1, 31):
        reward, group = rng.standard_normal(48) + 0.1 * count, np.repeat(np.arange(6), 8)
        memory = Release().rewarded(memory, reward, group)
        blocks = reward.reshape(6, 8)
        means.append(blocks.mean())
        variances.append(max(blocks.mean(1).var(ddof=1) / 6, reward.var(ddof=1) / 48))
        # The first ten weigh alike; from then on the newest has a tenth, and all before it shrink by a tenth.
        weights = [0.1 * 0.9 ** max(count - max(k, 10), 0) for k in range(1, count + 1)]
        if count < 10:
            weights = [1 / count] * count
        assert sum(weights) == pytest.approx(1.0)
        expected = np.dot(weights, means), np.dot(np.square(weights), variances)
        lowest = min(lowest, reward.min())
        assert (memory.reward, memory.variance, memory.lowest) == pytest.approx((*expected, lowest), rel=1e-12)
        if count < 3:
            assert memory.best is None
            continue
        best = max(best, expected[0] - 2 * math.sqrt(expected[1]))
        assert memory.best == pytest.approx(best, rel=1e-12)


def test_without_verdicts_nothing_is_remembered() -> None:
    release, group = Release(), np.arange(4)
    assert release.rewarded(KNOWN, None, group) == KNOWN
    assert release.rewarded(KNOWN, np.full(4, np.nan), group) == KNOWN
    assert release.rewarded(KNOWN, np.array([np.nan, 1.0, np.nan, np.nan]), group) == KNOWN
    some = np.array([np.nan, 1.0, np.nan, 0.0])
    assert release.rewarded(KNOWN, some, group).reward == pytest.approx(0.1 * 0.5 + 0.9 * 0.8)


@pytest.mark.parametrize(
    ("reward", "variance", "fallen"),
    [(0.681, 0.0, False), (0.679, 0.0, True), (0.639, 0.02**2, True), (0.641, 0.02**2, False), (0.2, 0.25, False)],
)
def test_fallen_is_below_the_share_beyond_the_noise(reward: float, variance: float, fallen: bool) -> None:
    assert Release().fallen(replace(KNOWN, reward=reward, variance=variance)) is fallen
    # Of rewards of another scale and origin likewise: r -> 2 r - 1.
    other = Memory(batches=10, reward=2 * reward - 1, variance=4 * variance, lowest=-0.6, best=0.6)
    assert Release().fallen(other) is fallen
    assert not Release(reward_share=0.0).fallen(replace(KNOWN, reward=reward, variance=variance))


@pytest.mark.parametrize("chance", [0.05, 0.3, 0.9])
def test_noise_alone_is_no_fall_and_half_the_reward_is(chance: float) -> None:
    rng, memory, release = np.random.default_rng(2), Memory(), Release()
    for _ in range(300):
        memory = release.rewarded(memory, *_batch(rng, chance))
        assert not release.fallen(memory)
    steps = 0
    while not release.fallen(memory):
        memory = release.rewarded(memory, *_batch(rng, chance / 3))
        steps += 1
    assert 2 <= steps <= 25


def test_only_steps_under_control_count_towards_letting_go() -> None:
    release, memory = Release(patience=3), replace(KNOWN, reward=0.5)
    counted = []
    for acts in (True, True, False, False, True):
        memory, why = _judged(release, memory, acts=acts)
        counted.append(memory.falling)
    assert counted == [1, 2, 2, 2, 3]
    assert memory.since == 7
    assert why == (
        "reward 0.5 has been below 80% of its best, 0.8 (both counted from the lowest, 0.2), on 3 steps under control"
    )
    risen, why = _judged(release, replace(KNOWN, falling=2))
    assert (risen.falling, risen.since, why) == (0, None, "")


@pytest.mark.parametrize(
    ("changes", "counts"),
    [
        ({}, True),
        ({"need": -0.26}, True),
        ({"need": 0.249}, False),  # not far: a quarter of the entropy
        ({"entropy": 0.01, "need": 0.021, "reach": 0.02}, True),
        ({"entropy": 0.01, "need": 0.019, "reach": 0.0}, False),  # nor that, in nats
        ({"kept": 0.26}, False),
        ({"reach": 0.26}, False),  # within reach
        ({"reach": math.nan}, True),
        ({"acts": False}, False),
    ],
)
def test_out_of_reach(changes: dict[str, Any], counts: bool) -> None:
    release = Release(reach_patience=2)
    stuck = {"entropy": 1.0, "need": 0.26, "kept": 0.25, "reach": 0.2} | changes
    memory, why = _judged(release, Memory(), **stuck)
    assert (memory.stuck, why) == (0, "")  # a first distance, to be compared with
    memory, _ = _judged(release, memory, **stuck)
    assert memory.stuck == int(counts)
    memory, why = _judged(release, memory, **stuck)
    assert (memory.since == 7) is counts
    distance = abs(stuck["need"])
    expected = (
        f"out of reach: 2 steps that kept little came no nearer to the schedule than {distance:.4f} nats, this one"
    )
    assert why == (f"{expected} keeps 25.0%" if counts else "")


def test_a_step_that_keeps_more_takes_one_back_and_an_aim_in_reach_all() -> None:
    release, memory, counted = Release(), Memory(), []
    for changes in (
        {},
        {},
        {},
        {"kept": 0.5},
        {},
        {"acts": False},
        {"acts": False},
        {"acts": False},
        {},
        {"reach": 1.0},
    ):
        memory, _ = _judged(release, memory, **({"need": 0.5, "kept": 0.1, "reach": 0.1} | changes))
        counted.append(memory.stuck)
    assert counted == [0, 1, 2, 1, 2, 1, 0, 0, 1, 0]
    assert memory.nearest is None


def test_coming_nearer_is_progress() -> None:
    release, memory, distance = Release(reach_patience=3), Memory(), 0.9
    for _ in range(20):  # 6 % nearer in every second step
        for need in (distance, distance * 0.97):
            memory, why = _judged(release, memory, need=need, entropy=1.0, kept=0.1, reach=0.0)
            assert why == ""
        distance *= 0.94
    assert memory.stuck <= 1
    assert not far(0.25, 1.0)
    assert far(0.26, 1.0)


@pytest.mark.parametrize(
    ("reward", "need", "holds"),
    [
        (0.741, -0.2, True),
        (0.741, 0.0, True),
        (0.741, 0.249, True),
        (0.741, 0.251, False),  # the demand that did harm, or another as large
        (0.741, -0.251, False),
        (0.739, 0.0, False),  # reward is not back
        (None, 0.2, True),
    ],
)
def test_it_holds_again_with_the_reward_back_and_the_schedule_near(
    reward: float | None, need: float, holds: bool
) -> None:
    gone = replace(KNOWN, reward=reward, since=30, falling=5, stuck=9, nearest=0.4)
    again = replace(KNOWN, reward=reward)
    assert Release().held(gone, entropy=1.0, need=need) == (again if holds else gone)
    assert Release().held(again, entropy=1.0, need=need) == again


def test_what_it_waits_for() -> None:
    gone = replace(KNOWN, since=30)
    assert Release().waiting(gone) == "since step 30, until the entropy is near the schedule"
    assert Release().waiting(replace(gone, reward=0.5)) == (
        "since step 30, until reward, 0.5, is back at 0.74 and the entropy is near the schedule"
    )


@pytest.mark.parametrize(
    ("name", "value"), [("reward_share", 1.1), ("reward_share", -0.1), ("patience", 0), ("reach_patience", 0)]
)
def test_limits_out_of_range(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=re.escape(f"{name} = {value}: expected a")):
        Release(**{name: value})  # type: ignore[arg-type]


def _fall(scored: Any, controller: EntropyController, steps: range) -> list[Any]:
    """Decisions on one batch again and again, whose rewards turn from mostly right to wrong after 12 steps."""
    good_R = torch.where(scored.sample_R < 6, 1.0, -1.0)
    return [
        scored.decide(controller, step, reward_R=good_R if step < 12 else torch.full_like(good_R, -1.0))
        for step in steps
    ]


def test_a_released_controller_keeps_everything_says_so_and_resumes_bit_for_bit(scored_batch: Callable) -> None:
    scored = scored_batch(0)
    entropy = float(scored.stats.entropy_T[scored.mask_T].double().mean())

    def make(release: Release | None) -> EntropyController:
        return EntropyController(schedules.constant(entropy + 0.2), rules.budget(), release=release)

    whole = make(Release())
    decisions = _fall(scored, whole, range(40))
    released = [decision.metrics["released"] for decision in decisions]
    first = released.index(1.0)
    # 1.5 above the lowest, then 1.5 x 0.9^n: below 80 % of it from the third step, or later for the errors; five such.
    assert 12 + 2 + 4 <= first <= 12 + 8
    assert released == [0.0] * first + [1.0] * (40 - first)
    assert not bool(decisions[first - 1].keep_R.all())
    for decision in decisions[first:]:
        assert decision.bypassed
        assert bool(decision.keep_T.all())
        assert torch.equal(decision.advantage_R, scored.advantage_R.float())
    assert re.match(r"released, reward -?0\.\d+ has been below 80% of its best, 0\.", decisions[first].reason)
    assert decisions[-1].reason.startswith(f"released since step {first}, until reward, -0.")
    assert whole.state_dict()["release"]["since"] == first
    for cut in (first - 2, first + 3):
        before, after = make(Release()), make(Release())
        _fall(scored, before, range(cut))
        after.load_state_dict(json.loads(json.dumps(before.state_dict())))
        for mine, theirs in zip(_fall(scored, after, range(cut, 40)), decisions[cut:], strict=True):
            assert torch.equal(mine.keep_T, theirs.keep_T)
            assert mine.reason == theirs.reason
            np.testing.assert_equal(mine.metrics, theirs.metrics)
        assert after.state_dict() == whole.state_dict()
    never = _fall(scored, make(None), range(40))
    assert [decision.metrics["released"] for decision in never] == [0.0] * 40
    assert not any(bool(decision.keep_R.all()) for decision in never)


def test_warm_up_and_no_rule_never_let_go(scored_batch: Callable) -> None:
    scored = scored_batch(0)
    for rule, warmup in ((rules.none(), 0), (rules.budget(), 99)):
        controller = EntropyController(schedules.constant(1.2), rule, warmup_steps=warmup)
        assert [d.metrics["released"] for d in _fall(scored, controller, range(40))] == [0.0] * 40


def test_reach_is_the_sum_of_the_changes_that_help(scored_batch: Callable) -> None:
    scored = scored_batch(3)
    entropy = float(scored.stats.entropy_T[scored.mask_T].double().mean())
    for shift in (-0.2, 0.2):
        for level in rules.LEVELS:
            rule = rules.first_order(level=level)
            controller = EntropyController(schedules.constant(entropy + shift), rule, initial_gain=3.0)
            metrics = scored.decide(controller, 0).metrics
            # First order keeps all that helps, and what has no change.
            assert metrics["reach"] == pytest.approx(abs(metrics["predicted_change"]), rel=1e-6)
            assert metrics["reach"] > 0


def test_a_state_without_the_release_or_with_part_of_it_is_refused() -> None:
    controller = EntropyController(schedules.constant(0.5), rules.hard())
    state = controller.state_dict()
    for wrong, message in (
        ({name: value for name, value in state.items() if name != "release"}, "lacks ['release']"),
        (state | {"release": None}, "release = None: expected a mapping"),
        (state | {"release": {**state["release"], "sides": 1}}, "release lacks [] and has unknown ['sides']"),
        (state | {"release": {**state["release"], "falling": 1.0}}, "falling = 1.0: expected an integer"),
        (state | {"release": {**state["release"], "best": math.inf}}, "best = inf: expected a finite number or None"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            controller.load_state_dict(wrong)
        assert controller.state_dict() == state
