"""Rollouts of which no token counts: a batch is judged, and counted, as if they were not in it."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from entrocraft import EntropyController, rules, schedules
from entrocraft.corrections import group_scale
from entrocraft.rules import Rule

DETERMINISTIC: list[Rule] = [
    rules.hard(),
    rules.soft_expected(gamma=0.7),
    rules.switch(),
    *(make(level=level) for make in (rules.first_order, rules.budget) for level in rules.LEVELS),
    rules.budget(level="token", max_weight=4.0),
    *(group_scale(rule=rule, renormalise=True) for rule in (rules.hard(), rules.first_order(level="token"))),
]


def _without(scored: Any, gone_R: torch.Tensor) -> tuple[Any, dict[str, torch.Tensor]]:
    """The batch with those rollouts masked; and the arguments of the same batch without them."""
    gone_T = gone_R[scored.rollout_T]
    left_R, left_T = ~gone_R, (~gone_T).nonzero().flatten()
    number_R = torch.cumsum(left_R, 0) - 1
    rest = {
        "stats": scored.stats.index(left_T),
        "rollout_T": number_R[scored.rollout_T[left_T]],
        "mask_T": scored.mask_T[left_T],
        **{name: getattr(scored, name)[left_R] for name in ("group_R", "reward_R", "advantage_R", "sample_R")},
    }
    return scored._replace(mask_T=scored.mask_T & ~gone_T), rest


def _decide(rule: Rule, scored: Any, entropy: float, shift: float, **changes: Any) -> Any:
    controller = EntropyController(schedules.constant(entropy + shift), rule, width=0.01)
    return scored.decide(controller, 0, **{"sample_R": scored.sample_R} | changes)


@pytest.mark.parametrize("rule", DETERMINISTIC, ids=str)
@pytest.mark.parametrize("shift", [-0.1, 0.1])
def test_masked_rollouts_change_nothing(rule: Rule, shift: float, scored_batch: Callable[..., Any]) -> None:
    scored = scored_batch(1)
    gone_R = torch.rand(96, generator=torch.Generator().manual_seed(3)) < 0.4
    masked, rest = _without(scored, gone_R)
    entropy = float(masked.stats.entropy_T[masked.mask_T].double().mean())
    ours, alone = _decide(rule, masked, entropy, shift), _decide(rule, scored, entropy, shift, **rest)
    assert not ours.bypassed
    counted_T = masked.mask_T[~gone_R[scored.rollout_T]]
    kept_T = ours.keep_T[~gone_R[scored.rollout_T]]
    assert 0 < int((kept_T & counted_T).sum()) <= int(counted_T.sum())
    assert torch.equal(kept_T & counted_T, alone.keep_T & counted_T)
    torch.testing.assert_close(ours.advantage_R[~gone_R], alone.advantage_R, rtol=1e-6, atol=1e-7)
    shares = ("active_fraction", "active_fraction_negative", "authority")
    for name in shares:  # of all rollouts, masked or not
        assert 96 * ours.metrics[name] == pytest.approx(int((~gone_R).sum()) * alone.metrics[name])
    for name in ("kept_groups", "kept_token_fraction", "predicted_change_kept", "reach"):
        assert ours.metrics[name] == pytest.approx(alone.metrics[name], rel=1e-9, nan_ok=True), name


@pytest.mark.parametrize("rule", [rules.first_order(), rules.budget()], ids=str)
def test_a_step_of_masked_rollouts_alone_is_starved(rule: Rule, scored_batch: Callable[..., Any]) -> None:
    """All that counts lowers the entropy, the target is above it: what would be kept is masked, and teaches nothing."""
    scored = scored_batch(2)
    controller = EntropyController(schedules.constant(9.0), rules.first_order())
    with pytest.warns(UserWarning, match="far above"):
        raising_R = scored.decide(controller, 0).keep_R  # those that lower it are rejected
    assert 20 < int(raising_R.sum()) < 76
    masked, _ = _without(scored, raising_R)
    with pytest.warns(UserWarning, match="far above"):
        decision = _decide(rule, masked, 0.0, 9.0)
    assert decision.bypassed
    assert "starved: 0 of 96 rollouts are kept" in decision.reason
    assert bool(decision.keep_T.all())


def test_without_a_counted_token_there_is_no_authority(scored_batch: Callable[..., Any]) -> None:
    scored = scored_batch(1)
    one = int((scored.advantage_R != 0).nonzero()[0])
    masked, _ = _without(scored, torch.arange(96) != one)
    decision = _decide(rules.hard(), masked, 0.0, 0.0)
    assert decision.bypassed
    assert "no authority: 1 of 96 rollouts" in decision.reason
    assert decision.metrics["authority"] == 1 / 96


def test_what_release_sees_kept_is_of_what_counts(scored_batch: Callable[..., Any]) -> None:
    """Thirty steps that keep little of what counts let go; what was masked beside it was not kept for anything."""
    scored = scored_batch(1)
    kept = _decide(rules.hard(), scored, 0.0, 0.0).keep_R.nonzero().flatten()
    gone_R = torch.zeros(96, dtype=torch.bool)
    gone_R[kept[8:]] = True
    masked, _ = _without(scored, gone_R)
    counting = (masked.rollout_T[masked.mask_T]).unique()
    share = len(set(counting.tolist()) & set(kept.tolist())) / len(counting)
    assert share < 0.25 < len(kept) / 96
    controller = EntropyController(schedules.constant(0.0), rules.hard(), min_groups=0)
    decisions = [masked.decide(controller, step) for step in range(32)]
    assert decisions[0].metrics["kept_fraction"] == len(kept) / 96
    assert [decision.metrics["released"] for decision in decisions] == [0.0] * 30 + [1.0] * 2
    assert f"this one keeps {share:.1%}" in decisions[30].reason
