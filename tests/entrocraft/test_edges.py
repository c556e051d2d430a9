"""What a stranger may give: numbers of other kinds, NaN outside the mask, classes for values, states of others."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from entrocraft import (
    EntropyController,
    PeakKeeper,
    PolicyObjective,
    PPOClip,
    TokenStats,
    advantages,
    predicted_entropy_change,
    rules,
    schedules,
)
from entrocraft.entropy_bonus import AdaptiveBonus
from entrocraft.methods import Signal, Tokens, build, make_objective
from entrocraft.probability_clip import ProbabilityClip
from entrocraft.release import Release
from entrocraft.surrogates import LOSSES, build_loss


def test_an_infinite_reward_is_named(scored_batch: Callable[..., Any]) -> None:
    scored = scored_batch(1)
    reward_R = scored.reward_R.clone()
    reward_R[7] = math.inf
    controller = EntropyController(schedules.constant(1.0), rules.hard())
    before = controller.state_dict()
    with pytest.raises(ValueError, match=r"reward_R\[7\] = inf: expected a finite reward, or NaN for 'no verdict'"):
        scored.decide(controller, 0, reward_R=reward_R)
    with pytest.raises(ValueError, match=r"reward_R\[7\] = inf"):
        scored.decide(controller, 0, sampled=(reward_R, scored.group_R))
    assert controller.state_dict() == before


@pytest.mark.parametrize("kind", [torch.tensor, np.float32, np.float64])
def test_a_schedule_may_give_any_scalar(kind: Callable[..., Any], scored_batch: Callable[..., Any]) -> None:
    scored = scored_batch(1)
    controller = EntropyController(lambda step: kind(0.5 - 0.25 * step), "first_order", initial_gain=kind(8.0))
    plain = EntropyController(lambda step: 0.5 - 0.25 * step, "first_order", initial_gain=8.0)
    for step in (0, 1):
        decision, same = scored.decide(controller, step), scored.decide(plain, step)
        assert torch.equal(decision.keep_R, same.keep_R)
        assert {type(value) for value in decision.metrics.values()} == {float}
        assert decision.metrics == pytest.approx(same.metrics, nan_ok=True)
    state = json.loads(json.dumps(controller.state_dict()))
    controller.load_state_dict(state)
    assert controller.state_dict() == state == plain.state_dict()
    values: list[Any] = [None, "0.5"]
    for value in values:
        with pytest.raises(ValueError, match=f"the schedule gives {value!r} at step 1: expected a number of nats"):
            scored.decide(EntropyController(lambda step, value=value: value if step else 1.0, "hard"), 0)


def test_statistics_in_half_precision_and_temperatures_that_require_grad(scored_batch: Callable[..., Any]) -> None:
    scored = scored_batch(1)
    controller = EntropyController(schedules.constant(0.5), rules.budget())
    temperature_T = torch.full_like(scored.stats.logprob_T, 0.9, dtype=torch.float64).requires_grad_(True)
    exact = scored.decide(controller, 0, temperature=0.9)
    again = scored.decide(EntropyController(schedules.constant(0.5), rules.budget()), 0, temperature=temperature_T)
    assert torch.equal(exact.keep_R, again.keep_R)
    assert again.metrics["predicted_change_all"] == pytest.approx(exact.metrics["predicted_change_all"], rel=1e-5)
    change_T = predicted_entropy_change(scored.stats, lambda logprob_T: -logprob_T.sum(), temperature=temperature_T)
    assert (change_T.dtype, change_T.requires_grad) == (torch.float32, False)
    rounded = type(scored.stats)(**{name: value.bfloat16() for name, value in scored.stats.as_dict().items()})
    coarse = scored.decide(EntropyController(schedules.constant(0.5), rules.budget()), 0, stats=rounded)
    assert coarse.metrics["entropy"] == pytest.approx(exact.metrics["entropy"], rel=4e-3)
    predicted = 0.81 * exact.metrics["predicted_change_all"]
    assert coarse.metrics["predicted_change_all"] == pytest.approx(predicted, rel=0.05)
    with torch.inference_mode(), pytest.raises(ValueError, match=r"within torch.inference_mode.*use torch.no_grad"):
        scored.decide(controller, 1, loss_fn=lambda logprob_T: -logprob_T.sum())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rule": rules.budget}, r"rule = <class .*budget'>: expected a rule such as rules.hard\(\), its name"),
        ({"rule": None}, "rule = None: expected a rule"),
        ({"rule": rules.hard(), "release": False}, "release = False: expected a Release, or None for never"),
        ({"rule": rules.hard(), "release": Release}, "release = <class .*Release'>: expected a Release"),
    ],
)
def test_a_controller_refuses_at_once_what_it_could_not_use(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EntropyController(schedules.constant(0.5), **arguments)
    named = EntropyController(schedules.constant(0.5), {"name": "soft", "gamma": 5.0})  # type: ignore[arg-type]
    assert named._rule == rules.soft(gamma=5.0)


def test_a_measured_schedule_that_builds_a_number_is_named(scored_batch: Callable[..., Any]) -> None:
    controller = EntropyController(schedules.measured(lambda entropy: 0.5 * entropy), "hard")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"build\(.*\) holds 0\.\d+: expected a function of the step"):
        scored_batch(1).decide(controller, 0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gain": -10.0}, "gain = -10.0: expected > 0"),
        ({"gain": 0.0}, "gain = 0.0: expected > 0"),
        ({"decided": -5}, "decided = -5: expected >= 0"),
        ({"denominator": -1.0}, "denominator = -1.0: expected >= 0"),
        ({"excess": None}, "anchor = .* and excess = None: expected two numbers"),
    ],
)
def test_states_out_of_range_are_refused(
    change: dict[str, Any], message: str, scored_batch: Callable[..., Any]
) -> None:
    controller = EntropyController(schedules.constant(0.5), "hard")
    scored_batch(1).decide(controller, 0)
    state = controller.state_dict()
    with pytest.raises(ValueError, match=message):
        controller.load_state_dict(state | change)
    assert controller.state_dict() == state
    keeper = PeakKeeper(delta=0.1, patience=3)
    for best in (math.nan, True):
        with pytest.raises(ValueError, match=f"best = {best}: expected a finite number"):
            keeper.load_state_dict({"step": 3, "best": best, "best_step": 3, "below": 0})


@pytest.mark.parametrize("changes", [{"entropy": math.nan}, {"target": math.inf}, {"clamped_entropy": math.nan}])
def test_a_signal_that_a_method_would_remember_for_good_is_refused(changes: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(changes))} = .*: expected finite nats"):
        Signal(**({"step": 0, "steps": 9, "entropy": 1.0} | changes))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="step = -2: expected an integer >= 0"):
        Signal(step=-2, steps=9, entropy=1.0)


def test_the_adaptive_bonus_moves_before_it_is_used() -> None:
    method, state, used = AdaptiveBonus(target=1.0, initial=0.3, delta=0.1), {}, []
    for step, entropy in enumerate((0.5, 0.5, 1.5, 0.5, 0.5)):
        state = method.observe(state, Signal(step=step, steps=5, entropy=entropy))
        used.append(state["used"])
    # c: 0.3 at first; of the entropy of the step before: up, up, down, up.
    assert used == pytest.approx([0.0, 0.4, 0.5, 0.0, 0.5])


def _tokens(scored: Any, **changes: Any) -> Tokens:
    fields = {
        "stats": scored.stats, "old_logprob_T": scored.stats.logprob_T - 0.3, "mask_T": scored.mask_T,
        "advantage_T": scored.advantage_R[scored.rollout_T], "rollout_T": scored.rollout_T, "group_R": scored.group_R,
    }  # fmt: skip
    return Tokens(**(fields | changes))


def test_a_state_or_a_loss_of_something_else_is_named(scored_batch: Callable[..., Any]) -> None:
    tokens = _tokens(scored_batch(1))
    with pytest.raises(
        ValueError, match=r"state = \{\} has no 'alpha', which Entropic.* reads: give what its `observe`"
    ):
        make_objective(build("entropic", target=1.0), tokens, {}, aggregation="token_mean")
    for loss_fn in ("gspo", PPOClip):
        with pytest.raises(ValueError, match=r"loss_fn = .*expected a function of .*build_loss"):
            make_objective(build("plain", loss_fn=loss_fn), tokens, {}, aggregation="token_mean")


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_nan_outside_the_mask_reaches_no_loss_and_no_gradient(name: str, scored_batch: Callable[..., Any]) -> None:
    scored = scored_batch(1)
    method = build("entropy_bonus", loss_fn=build_loss(name), coefficient=0.1)
    clean = make_objective(method, _tokens(scored), {}, aggregation="seq_mean_token_mean")
    bad_T = ~scored.mask_T

    def spoiled(value_T: torch.Tensor) -> torch.Tensor:
        return torch.where(bad_T, math.nan, value_T)

    dirty = replace(clean, old_logprob_T=spoiled(clean.old_logprob_T), advantage_T=spoiled(clean.advantage_T))
    whole, found = slice(0, len(bad_T)), []
    for objective, given in ((clean, lambda value_T: value_T), (dirty, spoiled)):
        leaves = [
            given(value_T).clone().requires_grad_(True) for value_T in (scored.stats.logprob_T, scored.stats.entropy_T)
        ]
        loss = objective(leaves[0], leaves[1], whole)
        found.append((loss.detach(), *torch.autograd.grad(loss, leaves)))
    for ours, expected in zip(found[1], found[0], strict=True):
        assert bool(torch.isfinite(expected).all())
        assert torch.equal(ours, expected)
    assert float(found[0][1].abs().sum()) > 0.1


def test_a_term_without_an_advantage_is_a_term() -> None:
    """What `PolicyObjective` promises of tokens without a gradient, by autograd: built-in losses have none there."""
    old_T, advantage_T = torch.tensor([-0.9, -0.5, -1.1, -2.0]), torch.tensor([1.0, 0.0, -1.0, 0.0])
    for name in LOSSES:
        objective = PolicyObjective(
            loss_fn=build_loss(name), old_logprob_T=old_T, advantage_T=advantage_T,
            weight_T=torch.full((4,), 0.25), lengths_R=[1, 1, 1, 1],
        )  # fmt: skip
        leaf_T = old_T.clone().requires_grad_(True)
        (gradient_T,) = torch.autograd.grad(objective(leaf_T, leaf_T, slice(0, 4)), leaf_T)
        assert torch.equal(gradient_T != 0, objective.active_T), name


def test_what_the_clamp_removes_is_said_to_be_clipped() -> None:
    loss_fn, old_T = ProbabilityClip(), torch.full((6,), -25.0)
    logprob_T = (old_T + torch.tensor([-24.0, 24.0, -24.0, 24.0, 0.0, 24.0])).requires_grad_(True)
    advantage_T = torch.tensor([1.0, 1.0, -1.0, -1.0, 1.0, 0.0])
    (gradient_T,) = torch.autograd.grad(loss_fn(logprob_T, old_T, advantage_T).sum(), logprob_T)
    clipped = loss_fn.clipped(logprob_T, old_T, advantage_T)
    assert clipped["high"].tolist() == [False, True, False, True, False, False]
    assert clipped["low"].tolist() == [True, False, True, False, False, False]
    assert torch.equal((gradient_T == 0) & (advantage_T != 0), clipped["high"] | clipped["low"])


def test_release_watches_what_was_sampled_not_what_is_left_of_it() -> None:
    """Easy prompts are solved one by one and leave the batch: what is left earns less, though each earns ever more."""
    rng, group_R = np.random.default_rng(0), torch.arange(64).repeat_interleave(8)
    told, blind = (EntropyController(schedules.constant(0.0), rules.hard()) for _ in range(2))
    released, rewards = {"told": 0, "blind": 0}, []
    for step in range(120):
        chance_P = np.where(np.arange(64) % 10 < 7, 0.6 + 0.4 * min(step / 60, 1.0), 0.1 + 0.2 * step / 120)
        reward_PG = (rng.random((64, 8)) < chance_P[:, None]).astype(np.float32)
        rewards.append(float(reward_PG.mean()))
        reward_R, left_R = torch.from_numpy(reward_PG.reshape(-1)), torch.from_numpy((reward_PG.std(1) > 0).repeat(8))
        one_T = torch.ones(int(left_R.sum()))
        batch: dict[str, Any] = {
            "stats": TokenStats(logprob_T=-one_T, entropy_T=one_T, lse_T=one_T), "rollout_T": torch.arange(len(one_T)),
            "group_R": group_R[left_R], "reward_R": reward_R[left_R],
            "advantage_R": advantages.grpo(reward_R[left_R], group_R[left_R]),
        }  # fmt: skip
        whole: dict[str, Any] = {"sampled": (reward_R, group_R)}
        for name, controller, more in (("told", told, whole), ("blind", blind, {})):
            decision = controller.decide(step=step, **(batch | more))
            released[name] += int(decision.metrics["released"])
            if more:
                assert decision.metrics["reward_mean"] == pytest.approx(np.mean(rewards[-10:]), abs=0.05)
    assert rewards[-1] > rewards[0] + 0.1
    assert released["told"] == 0 < released["blind"]
