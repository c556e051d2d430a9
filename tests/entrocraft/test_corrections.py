"""Corrections of a filter: the expected gradient of a tabular policy, enumerated, and weights by hand."""

import itertools
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch

from entrocraft import EntropyController, predicted_entropy_change, rules, schedules
from entrocraft.corrections import group_scale, let_through, tempered, wrapped
from entrocraft.rules import RuleInputs


def _inputs(advantage_R: np.ndarray, **changes: Any) -> RuleInputs:
    size = len(advantage_R)
    fields: dict[str, Any] = {
        "direction": 1, "want": 0.0, "rollout_T": np.arange(size), "mask_T": np.ones(size, dtype=bool),
        "group_R": np.zeros(size, dtype=np.int64), "sample_R": np.arange(size), "advantage_R": advantage_R,
        "reward_R": None, "change_T": None, "change_R": None, "seed": 0, "step": 0,
    }  # fmt: skip
    return RuleInputs(**(fields | changes))


def _policy(right: int) -> tuple[np.ndarray, np.ndarray]:
    """Sequences of 3 tokens out of 2, each as often as it is likely (k / 64, so a group of 64 is the policy itself).

    Returns the score (gradient of log p by the logits) of each of the 64, and which are right: the first `right`
    patterns in a fixed order.
    """
    p_TV = np.array([[0.25, 0.75], [0.5, 0.5], [0.125, 0.875]])
    score, correct = [], []
    for k, s in enumerate(itertools.product(range(2), repeat=3)):
        count = round(64 * math.prod(p_TV[t, y] for t, y in enumerate(s)))
        score += [np.concatenate([np.eye(2)[y] - p_TV[t] for t, y in enumerate(s)])] * count
        correct += [(3 * k) % 8 < right] * count
    assert len(score) == 64
    return np.array(score), np.array(correct)


@pytest.mark.parametrize("right", [1, 3, 6])
@pytest.mark.parametrize("direction", [-1, 1])
@pytest.mark.parametrize(
    "rule",
    [rules.hard(), rules.soft(gamma=0.7), rules.soft_expected(gamma=0.7), rules.switch(), rules.none()],
    ids=str,
)
def test_group_scale_restores_the_expected_gradient(rule: rules.Rule, direction: int, right: int) -> None:
    score_RN, right_R = _policy(right)
    q = right_R.mean()
    advantage_R = np.where(right_R, math.sqrt((1 - q) / q), -math.sqrt(q / (1 - q)))
    unfiltered_N = advantage_R @ score_RN / 64
    inputs = _inputs(advantage_R, direction=direction, reward_R=np.where(right_R, 1.0, -1.0))
    inner = rule(inputs)
    corrected = group_scale(rule=rule, c_max=math.inf, smooth=False)
    scale_R = corrected.scale(inputs, inner)
    assert np.ptp(scale_R) == 0.0
    passed_RN = (let_through(inputs, inner) * inner.advantage_R)[:, None] * score_RN
    assert np.abs(unfiltered_N).max() > 0.01
    np.testing.assert_allclose(scale_R @ passed_RN / 64, unfiltered_N, atol=1e-12, rtol=0)
    # And the verdict carries it, with the choice of the wrapped rule as it was.
    verdict = corrected(inputs)
    assert verdict.weight_R is not None
    np.testing.assert_array_equal(verdict.keep_R, inner.keep_R)
    np.testing.assert_array_equal(verdict.advantage_R, inner.advantage_R)
    np.testing.assert_allclose(verdict.weight_R, scale_R * (1.0 if inner.weight_R is None else inner.weight_R))
    if isinstance(rule, rules.hard):
        assert scale_R[0] == pytest.approx(1 / (1 - q) if direction > 0 else 1 / q)


def test_group_scale_by_hand() -> None:
    # Three groups: 2 of 8 right, all alike, 7 of 8 right; only right ones pass.
    def grpo(right: int) -> list[float]:
        q = right / 8
        return [math.sqrt((1 - q) / q)] * right + [-math.sqrt(q / (1 - q))] * (8 - right)

    advantage_R = np.array(grpo(2) + [0.0] * 8 + grpo(7))
    inputs = _inputs(advantage_R, group_R=np.repeat([4, 9, 2], 8))

    def scale(**options: Any) -> list[float]:
        verdict = group_scale(rule="hard", **options)(inputs)
        assert verdict.weight_R is not None
        return verdict.weight_R[::8].tolist()

    assert scale(smooth=False, c_max=math.inf) == pytest.approx([8 / 6, 1.0, 8.0])
    assert scale(smooth=False) == pytest.approx([8 / 6, 1.0, 4.0])
    # q = 3 / 10 and 8 / 10.
    assert scale() == pytest.approx([1 / 0.7, 1.0, 4.0])
    assert scale(c_max=9.0) == pytest.approx([1 / 0.7, 1.0, 5.0])
    verdict = group_scale(rule="hard", renormalise=True)(inputs)
    assert verdict.weight_R is not None
    size_R = np.abs(advantage_R) * verdict.keep_R
    assert (size_R * verdict.weight_R).sum() == pytest.approx(size_R.sum())
    # The same below the band: only wrong ones pass, 1 / q.
    below = group_scale(rule="hard", smooth=False)(_inputs(advantage_R, group_R=np.repeat([4, 9, 2], 8), direction=-1))
    assert below.weight_R is not None
    assert below.weight_R[::8].tolist() == pytest.approx([4.0, 1.0, 8 / 7])


def test_a_prompt_of_one_sign_and_one_of_which_nothing_passes() -> None:
    # Raw rewards as advantages: nothing to weigh against, so no smoothing; and hard rejects the second prompt.
    verdict = group_scale(rule="hard")(_inputs(np.array([1.0, 1.0, -1.0, -1.0]), group_R=np.array([0, 0, 1, 1])))
    assert verdict.weight_R is not None
    assert verdict.weight_R.tolist() == [1.0, 1.0, 0.0, 0.0]


def test_tempered_by_hand() -> None:
    advantage_R = np.array([1.0, -0.1, -0.5, -6.0])
    a_R = np.array([1.0, math.exp(-0.1), math.exp(-0.5), math.exp(-6.0)])
    inputs = _inputs(advantage_R)

    def weights(**options: Any) -> np.ndarray:
        verdict = tempered(rule=rules.soft_expected(gamma=1.0), **options)(inputs)
        assert verdict.weight_R is not None
        return verdict.weight_R

    np.testing.assert_allclose(weights(), a_R)
    np.testing.assert_allclose(weights(kappa=0.5), np.array([1.0, *np.sqrt(a_R[1:3]), 10 * a_R[3]]))
    np.testing.assert_allclose(weights(kappa=1.0, w_max=math.inf), np.ones(4))
    assert weights(kappa=0.5, self_normalised=True).mean() == pytest.approx(1.0)
    # Where it draws, what was kept is weighed by its chance and what was not by 0.
    drawn = tempered(rule={"name": "soft", "gamma": 1.0}, kappa=1.0)(inputs)
    assert drawn.weight_R is not None
    np.testing.assert_allclose(drawn.weight_R, np.where(drawn.keep_R, np.minimum(1 / a_R, 10.0), 0.0))


def test_tempered_at_one_takes_the_filter_out_on_average() -> None:
    advantage_R = np.repeat([0.4, -0.3, -1.2], 4000)
    names = np.arange(12000)
    inputs = _inputs(advantage_R, group_R=names // 8, sample_R=names % 8, seed=3)
    verdict = tempered(rule=rules.soft(gamma=1.0), kappa=1.0)(inputs)
    assert verdict.weight_R is not None
    for k, a in enumerate([1.0, math.exp(-0.3), math.exp(-1.2)]):
        mean = verdict.weight_R[4000 * k : 4000 * (k + 1)].mean()
        assert abs(mean - 1.0) <= 5 * math.sqrt((1 - a) / a / 4000)


@pytest.mark.parametrize("name", ["first_order", "budget"])
def test_single_tokens_pass_through(name: str, scored_batch: Callable[..., Any]) -> None:
    scored = scored_batch(3)
    target = float(scored.stats.entropy_T[scored.mask_T].double().mean()) - 0.3
    plain, scaled = (
        scored.decide(EntropyController(schedules.constant(target), rule), 0)
        for rule in (
            rules.build(name, level="token"),
            rules.build("group_scale", rule={"name": name, "level": "token"}),
        )
    )
    assert not scaled.bypassed
    assert torch.equal(plain.keep_T, scaled.keep_T)
    assert not bool(plain.keep_T.all())
    ratio_R = (scaled.advantage_R / plain.advantage_R)[plain.advantage_R != 0]
    assert float(ratio_R.max()) > 1.01
    assert float(ratio_R.min()) >= 0.9


def test_let_through_counts_tokens() -> None:
    inputs = _inputs(np.ones(2), rollout_T=np.array([0, 0, 0, 1]), mask_T=np.array([True, True, False, True]))
    kept = rules.Verdict(
        keep_R=np.ones(2, dtype=bool),
        advantage_R=np.ones(2),
        keep_T=np.array([True, False, True, True]),
        weight_R=np.array([3.0, 0.5]),
    )
    assert let_through(inputs, kept).tolist() == [1.5, 0.5]


def test_built_by_name() -> None:
    assert rules.build("group_scale", rule="hard", c_max=2.0) == group_scale(rule=rules.hard(), c_max=2.0)
    assert rules.build("tempered", rule="soft", kappa=0.5) == tempered(rule=rules.soft(), kappa=0.5)
    assert wrapped({"name": "soft", "gamma": 2.0}) == rules.soft(gamma=2.0)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: group_scale(rule="hrad"), "unknown rule 'hrad': did you mean 'hard'?"),
        (lambda: group_scale(rule="hard", c_max=0.5), "c_max = 0.5: expected >= 1"),
        (lambda: group_scale(rule={"gamma": 1.0}), "has no 'name'"),
        (lambda: rules.build("group_scale", rule=rules.hard), "expected a rule such as rules.hard()"),
        (lambda: tempered(rule="soft", kappa=1.5), "kappa = 1.5"),
        (lambda: tempered(rule="soft", w_max=0.0), "w_max = 0.0"),
        (lambda: tempered(rule="hard")(_inputs(np.ones(2))), "gives no chance of being kept"),
        (lambda: rules.build("group_scale"), "rule 'group_scale' was given []"),
    ],
)
def test_bad_input_is_named(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        make()


def _controller(target: float, rule: rules.Rule, **arguments: Any) -> EntropyController:
    return EntropyController(schedules.constant(target), rule, **arguments)


@dataclass(frozen=True)
class weighed:
    """Keeps all but rollout 0, or every second token, and weighs rollout r by r / 10, or by `weight`."""

    tokens: bool = False
    weight: Any = None

    def __call__(self, inputs: rules.RuleInputs) -> rules.Verdict:
        R = len(inputs.group_R)
        return rules.Verdict(
            keep_R=np.ones(R, dtype=bool) if self.tokens else np.arange(R) > 0,
            advantage_R=inputs.advantage_R,
            keep_T=np.arange(len(inputs.rollout_T)) % 2 == 0 if self.tokens else None,
            weight_R=np.arange(R) / 10 if self.weight is None else self.weight,
        )


@pytest.mark.parametrize("tokens", [False, True])
def test_weights_of_a_rule_reach_the_loss_and_the_prediction(tokens: bool, scored_batch: Callable[..., Any]) -> None:
    scored = scored_batch(4)
    decision = scored.decide(_controller(1.0, weighed(tokens=tokens)), 0)
    weight_R = torch.arange(96) / 10
    torch.testing.assert_close(decision.advantage_R[1:], (scored.advantage_R * weight_R)[1:])
    # A weight of 0 is a rejection, whose advantage nobody reads.
    assert not decision.keep_R[0]
    assert not decision.keep_T[scored.rollout_T == 0].any()
    assert decision.advantage_R[0] == scored.advantage_R[0] != 0
    # The first-order change of the update itself: plain policy gradient with the weighed advantages on what is kept.
    kept_T = (scored.mask_T & decision.keep_T).double()
    advantage_T = decision.advantage_R[scored.rollout_T].double()
    change_T = predicted_entropy_change(
        scored.stats, lambda x: -(kept_T * advantage_T * x).sum() / int(scored.mask_T.sum())
    )
    assert abs(float(change_T.double().sum())) > 1e-4
    assert decision.metrics["predicted_change_kept"] == pytest.approx(float(change_T.double().sum()), rel=1e-4)


@pytest.mark.parametrize("value", [-0.5, math.nan, math.inf])
def test_weights_must_be_finite_and_not_negative(value: float, scored_batch: Callable[..., Any]) -> None:
    with pytest.raises(ValueError, match="a weight_R that is negative or not finite"):
        scored_batch(4).decide(_controller(1.0, weighed(weight=np.full(96, value))), 0)
    with pytest.raises(ValueError, match=r"weight_R of shape \(95,\)"):
        scored_batch(4).decide(_controller(1.0, weighed(weight=np.ones(95))), 0)


def test_soft_expected_is_the_mean_of_soft(scored_batch: Callable[..., Any]) -> None:
    scored = scored_batch(6)
    target = float(scored.stats.entropy_T[scored.mask_T].double().mean()) - 0.3
    expected = scored.decide(_controller(target, rules.soft_expected(gamma=0.7)), 0)
    assert bool(expected.keep_R.all())
    torch.testing.assert_close(
        expected.advantage_R, scored.advantage_R * (0.7 * scored.advantage_R).clamp(max=0.0).exp()
    )
    soft = [scored.decide(_controller(target, rules.soft(gamma=0.7), seed=seed), 0) for seed in range(200)]
    mean_R = torch.stack([one.advantage_R * one.keep_R for one in soft]).mean(0)
    # Five standard deviations of a draw at worst, chance one half.
    error_R = (mean_R - expected.advantage_R).abs() / scored.advantage_R.abs().clamp(min=1e-6)
    assert float(error_R.max()) <= 5 * 0.5 / math.sqrt(200)
