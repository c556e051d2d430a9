"""Every rule with every advantage and every loss: what is kept, what is predicted, what is learnt.

The policy losses are written out a second time below, the rules in `rules_by_hand.py`, in NumPy; slopes are central
differences in the logits. What a loss takes for a constant (GSPO's mean, CISPO's weight) stands still in the
differences. Methods that add to PPO's loss, or change what goes into it, are written out in `test_methods.py`; here
their gradient is the slope of their own value.
"""

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from combinations import (
    BASE,
    ENTROPY_SLOPE_TV,
    GROUP_R,
    LOGITS_TV,
    MASK_T,
    METHOD_NAMES,
    METHOD_STATES,
    NOT_PROPORTIONAL,
    NUDGED_LOGP,
    OLD,
    OPTIONS,
    PAID_FOR_ENTROPY,
    ROLLOUT,
    ROLLOUT_T,
    RULES,
    SHIFT,
    STATS,
    TEMPERATURE,
    H,
    R,
    T,
    V,
    asked,
    combinations,
    decision_on,
    entropy_for,
    estimate_of,
    everything_kept,
    gain_of,
    objective_of,
    slope_of,
    stats_at,
)
from rules_by_hand import Case, verdict_of
from torch import Tensor

from entrocraft import EntropyController, advantages, corrections, rules, schedules
from entrocraft.methods import METHODS
from entrocraft.prediction import predicted_entropy_change
from entrocraft.surrogates import LOSSES


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """Tensors this small are not shared out; a second thread would spin beside the first, five times the work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# The losses once more.


def _sequence_mean(value_T: np.ndarray, mask_T: np.ndarray) -> np.ndarray:
    mean_T = np.zeros(T)
    for r in range(R):
        mine_T = np.equal(ROLLOUT, r)
        if (mine_T & mask_T).any():
            mean_T[mine_T] = value_T[mine_T & mask_T].mean()
    return mean_T


def _clipped(ratio: np.ndarray, a_T: np.ndarray, low: Any, high: Any) -> np.ndarray:
    return np.where(a_T > 0, -np.minimum(ratio, high) * a_T, -np.maximum(ratio, low) * a_T)


def _ppo(logp: np.ndarray, a_T: np.ndarray, high: float) -> np.ndarray:
    loss = _clipped(np.exp(logp - OLD), a_T, 0.8, high)
    return np.where(a_T < 0, np.minimum(loss, -3.0 * a_T), loss)


def _gspo(logp: np.ndarray, a_T: np.ndarray, mask_T: np.ndarray) -> np.ndarray:
    ratio = np.exp(_sequence_mean(BASE - OLD, mask_T) + logp - BASE)
    return _clipped(ratio, a_T, 1 - 3e-4, 1 + 4e-4)


def _geo_mean(logp: np.ndarray, a_T: np.ndarray, mask_T: np.ndarray) -> np.ndarray:
    def bounded(value: np.ndarray) -> np.ndarray:
        return np.where(a_T > 0, np.minimum(value - OLD, 0.4), np.maximum(value - OLD, -0.4))

    return -np.exp(_sequence_mean(bounded(BASE), mask_T) + bounded(logp) - bounded(BASE)) * a_T


def _sapo(logp: np.ndarray, a_T: np.ndarray, mask_T: np.ndarray) -> np.ndarray:
    tau_T = np.where(a_T > 0, 1.0, 1.05)
    return -4.0 * a_T / tau_T / (1.0 + np.exp(-tau_T * (np.exp(logp - OLD) - 1.0)))


def _probability_clip(logp: np.ndarray, a_T: np.ndarray, mask_T: np.ndarray) -> np.ndarray:
    p_T = np.exp(OLD)
    return _clipped(np.exp(logp - OLD), a_T, 0.7 / (1.0 - 0.13 * p_T), 1.5 / (1.0 + 0.25 * p_T))


WRITTEN_OUT: dict[str, Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]] = {
    "ppo_clip": lambda logp, a_T, mask_T: _ppo(logp, a_T, 1.2),
    "clip_higher": lambda logp, a_T, mask_T: _ppo(logp, a_T, 1.28),
    "unclipped": lambda logp, a_T, mask_T: -np.exp(logp - OLD) * a_T,
    "gspo": _gspo,
    "cispo": lambda logp, a_T, mask_T: -np.minimum(np.exp(BASE - OLD), 1.2) * a_T * logp,
    "geo_mean": _geo_mean,
    "sapo": _sapo,
    "gpg": lambda logp, a_T, mask_T: -a_T * logp,
    "probability_clip": _probability_clip,
}


def _loss_slope(loss: str, advantage_R: Tensor, mask_T: Tensor, keep_T: Tensor) -> np.ndarray:
    """Of the token mean of the loss written out, `[T, V]`."""
    a_T, counted = advantage_R.double().numpy()[ROLLOUT], mask_T.numpy()
    weight_T = counted * keep_T.numpy() / counted.sum()
    return weight_T[:, None] * slope_of(WRITTEN_OUT[loss](NUDGED_LOGP, a_T, counted))


def case_of(loss: str, advantage: str, direction: int) -> Case:
    estimate = estimate_of(advantage)
    change_T = predicted_entropy_change(STATS, everything_kept(loss, estimate), temperature=TEMPERATURE).numpy()
    return Case(
        m=direction,
        a_R=estimate.advantage_R.double().numpy(),
        change_T=change_T,
        change_R=np.array([math.fsum(change_T[np.equal(ROLLOUT, r)]) for r in range(R)]),
        want=math.nan,  # depends on the rule
        counted_T=estimate.mask_T.numpy(),
    )


def test_nothing_is_left_out() -> None:
    assert {name.split()[0] for name in RULES} == set(rules.RULES)
    assert set(WRITTEN_OUT) == set(LOSSES)
    assert not set(LOSSES) & set(METHODS)
    assert {*METHOD_STATES, *OPTIONS, *PAID_FOR_ENTROPY} <= set(METHOD_NAMES)
    assert not MASK_T[torch.isin(ROLLOUT_T, torch.tensor([8, 13]))].any()


@pytest.mark.parametrize("loss", LOSSES)
def test_the_prediction_is_that_of_the_loss(loss: str) -> None:
    for advantage in advantages.ADVANTAGES:
        estimate = estimate_of(advantage)
        slope_TV = _loss_slope(loss, estimate.advantage_R, estimate.mask_T, torch.ones(T, dtype=torch.bool))
        expected_T = -(slope_TV * ENTROPY_SLOPE_TV).sum(-1)
        change_T = predicted_entropy_change(STATS, everything_kept(loss, estimate), temperature=TEMPERATURE).numpy()
        size = np.abs(change_T).max()
        assert np.isfinite(change_T).all()
        assert size > 1e-4, advantage
        np.testing.assert_allclose(change_T, expected_T, rtol=1e-5, atol=1e-7 * size, err_msg=advantage)
        sure_T = np.abs(expected_T) > 1e-6 * size
        assert (np.sign(change_T) == np.sign(expected_T))[sure_T].all(), advantage
        assert not change_T[~estimate.mask_T.numpy()].any(), advantage


@pytest.mark.parametrize("method", METHOD_NAMES)
def test_the_prediction_is_that_of_the_method(method: str) -> None:
    # One logit of a row, times its slope of entropy, is one log-probability: a token's is moved by what its V logits
    # together would, all tokens at once with a number c of their own, and the loss must move by sum of c D.
    moves_T = (slope_of(NUDGED_LOGP) * ENTROPY_SLOPE_TV).sum(-1)
    base, nothing = torch.from_numpy(BASE), 0
    for advantage in advantages.ADVANTAGES:
        loss_fn = everything_kept(method, estimate_of(advantage))
        change_T = predicted_entropy_change(STATS, loss_fn, temperature=TEMPERATURE).numpy()
        size, plain = np.abs(change_T).sum(), case_of("ppo_clip", advantage, 1).change_T
        assert np.isfinite(change_T).all()
        assert size > 1e-3, advantage
        assert not change_T[~estimate_of(advantage).mask_T.numpy()].any(), advantage
        nothing += np.array_equal(change_T, plain)
        for seed in range(3):
            c_T = np.random.default_rng(seed).standard_normal(T)
            step_T = torch.from_numpy(H * c_T * moves_T)
            slope = float(loss_fn(base + step_T) - loss_fn(base - step_T)) / (2 * H)
            assert -slope == pytest.approx(float((c_T * change_T).sum()), rel=1e-5, abs=1e-7 * size), advantage
    # Those that pay for entropy, and they alone, leave what log-probabilities are worth as it is in PPO's loss.
    assert (nothing == len(advantages.ADVANTAGES)) == (method in PAID_FOR_ENTROPY)


@pytest.mark.parametrize("method", METHOD_NAMES)
def test_every_gradient_is_the_slope_of_its_method(method: str) -> None:
    line_TV = torch.randn(T, V, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    logits_TV = LOGITS_TV.clone().requires_grad_()
    nudge = H / 5  # what kl_cov penalises has a kink at 0, where many tokens stand: an error of the order of the nudge
    moved = (logits_TV, LOGITS_TV - nudge * line_TV, LOGITS_TV + nudge * line_TV)
    here, before, after = [(stats_at(moved_TV).logprob_T, entropy_for(method, moved_TV)) for moved_TV in moved]
    rejected = 0
    for advantage, rule, direction, decision in combinations(method):
        mask_T, what = estimate_of(advantage).mask_T, (advantage, rule, direction)
        objective = objective_of(method, decision.advantage_R, mask_T, decision.keep_T)
        value, low, high = (objective(*stats, slice(0, T)) for stats in (here, before, after))
        of_policy_T, of_entropy_T = torch.autograd.grad(value, here, retain_graph=True, allow_unused=True)
        assert not of_policy_T[~(decision.keep_T & mask_T)].any(), what
        # A rejected token teaches nothing, but the mean entropy that is paid for has it in it.
        if method in PAID_FOR_ENTROPY:
            assert bool((of_entropy_T[mask_T] != 0).all()), what
        else:
            assert of_entropy_T is None or not of_entropy_T.any(), what
        rejected += int((~decision.keep_T & mask_T).sum())
        (gradient_TV,) = torch.autograd.grad(value, logits_TV, retain_graph=True)
        expected = float((gradient_TV * line_TV).sum())
        assert float(high - low) / (2 * nudge) == pytest.approx(expected, rel=1e-5, abs=1e-8), what
    assert rejected > 10 * T


@pytest.mark.parametrize("loss", [*LOSSES, *METHOD_NAMES])
def test_every_decision_is_the_definition_of_its_rule(loss: str) -> None:
    partial, weighed = dict.fromkeys(RULES, 0), dict.fromkeys(RULES, 0)
    for advantage, direction in asked():
        case = case_of(loss, advantage, direction)
        for rule in RULES:
            decision, what = decision_on(loss, advantage, rule, direction), f"{advantage} {rule} {direction}"
            keep, a_R = verdict_of(rule, case._replace(want=-SHIFT * direction / gain_of(rule)))
            keep_T = keep if "token" in rule else keep[ROLLOUT]
            useful = bool((keep_T & case.counted_T).any())
            assert decision.bypassed is not useful, what
            if decision.bypassed:
                keep_T, a_R = np.ones(T, dtype=bool), case.a_R
            partial[rule] += int(0 < keep_T.sum() < T)
            weighed[rule] += int((a_R != case.a_R).any())
            np.testing.assert_array_equal(decision.keep_T.numpy(), keep_T, err_msg=what)
            np.testing.assert_allclose(decision.advantage_R.numpy(), a_R, rtol=1e-6, atol=1e-9, err_msg=what)
    choosy = [rule for rule in RULES if rule.split()[0] in ("soft", "hard", "first_order", "budget")]
    assert min(partial[rule] for rule in choosy) >= 8, partial
    weighing = [rule for rule in RULES if rule.split()[0] in ("soft_expected", "group_scale", "tempered")]
    assert min(weighed[rule] for rule in (*weighing, "budget token weighed")) >= 8, weighed


@pytest.mark.parametrize("loss", LOSSES)
def test_every_gradient_is_that_of_the_loss_written_out(loss: str) -> None:
    logits_TV = LOGITS_TV.clone().requires_grad_()
    stats, rejected = stats_at(logits_TV), 0
    for advantage, rule, direction, decision in combinations(loss):
        mask_T, what = estimate_of(advantage).mask_T, f"{advantage} {rule} {direction}"
        value = objective_of(loss, decision.advantage_R, mask_T, decision.keep_T)(
            stats.logprob_T, stats.entropy_T, slice(0, T)
        )
        (gradient_TV,) = torch.autograd.grad(value, logits_TV, retain_graph=True)
        out_T = ~(decision.keep_T & mask_T)
        rejected += int((~decision.keep_T & mask_T).sum())
        assert not gradient_TV[out_T].any(), what
        expected_TV = _loss_slope(loss, decision.advantage_R, mask_T, decision.keep_T)
        np.testing.assert_allclose(gradient_TV.numpy(), expected_TV, rtol=1e-5, atol=1e-7 / T, err_msg=what)
    assert rejected > 10 * T


@pytest.mark.parametrize("loss", [name for name in LOSSES if name != "cispo"])
def test_whole_rollouts_under_the_mean_of_sequences_have_the_gradient_of_their_value(loss: str) -> None:
    # Nothing stands still here, so what the losses of a sequence take for constants must cancel; CISPO's value is none.
    line_TV = torch.randn(T, V, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    logits_TV = LOGITS_TV.clone().requires_grad_()
    here, before, after = (
        stats_at(moved_TV) for moved_TV in (logits_TV, LOGITS_TV - H * line_TV, LOGITS_TV + H * line_TV)
    )
    for advantage, rule, direction, decision in combinations(loss):
        if "token" in rule:
            continue
        mask_T = estimate_of(advantage).mask_T
        objective = objective_of(loss, decision.advantage_R, mask_T, decision.keep_T, "seq_mean_token_mean")
        value, low, high = (objective(stats.logprob_T, stats.entropy_T, slice(0, T)) for stats in (here, before, after))
        (gradient_TV,) = torch.autograd.grad(value, logits_TV, retain_graph=True)
        slope, expected = float(high - low) / (2 * H), float((gradient_TV * line_TV).sum())
        assert slope == pytest.approx(expected, rel=1e-5, abs=1e-8), (advantage, rule, direction)


def test_what_rejects_for_certain_has_no_chance_to_divide_by() -> None:
    tempered = corrections.tempered(rule="hard", kappa=0.5)
    with pytest.raises(ValueError, match="gives no chance of being kept"):
        EntropyController(schedules.constant(1.0), tempered).decide(
            step=0, stats=STATS, rollout_T=ROLLOUT_T, group_R=GROUP_R, advantage_R=estimate_of("grpo").advantage_R
        )


@pytest.mark.parametrize("loss", [*LOSSES, *METHOD_NAMES])
def test_what_a_decision_says_it_keeps_is_the_change_of_the_objective_made_of_it(loss: str) -> None:
    weighed, apart = 0, 0
    for advantage, rule, direction, decision in combinations(loss):
        said, mask_T, what = decision.metrics["predicted_change_kept"], estimate_of(advantage).mask_T, (advantage, rule)
        if math.isnan(said):
            assert (rule, direction != 0) == ("switch", True), what
            continue
        objective = objective_of(loss, decision.advantage_R, mask_T, decision.keep_T)
        loss_fn = functools.partial(objective, entropy_N=STATS.entropy_T, rows=slice(0, T))
        change_T = predicted_entropy_change(STATS, loss_fn, temperature=TEMPERATURE)
        size, change = float(change_T.abs().sum()), float(change_T.sum())
        close = said == pytest.approx(change, rel=1e-6, abs=1e-7 * size)
        if decision.metrics["weight_min"] == decision.metrics["weight_max"] == 1.0:
            assert close, (*what, direction)
        else:
            weighed, apart = weighed + 1, apart + (not close)
    assert weighed > 100
    assert (apart > 0) == (loss in NOT_PROPORTIONAL), apart
