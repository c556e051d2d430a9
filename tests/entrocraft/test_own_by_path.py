"""Parts of a user's own, named by import path: one of every kind, and what it does to numbers."""

from collections.abc import Callable

import numpy as np
import pytest
import torch

from entrocraft import EntropyController, advantages, kl, methods, rules, schedules, surrogates, token_weights
from entrocraft.methods import Tokens, make_objective

OWN = """
import math
from dataclasses import dataclass
import numpy as np
import torch
from entrocraft.methods import Stateless, Terms
from entrocraft.surrogates import build_loss
from entrocraft.verdict import Verdict

def falling(start, share):
    return lambda step: start * share ** step

@dataclass(frozen=True)
class best:
    least: float = 0.0
    def __call__(self, inputs):
        return Verdict(keep_R=inputs.advantage_R > self.least, advantage_R=inputs.advantage_R)

def halved(reward_R, group_R, counted_R):
    return reward_R / 2

@dataclass(frozen=True)
class Squared:
    power: float = 2.0
    def __call__(self, logprob_T, old_logprob_T, advantage_T):
        return (logprob_T - old_logprob_T - advantage_T).abs() ** self.power

@dataclass(frozen=True, kw_only=True)
class Tenfold(Stateless):
    factor: float = 10.0
    def terms(self, tokens, state, /):
        return Terms(loss_fn=build_loss("gpg"), advantage_T=self.factor * tokens.advantage_T, mask_T=tokens.mask_T)

def root_length(layout):
    return 1 / layout.per_rollout(layout.counted_T).clamp(min=1).double().sqrt()[layout.rollout_T]

def absolute(logprob_T, ref_logprob_T):
    return (logprob_T - ref_logprob_T.detach()).abs()
"""
ROLLOUT_T, GROUP_R = torch.tensor([0, 0, 0, 0, 1, 2, 2, 2, 2]), torch.tensor([0, 0, 1])
MASK_T = torch.ones(9, dtype=torch.bool)


@pytest.fixture(autouse=True)
def _own(tmp_path, monkeypatch):
    (tmp_path / "own_parts.py").write_text(OWN)
    monkeypatch.syspath_prepend(str(tmp_path))


def test_a_schedule_of_ones_own() -> None:
    assert schedules.build("own_parts:falling", start=2.0, share=0.5)(3) == 0.25
    measured = schedules.build("own_parts:falling", start="measured", share=0.5)
    assert schedules.anchored(measured, 1.6)(1) == 0.8


def test_a_rule_of_ones_own(stats_of: Callable) -> None:
    logits_TV = torch.randn(9, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    controller = EntropyController(schedules.constant(1.0), rules.build("own_parts:best", least=0.5), min_groups=1)
    decision = controller.decide(
        step=0, stats=stats_of(logits_TV, torch.arange(9) % 5), rollout_T=ROLLOUT_T, group_R=GROUP_R,
        advantage_R=torch.tensor([1.0, 0.3, -2.0]),
    )  # fmt: skip
    assert decision.keep_R.tolist() == [True, False, False]


def test_an_advantage_and_a_loss_of_ones_own() -> None:
    own = advantages.build("own_parts:halved")
    assert own(torch.tensor([1.0, 3.0, -5.0]), GROUP_R, torch.tensor([4, 1, 4])).tolist() == [0.5, 1.5, -2.5]
    loss = surrogates.build_loss("own_parts:Squared", power=3.0)
    assert float(loss(torch.tensor([1.0]), torch.tensor([0.5]), torch.tensor([2.5]))) == 8.0


def test_a_method_and_an_aggregation_of_ones_own(stats_of: Callable) -> None:
    logits_TV = torch.randn(9, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    stats = stats_of(logits_TV, torch.arange(9) % 5)
    advantage_T = torch.linspace(-1, 1, 9)
    tokens = Tokens(
        stats=stats, old_logprob_T=stats.logprob_T, advantage_T=advantage_T, mask_T=MASK_T, rollout_T=ROLLOUT_T,
        group_R=GROUP_R,
    )  # fmt: skip
    objective = make_objective(methods.build("own_parts:Tenfold"), tokens, {}, aggregation="own_parts:root_length")
    weight_T = np.array([1 / 2] * 4 + [1.0] + [1 / 2] * 4)
    logprob_T = stats.logprob_T.clone().requires_grad_()
    value = objective(logprob_T, stats.entropy_T, slice(0, 9))
    (gradient_T,) = torch.autograd.grad(value, logprob_T)
    np.testing.assert_allclose(gradient_T, -10 * weight_T * advantage_T.numpy(), rtol=1e-6)
    assert value.item() == pytest.approx(float((-10 * weight_T * advantage_T.numpy() * stats.logprob_T.numpy()).sum()))
    keep_T = torch.arange(9) != 4
    kept_T = token_weights(ROLLOUT_T, MASK_T, GROUP_R, aggregation="own_parts:root_length", keep_T=keep_T)
    np.testing.assert_allclose(kept_T, weight_T * keep_T.numpy(), rtol=1e-6)


def test_a_kl_estimator_of_ones_own() -> None:
    logprob_T = torch.tensor([-1.0, -2.0], requires_grad=True)
    value_T = kl(logprob_T, torch.tensor([-1.5, -1.0]), kind="own_parts:absolute")
    assert value_T.tolist() == [0.5, 1.0]
    assert torch.autograd.grad(value_T.sum(), logprob_T)[0].tolist() == [1.0, -1.0]


@pytest.mark.parametrize(
    ("build", "noun"),
    [
        (schedules.build, "schedule"), (rules.build, "rule"), (advantages.build, "advantage"),
        (surrogates.build_loss, "loss"), (methods.build, "method"),
        (lambda path: token_weights(ROLLOUT_T, MASK_T, GROUP_R, aggregation=path), "aggregation"),
        (lambda path: kl(torch.zeros(1), torch.zeros(1), kind=path), "KL estimator"),
    ],
)  # fmt: skip
def test_a_path_that_leads_nowhere_is_named(build: Callable, noun: str) -> None:
    with pytest.raises(ValueError, match=rf"{noun}.* 'own_parts:nothing' cannot be imported as package\.module:name"):
        build("own_parts:nothing")
