"""The controller: its numbers by hand, its memory, its guard, and decisions that do not depend on order."""

import json
import math
import re
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from entrocraft import EntropyController, EntropyScheduleWarning, bands, rules, schedules
from entrocraft.rules import Rule

ALL_RULES: list[Rule] = [
    rules.none(),
    rules.soft(gamma=1.0),
    rules.soft_expected(gamma=1.0),
    rules.build("group_scale", rule="hard"),
    rules.hard(),
    rules.switch(),
    *(make(level=level) for make in (rules.first_order, rules.budget) for level in rules.LEVELS),
]

METRICS = {
    *("entropy", "entropy_seq_mean", "entropy_p10", "entropy_p50", "entropy_p90", "logprob_positive"),
    *("logprob_negative", "target", "band_low", "band_high", "direction", "error", "need", "gain", "bypassed"),
    *("predicted_change_all", "predicted_change_kept", "predicted_change", "realised_change"),
    *("kept_fraction", "kept_token_fraction", "kept_fraction_positive", "kept_fraction_negative", "kept_groups"),
    *("active_fraction", "active_fraction_negative", "acceptance_mean", "authority"),
    *("target_start_excess", "target_start_far_above"),
    *("released", "reach", "reward_mean", "reward_best", "weight_min", "weight_mean", "weight_max"),
    "effective_share",
}


def _controller(target: float, rule: Rule, **arguments: Any) -> EntropyController:
    return EntropyController(schedules.constant(target), rule, **arguments)


def _entropy(scored: Any) -> float:
    return float(scored.stats.entropy_T[scored.mask_T].double().mean())


@pytest.mark.parametrize(("shift", "direction"), [(0.2, -1), (0.0, 0), (-0.2, 1)])
def test_direction_band_and_aim(shift: float, direction: int, scored_batch: Callable[..., Any]) -> None:
    scored = scored_batch(0)
    entropy = _entropy(scored)
    schedule = schedules.linear(entropy + shift, entropy + shift - 0.1, 10)
    decision = scored.decide(EntropyController(schedule, rules.hard(), width=0.1), 0)
    assert decision.direction == direction
    expected = {
        "entropy": entropy,
        "target": entropy + shift,
        "band_low": entropy + shift - 0.05,
        "band_high": entropy + shift + 0.05,
        "direction": float(direction),
        "error": -shift,
        "need": shift - 0.01,
        "gain": 10.0,
        "target_start_excess": shift,
    }
    assert {name: decision.metrics[name] for name in expected} == pytest.approx(expected, rel=1e-9, abs=1e-9)
    assert set(decision.metrics) == METRICS
    assert all(type(value) is float for value in decision.metrics.values())


def test_edges_belong_to_the_band(stats_of: Callable[..., Any], scored_batch: Callable[..., Any]) -> None:
    # Both comparisons are strict: at an edge the entropy is in range.
    scored = scored_batch(0)
    entropy = scored.decide(_controller(1.0, rules.none()), 0).metrics["entropy"]
    for low, high, direction in (
        (entropy, entropy, 0),
        (np.nextafter(entropy, 9), 9.0, -1),
        (0.0, np.nextafter(entropy, 0), 1),
    ):
        band = bands.between(schedules.constant(float(low)), schedules.constant(float(high)))
        assert scored.decide(EntropyController(band, rules.none()), 0).direction == direction


@pytest.mark.parametrize("rule", ALL_RULES, ids=str)
@pytest.mark.parametrize("shift", [-0.06, 0.06])
def test_order_over_ranks_does_not_matter(rule: Rule, shift: float, scored_batch: Callable[..., Any]) -> None:
    # Probabilities of soft are rounded sums only where there are enough of them for NumPy to sum in pairs.
    scored = scored_batch(5, prompts=256 if isinstance(rule, rules.soft) else 12)
    target = _entropy(scored) + shift
    straight = scored.decide(_controller(target, rule, seed=3), 7, sample_R=scored.sample_R)
    assert straight.direction == (1 if shift < 0 else -1)  # just outside the band
    expected = {
        (int(g), int(s)): (
            bool(straight.keep_R[r]),
            float(straight.advantage_R[r]),
            straight.keep_T[scored.rollout_T == r].tolist(),
        )
        for r, (g, s) in enumerate(zip(scored.group_R, scored.sample_R, strict=True))
    }
    for seed in range(3):
        order_R = torch.randperm(len(scored.group_R), generator=torch.Generator().manual_seed(seed))
        shuffled = scored.permuted(order_R)
        got = shuffled.decide(_controller(target, rule, seed=3), 7, sample_R=shuffled.sample_R)
        for r, (g, s) in enumerate(zip(shuffled.group_R, shuffled.sample_R, strict=True)):
            mine = got.keep_T[shuffled.rollout_T == r].tolist()
            assert (bool(got.keep_R[r]), float(got.advantage_R[r]), mine) == expected[int(g), int(s)]
        # Bit for bit, so that ranks cannot drift apart.
        np.testing.assert_equal(got.metrics, straight.metrics)


def test_soft_draws_anew_each_step_and_seed(scored_batch: Callable[..., Any]) -> None:
    scored = scored_batch(6)

    def keep(seed: int, step: int) -> list[bool]:
        rule = rules.soft(gamma=0.7)
        return scored.decide(_controller(_entropy(scored) - 0.3, rule, seed=seed), step).keep_R.tolist()

    assert keep(0, 0) == keep(0, 0)
    assert keep(0, 0) != keep(0, 1)
    assert keep(0, 0) != keep(1, 0)


@pytest.mark.parametrize("rule", ALL_RULES, ids=str)
def test_resuming_in_the_middle_changes_nothing(rule: Rule, scored_batch: Callable[..., Any]) -> None:
    batches = [scored_batch(seed, sharpness=2.0 + 0.2 * seed) for seed in range(8)]

    def make() -> EntropyController:
        schedule = schedules.build("linear", start="measured", end=0.6, steps=8)
        return EntropyController(schedule, rule, width=0.02, warmup_steps=1)

    whole = make()
    decisions = [batch.decide(whole, step) for step, batch in enumerate(batches)]
    first = make()
    for step in range(4):
        batches[step].decide(first, step)
    second = make()
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    for step in range(4, 8):
        decision = batches[step].decide(second, step)
        assert torch.equal(decision.keep_T, decisions[step].keep_T)
        assert torch.equal(decision.advantage_R, decisions[step].advantage_R)
        assert decision.reason == decisions[step].reason
        np.testing.assert_equal(decision.metrics, decisions[step].metrics)
    assert second.state_dict() == whole.state_dict()


def test_gain_is_learnt_from_what_was_kept_and_what_came_of_it(scored_batch: Callable[..., Any]) -> None:
    # Sharper and sharper: entropy falls, as predicted, except once.
    batches = [scored_batch(k, sharpness=sharpness) for k, sharpness in enumerate((2.0, 2.3, 2.6, 2.2, 2.9, 3.3))]
    controller = _controller(_entropy(batches[0]) - 0.8, rules.budget(), ema=0.8, initial_gain=4.0)
    numerator = denominator = 0.0
    gain, last = 4.0, None
    for step, batch in enumerate(batches):
        metrics = batch.decide(controller, step).metrics
        if last is None:
            assert math.isnan(metrics["realised_change"])
        else:
            realised, predicted = metrics["entropy"] - last["entropy"], last["predicted_change_kept"]
            assert metrics["realised_change"] == realised
            numerator = 0.8 * numerator + 0.2 * realised * predicted
            denominator = 0.8 * denominator + 0.2 * predicted**2
            gain = max(numerator / denominator, 1e-3) if numerator > 0 else 0.8 * gain
        assert metrics["gain"] == pytest.approx(gain, rel=1e-12)
        last = metrics
    assert gain not in (4.0, 1e-3)


def test_no_gain_is_learnt_from_a_step_that_was_not_taken(scored_batch: Callable[..., Any]) -> None:
    first, second = scored_batch(0), scored_batch(1, sharpness=1.5)

    def gain_after(step: int, forget: bool) -> float:
        controller = _controller(_entropy(first), rules.none())
        first.decide(controller, 0)
        if forget:
            controller.forget_prediction()
        return second.decide(controller, step).metrics["gain"]

    sign = math.copysign(1.0, first.decide(_controller(1.0, rules.none()), 0).metrics["predicted_change_kept"])
    second = scored_batch(1, sharpness=1.5 if sign > 0 else 3.0)  # so that the numerator is positive
    assert gain_after(1, forget=False) != 10.0
    assert gain_after(1, forget=True) == 10.0
    assert gain_after(2, forget=False) == 10.0


def test_over_a_gap_of_steps_no_change_is_realised(scored_batch: Callable[..., Any]) -> None:
    first, second = scored_batch(0), scored_batch(1)
    controller = _controller(_entropy(first), rules.none())
    entropy = first.decide(controller, 3).metrics["entropy"]
    after = second.decide(controller, 4).metrics
    assert after["realised_change"] == after["entropy"] - entropy != 0.0
    for step in (6, 2, 2):
        assert math.isnan(first.decide(controller, step).metrics["realised_change"])


def test_a_step_of_any_integer_type_and_no_other(scored_batch: Callable[..., Any]) -> None:
    scored = scored_batch(0)
    controller = _controller(_entropy(scored), rules.none())
    scored.decide(controller, np.int64(3))  # type: ignore[arg-type]
    assert json.loads(json.dumps(controller.state_dict())) == controller.state_dict()
    with pytest.raises(TypeError):
        scored.decide(controller, 3.5)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("advantage", "rule", "reason"),
    [
        (-1.0, rules.hard(), "bypassed, starved: 0 of 96 rollouts"),
        (-2.0, rules.soft(), "bypassed, starved: "),
        (0.0, rules.hard(), "bypassed, no authority: 0 of 96 rollouts"),
        (0.0, rules.budget(), "bypassed, no authority: 0 of 96 rollouts"),
        (0.0, rules.first_order(level="token"), "bypassed, no authority: 0 of 96 rollouts"),
    ],
)
def test_all_rejected_or_nothing_to_decide_is_a_visible_bypass(
    advantage: float, rule: Rule, reason: str, scored_batch: Callable[..., Any]
) -> None:
    scored = scored_batch(7)
    scored = scored._replace(advantage_R=torch.full_like(scored.advantage_R, advantage))
    decision = scored.decide(_controller(_entropy(scored) - 0.3, rule), 0)
    assert decision.bypassed
    assert decision.metrics["bypassed"] == 1.0
    assert decision.reason.startswith(reason)
    assert bool(decision.keep_T.all())
    assert bool(decision.keep_R.all())
    assert decision.metrics["kept_fraction"] == 1.0
    assert decision.metrics["direction"] == 1.0


def test_switch_without_a_reward_of_the_right_sign_lets_go_of_its_advantages(
    scored_batch: Callable[..., Any],
) -> None:
    # All wrong above the band: max(R, 0) is 0 everywhere. The given advantages come back.
    scored = scored_batch(8)
    advantage_R = torch.linspace(-1, 1, len(scored.group_R))
    scored = scored._replace(reward_R=-torch.ones_like(scored.reward_R), advantage_R=advantage_R)
    decision = scored.decide(_controller(_entropy(scored) - 0.3, rules.switch()), 0)
    assert decision.bypassed
    assert torch.equal(decision.advantage_R, advantage_R)


def test_switch_with_rewards_of_zero_and_one_is_an_error(scored_batch: Callable[..., Any]) -> None:
    scored = scored_batch(8)
    with pytest.raises(ValueError, match=r"needs rewards of -1 and \+1"):
        scored.decide(_controller(1.0, rules.switch()), 0, reward_R=(scored.reward_R + 1) / 2)


def test_warm_up_measures_and_keeps(scored_batch: Callable[..., Any]) -> None:
    scored = scored_batch(9)
    controller = _controller(_entropy(scored) - 0.3, rules.hard(), warmup_steps=2)
    decisions = [scored.decide(controller, step) for step in (10, 11, 12)]
    assert [bool(d.keep_R.all()) for d in decisions] == [True, True, False]
    assert [d.bypassed for d in decisions] == [False] * 3
    assert [d.direction for d in decisions] == [1] * 3
    assert decisions[1].reason.startswith("warm-up 2 of 2: entropy ")


def test_measured_schedules_start_where_the_model_stands(scored_batch: Callable[..., Any]) -> None:
    first, second = scored_batch(0), scored_batch(1, sharpness=1.0)
    schedule = schedules.measured(lambda entropy: schedules.linear(entropy, 0.5, 10))
    controller = EntropyController(schedule, rules.budget(), width=0.1)
    start = first.decide(controller, 0).metrics
    later = second.decide(controller, 5).metrics
    assert start["target"] == start["entropy"]
    assert start["target_start_excess"] == 0.0
    assert later["target"] == pytest.approx((start["entropy"] + 0.5) / 2)
    assert controller.state_dict()["anchor"] == start["entropy"]


def test_the_end_of_a_measured_schedule_is_checked_once_it_is_known(scored_batch: Callable[..., Any]) -> None:
    scored = scored_batch(0)
    entropy = _entropy(scored)
    schedule = schedules.measured(lambda start: schedules.linear(start, 2.5, 20))
    whole = EntropyController(schedule, rules.none(), vocab_size=11, last_step=20)
    before = whole.state_dict()
    first_beyond = math.ceil((math.log(11) - 0.05 - entropy) / (2.5 - entropy) * 20)
    with pytest.raises(ValueError, match=rf"at step {first_beyond}, above log\(vocab_size = 11\)"):
        scored.decide(whole, 0)
    assert whole.state_dict() == before
    short = EntropyController(schedule, rules.none(), vocab_size=11, last_step=first_beyond - 2)
    assert scored.decide(short, 0).metrics["target"] == pytest.approx(entropy)


def test_a_schedule_that_ends_before_what_the_last_update_aims_at_is_seen_at_once(
    scored_batch: Callable[..., Any],
) -> None:
    def falling(step: float) -> float:
        return 1.0 - 0.5 * step

    with pytest.raises(ValueError, match=r"gives -0\.5 nats at step 3"):
        EntropyController(falling, rules.none(), width=0.0, last_step=2)
    decision = scored_batch(0).decide(EntropyController(falling, rules.none(), width=0.0, last_step=1), 1)
    assert decision.metrics["need"] == pytest.approx(0.0 - decision.metrics["entropy"])


def test_a_schedule_far_above_the_model_warns_once(scored_batch: Callable[..., Any]) -> None:
    scored = scored_batch(0, sharpness=4.0)
    entropy = _entropy(scored)
    controller = _controller(2.0 * entropy, rules.budget())
    with pytest.warns(EntropyScheduleWarning, match="far above the measured entropy"):
        decision = scored.decide(controller, 0)
    assert decision.metrics["target_start_far_above"] == 1.0
    assert decision.metrics["target_start_excess"] == pytest.approx(entropy, rel=1e-6)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = scored.decide(controller, 1)
        assert again.metrics["target_start_far_above"] == 1.0  # a fact about the run, in every row of its metrics
        near = scored.decide(_controller(1.2 * entropy, rules.budget()), 0)
        assert near.metrics["target_start_far_above"] == 0.0
        measured = scored.decide(_controller(2.0 * entropy, rules.none()), 0)  # nothing steers there
        assert measured.metrics["target_start_far_above"] == 1.0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"step": -1}, "step = -1"),
        ({"temperature": 0.0}, "temperature = 0.0: expected > 0"),
        ({"temperature": -0.5}, "temperature = -0.5"),
        ({"loss_fn": lambda x: (x * math.nan).sum()}, "predicted entropy change is not finite"),
        ({"advantage_R": torch.zeros(3)}, "advantage_R has shape (3,)"),
    ],
)
def test_bad_input_leaves_the_state_alone(
    changes: dict[str, Any], message: str, scored_batch: Callable[..., Any]
) -> None:
    scored = scored_batch(0)
    controller = _controller(_entropy(scored), rules.budget())
    scored.decide(controller, 0)
    before = controller.state_dict()
    with pytest.raises(ValueError, match=re.escape(message)):
        scored.decide(controller, **({"step": 1} | changes))
    assert controller.state_dict() == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"width": -0.1}, "lo > hi"),
        ({"seed": -1}, "seed = -1"),
        ({"warmup_steps": -1}, "warmup_steps = -1"),
        ({"ema": 1.0}, "ema = 1.0"),
        ({"initial_gain": 0.0}, "initial_gain = 0.0"),
        ({"min_groups": -1}, "min_groups = -1"),
        ({"vocab_size": 1}, "vocab_size = 1"),
        ({"last_step": -1}, "last_step = -1"),
        ({"vocab_size": 4, "schedule": schedules.linear(1.0, 2.0, 9), "last_step": 9}, "nats at step 4, above log"),
        ({"rule": "budgets"}, "unknown rule 'budgets': did you mean 'budget'"),
        ({"schedule": 0.5}, "schedule = 0.5: expected a function"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        EntropyController(**({"schedule": schedules.constant(0.5), "rule": rules.hard()} | arguments))


def test_a_rule_by_name_and_a_band_out_of_reach(scored_batch: Callable[..., Any]) -> None:
    scored = scored_batch(0)
    by_name = EntropyController(schedules.constant(0.5), "hard", vocab_size=11)
    assert torch.equal(scored.decide(by_name, 0).keep_R, scored.advantage_R >= 0)
    with pytest.raises(ValueError, match=r"above log\(vocab_size = 11\)"):
        scored.decide(EntropyController(schedules.constant(2.4), rules.none(), vocab_size=11), 0)


def test_a_state_of_another_version_is_refused() -> None:
    controller = EntropyController(schedules.constant(0.5), rules.hard())
    state = controller.state_dict()
    state["gains"] = state.pop("gain")
    with pytest.raises(ValueError, match=r"lacks \['gain'\] and has unknown \['gains'\]"):
        controller.load_state_dict(state)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("step", 2.0, "step = 2.0: expected an integer or None"),
        ("decided", None, "decided = None: expected an integer"),
        ("decided", True, "decided = True: expected an integer"),
        ("gain", "10", "gain = '10': expected a finite number"),
        ("gain", None, "gain = None: expected a finite number"),
        ("entropy", [0.5], "entropy = [0.5]: expected a finite number or None"),
        ("predicted", math.nan, "predicted = nan: expected a finite number or None"),
    ],
)
def test_a_state_with_values_of_the_wrong_type_is_refused(name: str, value: object, message: str) -> None:
    controller = EntropyController(schedules.constant(0.5), rules.hard())
    before = controller.state_dict()
    with pytest.raises(ValueError, match=re.escape(message)):
        controller.load_state_dict(before | {name: value})
    assert controller.state_dict() == before
