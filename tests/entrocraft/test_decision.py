"""What a decision keeps and predicts: its metrics recomputed from its tensors, under every rule."""

import math
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from entrocraft import Decision, EntropyController, EntropyScheduleWarning, PPOClip, rules, schedules, token_weights
from entrocraft.rules import Rule

ALL_RULES: list[Rule] = [
    rules.none(),
    rules.soft(gamma=1.0),
    rules.hard(),
    rules.switch(),
    *(make(level=level) for make in (rules.first_order, rules.budget) for level in rules.LEVELS),
]


def _controller(target: float, rule: Rule, **arguments: Any) -> EntropyController:
    return EntropyController(schedules.constant(target), rule, **arguments)


def _entropy(scored: Any) -> float:
    return float(scored.stats.entropy_T[scored.mask_T].double().mean())


@pytest.mark.parametrize("rule", ALL_RULES, ids=str)
@pytest.mark.parametrize("shift", [-0.3, 0.0, 0.15])
def test_metrics_of_what_was_kept(rule: Rule, shift: float, scored_batch: Callable[..., Any]) -> None:
    scored = scored_batch(1)
    decision = scored.decide(_controller(_entropy(scored) + shift, rule), 0)
    assert not decision.bypassed
    keep_T, keep_R, advantage_R = decision.keep_T, decision.keep_R, scored.advantage_R
    assert keep_T.dtype == keep_R.dtype == torch.bool
    assert decision.advantage_R.dtype == torch.float32
    for r in range(len(keep_R)):
        mine_T = scored.rollout_T == r
        counted_T = mine_T & scored.mask_T
        assert bool(keep_R[r]) == bool(keep_T[counted_T if counted_T.any() else mine_T].any())
    counted_R = torch.bincount(scored.rollout_T[scored.mask_T], minlength=len(keep_R)) > 0
    active_R = keep_R & (decision.advantage_R != 0) & counted_R
    chance_R = keep_R.double()
    if isinstance(rule, rules.soft):
        chance_R = (rule.gamma * decision.direction * advantage_R.double()).clamp(-50, 0).exp()
    expected = {
        "acceptance_mean": float(chance_R.mean()),
        "kept_fraction": float(keep_R.double().mean()),
        "effective_share": float(keep_R.double().mean()),
        "kept_token_fraction": int((keep_T & scored.mask_T).sum()) / int(scored.mask_T.sum()),
        "kept_fraction_positive": float(keep_R[advantage_R > 0].double().mean()),
        "kept_fraction_negative": float(keep_R[advantage_R < 0].double().mean()),
        "kept_groups": float(len(scored.group_R[active_R].unique())),
        "active_fraction": float(active_R.double().mean()),
        "active_fraction_negative": float((active_R & (decision.advantage_R < 0)).double().mean()),
        "authority": float((counted_R & ((advantage_R != 0) | (decision.advantage_R != 0))).double().mean()),
        "bypassed": 0.0,
    }
    assert {name: decision.metrics[name] for name in expected} == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("rule", ALL_RULES, ids=str)
def test_predicted_change_is_summed_over_what_was_kept(rule: Rule, scored_batch: Callable[..., Any]) -> None:
    scored = scored_batch(2)
    decision = scored.decide(_controller(_entropy(scored) - 0.3, rule), 0)
    stats = scored.stats
    s_T = stats.logprob_T.double().exp() * (stats.logprob_T + stats.entropy_T).double()
    sbar_T = (stats.p2logp_T + stats.entropy_T * stats.p2_T).double()

    def change(advantage_R: torch.Tensor, keep_T: torch.Tensor) -> float:
        used_T = (keep_T & scored.mask_T).double()
        return float((-advantage_R[scored.rollout_T] * (s_T - sbar_T) * used_T).sum() / scored.mask_T.sum())

    everything_T = torch.ones_like(decision.keep_T)
    assert decision.metrics["predicted_change_all"] == pytest.approx(
        change(scored.advantage_R, everything_T), rel=1e-4, abs=1e-8
    )
    kept = change(decision.advantage_R, decision.keep_T)
    assert decision.metrics["predicted_change_kept"] == pytest.approx(kept, rel=1e-4, abs=1e-8)
    assert decision.metrics["predicted_change"] == pytest.approx(10.0 * kept, rel=1e-4, abs=1e-7)


@pytest.mark.parametrize("level", rules.LEVELS)
def test_the_given_loss_is_what_is_predicted(level: str, scored_batch: Callable[..., Any]) -> None:
    # Far off policy half the tokens are clipped: the decision must see that, and no loss must mean policy gradient.
    scored = scored_batch(3)
    weight_T = token_weights(scored.rollout_T, scored.mask_T, scored.group_R, aggregation="token_mean")
    advantage_T = scored.advantage_R[scored.rollout_T]
    target = _entropy(scored) - 0.3
    rule = rules.first_order(level=level)

    def policy_gradient(logprob_T: torch.Tensor) -> torch.Tensor:
        return -(weight_T * advantage_T * logprob_T).sum()

    plain = scored.decide(_controller(target, rule), 0)
    spelled = scored.decide(_controller(target, rule), 0, loss_fn=policy_gradient)
    assert torch.equal(plain.keep_T, spelled.keep_T)
    name = "predicted_change_all"
    assert spelled.metrics[name] == pytest.approx(plain.metrics[name], rel=1e-4)

    old_T = scored.stats.logprob_T + torch.randn(len(advantage_T), generator=torch.Generator().manual_seed(0))
    clipped = PPOClip().clipped(scored.stats.logprob_T, old_T, advantage_T)
    free_T = ~(clipped["low"] | clipped["high"] | clipped["dual"])
    ratio_T = (scored.stats.logprob_T - old_T).exp()
    ppo = scored.decide(
        _controller(target, rule), 0, loss_fn=lambda x: (weight_T * PPOClip()(x, old_T, advantage_T)).sum()
    )

    def surrogate(logprob_T: torch.Tensor) -> torch.Tensor:
        return -(weight_T * advantage_T * ratio_T * free_T * logprob_T).sum()

    by_hand = scored.decide(_controller(target, rule), 0, loss_fn=surrogate)
    assert ppo.metrics[name] == pytest.approx(by_hand.metrics[name], rel=1e-4)
    assert torch.equal(ppo.keep_T, by_hand.keep_T)
    if level == "token":
        assert bool(ppo.keep_T[~free_T].all())
        assert not torch.equal(ppo.keep_T, plain.keep_T)


@pytest.mark.parametrize("level", rules.LEVELS)
@pytest.mark.parametrize("shift", [-0.05, 0.05])
def test_budget_meets_the_schedule_with_nothing_to_spare(
    level: str, shift: float, scored_batch: Callable[..., Any]
) -> None:
    scored = scored_batch(4)
    controller = _controller(_entropy(scored) + shift, rules.budget(level=level))
    decision = scored.decide(controller, 0)
    want = decision.metrics["need"] / decision.metrics["gain"]
    kept = decision.metrics["predicted_change_kept"]
    assert 0 < int((~decision.keep_T).sum()) < len(decision.keep_T)
    assert bool(decision.keep_R[scored.advantage_R == 0].all())
    # Reached, and overshot by less than the last thing rejected: the least harmful of all that went.
    biggest = float(_changes(scored, level).abs().max())
    overshoot = (kept - want) * (1 if decision.metrics["predicted_change_all"] < want else -1)
    assert -1e-9 <= overshoot <= biggest


def _changes(scored: Any, level: str) -> torch.Tensor:
    stats = scored.stats
    s_T = stats.logprob_T.exp() * (stats.logprob_T + stats.entropy_T)
    sbar_T = stats.p2logp_T + stats.entropy_T * stats.p2_T
    change_T = -scored.advantage_R[scored.rollout_T] * (s_T - sbar_T) * scored.mask_T / scored.mask_T.sum()
    return change_T if level == "token" else torch.zeros(len(scored.group_R)).index_add(0, scored.rollout_T, change_T)


def test_without_collision_statistics_sign_rules_work_and_predictions_are_undefined(
    scored_batch: Callable[..., Any],
) -> None:
    scored = scored_batch(0)
    bare = scored._replace(stats=replace(scored.stats, p2_T=None, p2logp_T=None))
    controller = _controller(_entropy(scored) - 0.3, rules.hard())
    decision = bare.decide(controller, 0)
    assert torch.equal(decision.keep_R, scored.advantage_R >= 0)
    assert math.isnan(decision.metrics["predicted_change_all"])
    assert controller.state_dict()["predicted"] is None
    assert bare.decide(controller, 1).metrics["gain"] == 10.0
    with pytest.raises(ValueError, match="collision=True"):
        bare.decide(_controller(1.0, rules.budget()), 0)


@given(seed=st.integers(0, 10_000), rule=st.sampled_from(ALL_RULES), shift=st.floats(-0.5, 0.2))
def test_any_batch_gives_a_whole_decision(
    seed: int, rule: Rule, shift: float, scored_batch: Callable[..., Any]
) -> None:
    scored = scored_batch(seed, prompts=1 + seed % 5, samples=1 + seed % 4, longest=3)
    if not scored.mask_T.any():
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", EntropyScheduleWarning)
        decision = scored.decide(_controller(max(_entropy(scored) + shift, 0.0), rule), 0)
    R, T = len(scored.group_R), len(scored.rollout_T)
    assert decision.keep_T.shape == (T,)
    assert decision.keep_R.shape == decision.advantage_R.shape == (R,)
    assert 0.0 < decision.metrics["kept_fraction"] <= 1.0
    assert 0.0 <= decision.metrics["kept_token_fraction"] <= 1.0
    assert bool(torch.isfinite(decision.advantage_R).all())
    # Never starved: something with an advantage is kept, or nothing was rejected.
    assert decision.metrics["active_fraction"] > 0 or bool(decision.keep_T.all())
    if decision.bypassed or (decision.direction == 0 and not isinstance(rule, rules.budget)):
        assert bool(decision.keep_T.all())


def test_advantages_a_rule_replaced_are_not_predicted_under_a_loss_that_holds_the_given(
    scored_batch: Callable[..., Any],
) -> None:
    scored = scored_batch(2)
    target = _entropy(scored) - 0.3
    weight_T = token_weights(scored.rollout_T, scored.mask_T, scored.group_R, aggregation="seq_mean_token_sum")

    def loss_fn(logprob_T: torch.Tensor) -> torch.Tensor:
        return -(weight_T * scored.advantage_R[scored.rollout_T] * logprob_T).sum()

    controller = _controller(target, rules.switch())
    metrics = scored.decide(controller, 0, loss_fn=loss_fn).metrics
    assert math.isnan(metrics["predicted_change_kept"])
    assert math.isnan(metrics["predicted_change"])
    kept_by_none = scored.decide(_controller(target, rules.none()), 0, loss_fn=loss_fn).metrics
    assert metrics["predicted_change_all"] == kept_by_none["predicted_change_kept"] != 0.0
    assert controller.state_dict()["predicted"] is None
    assert scored_batch(3, sharpness=3.0).decide(controller, 1).metrics["gain"] == 10.0
    # Inside the band nothing is replaced, and the given loss predicts.
    inside = scored.decide(_controller(_entropy(scored), rules.switch()), 0, loss_fn=loss_fn).metrics
    assert inside["predicted_change_kept"] == inside["predicted_change_all"]


def test_with_the_guard_off_switch_trains_on_what_is_left(scored_batch: Callable[..., Any]) -> None:
    # All wrong but one, above the band: max(R, 0) leaves a single rollout of 96.
    scored = scored_batch(8)
    reward_R = -torch.ones_like(scored.reward_R)
    reward_R[5] = 1.0
    left_R = (reward_R > 0).float()
    target = _entropy(scored) - 0.3
    guarded = scored.decide(_controller(target, rules.switch()), 0, reward_R=reward_R)
    assert guarded.bypassed
    assert torch.equal(guarded.advantage_R, scored.advantage_R)
    off = {"min_kept_fraction": 0.0, "min_groups": 0, "min_authority": 0.0}
    for used_R, wanted_R in ((reward_R, left_R), (-torch.ones_like(reward_R), torch.zeros_like(left_R))):
        decision = scored.decide(_controller(target, rules.switch(), **off), 0, reward_R=used_R)
        assert not decision.bypassed
        assert torch.equal(decision.advantage_R, wanted_R)
        assert bool(decision.keep_T.all())


def test_a_token_rule_that_keeps_only_certain_tokens_is_bypassed(scored_batch: Callable[..., Any]) -> None:
    scored = scored_batch(4)
    adverse_T = _changes(scored, "token") > 0
    stats = scored.stats
    # The policy is certain of every token that would lower entropy: above the band nothing of use passes.
    certain_T = ~adverse_T

    def sure(value_T: torch.Tensor, value: float) -> torch.Tensor:
        return torch.where(certain_T, torch.tensor(value), value_T)

    assert stats.p2_T is not None
    assert stats.p2logp_T is not None
    stats = replace(
        stats,
        logprob_T=sure(stats.logprob_T, 0.0),
        entropy_T=sure(stats.entropy_T, 0.0),
        p2_T=sure(stats.p2_T, 1.0),
        p2logp_T=sure(stats.p2logp_T, 0.0),
    )
    controller = _controller(0.0, rules.first_order(level="token"), width=0.01)
    decision = scored.decide(controller, 0, stats=stats)
    assert decision.direction == 1
    assert decision.bypassed
    assert "starved: 0 of 96 rollouts are kept with an advantage other than 0 and a token that moves" in decision.reason
    assert bool(decision.keep_T.all())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"keep_T": torch.ones(3)}, r"keep_T has shape \(3,\) and dtype torch.float32: expected \(3,\) and torch.bool"),
        ({"keep_T": torch.ones(3, 1, dtype=torch.bool)}, r"keep_T has shape \(3, 1\)"),
        ({"keep_R": torch.ones(2)}, r"keep_R has shape \(2,\) and dtype torch.float32"),
        ({"advantage_R": torch.ones(3)}, r"advantage_R has shape \(3,\) .* expected \(2,\) and torch.float32"),
        ({"advantage_R": torch.ones(2).double()}, "advantage_R .* torch.float64"),
        ({"direction": 2}, "direction = 2"),
    ],
)
def test_a_decision_checks_its_parts(changes: dict[str, Any], message: str) -> None:
    parts: dict[str, Any] = {
        "keep_T": torch.ones(3, dtype=torch.bool),
        "keep_R": torch.ones(2, dtype=torch.bool),
        "advantage_R": torch.ones(2),
        "direction": 0,
        "bypassed": False,
        "reason": "",
        "metrics": {},
    }
    assert Decision(**parts).direction == 0
    with pytest.raises(ValueError, match=message):
        Decision(**(parts | changes))


@pytest.mark.parametrize("share", [0.25, 1.0])
def test_the_gain_is_learnt_from_the_share_that_was_used(share: float, scored_batch: Callable[..., Any]) -> None:
    first, second = scored_batch(0), scored_batch(1, sharpness=1.5)
    controller = _controller(_entropy(first), rules.none())
    predicted = first.decide(controller, 0).metrics["predicted_change_kept"]
    second = scored_batch(1, sharpness=1.5 if predicted > 0 else 3.0)  # so that the numerator is positive
    controller.scale_prediction(share)
    metrics = second.decide(controller, 1).metrics
    assert metrics["gain"] == pytest.approx(metrics["realised_change"] / (share * predicted))
    controller.forget_prediction()
    controller.scale_prediction(share)  # nothing to scale, and no harm
    for wrong in (0.0, 1.5, math.nan):
        with pytest.raises(ValueError, match="expected a share in"):
            controller.scale_prediction(wrong)
