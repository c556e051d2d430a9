"""The formulas of TRL's loss alone, in fp32: the log-probabilities and entropies are given, random, and the leaves.

So no head stands between, and each token's gradient is compared with its own, as with verl.
"""

from dataclasses import replace
from typing import Any

import pytest
import torch
from loss_types import AGGREGATIONS, OWN
from torch import Tensor

from entrocraft import TokenStats
from entrocraft.entropy_bonus import EntropyBonus
from entrocraft.losses import PPOClip
from entrocraft.methods import Method, Plain, Tokens, make_objective
from entrocraft.surrogates import build_loss

CLIPS = list(AGGREGATIONS)
PPO = PPOClip(dual_clip=None)


def _leaves(batch, spread: float) -> tuple[Tensor, Tensor]:
    """fp32 log-probabilities `spread` nats around the old ones, and entropies."""
    generator = torch.Generator().manual_seed(1)
    logprob_T = batch.old_logprob_T + spread * torch.randn(batch.rollouts.T, generator=generator)
    return logprob_T.requires_grad_(), (3 * torch.rand(batch.rollouts.T, generator=generator)).requires_grad_()


def _ours(method: Method, batch, aggregation: str, spread: float) -> list[Tensor]:
    """The loss, and its gradients in log-probabilities and entropies."""
    rollouts, (logprob_T, entropy_T) = batch.rollouts, _leaves(batch, spread)
    stats = TokenStats(logprob_T=logprob_T.detach(), entropy_T=entropy_T.detach(), lse_T=torch.zeros(rollouts.T))
    tokens = Tokens(
        stats=stats, old_logprob_T=batch.old_logprob_T, advantage_T=batch.advantage_T, mask_T=rollouts.mask_T,
        rollout_T=rollouts.rollout_T, group_R=rollouts.group_R, importance_T=batch.importance_T,
    )  # fmt: skip
    scale = float(rollouts.R * int(rollouts.length_R.max())) if aggregation == "fixed" else None
    objective = make_objective(method, tokens, {}, aggregation=aggregation, scale=scale)
    loss = objective(logprob_T, entropy_T, slice(0, rollouts.T))
    return _with_gradients(loss, logprob_T, entropy_T)


def _theirs(trainer, batch, spread: float, monkeypatch) -> list[Tensor]:
    """The same of TRL's `_compute_loss`, to which a forward pass of its model hands these leaves."""
    logprob_T, entropy_T = _leaves(batch, spread)
    padded = batch.padded(logprob_T), batch.padded(entropy_T), None
    monkeypatch.setattr(trainer, "_get_per_token_logps_and_entropies", lambda *_, **__: padded)
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    return _with_gradients(
        trainer.compute_loss(trainer.model, batch.inputs(int(batch.rollouts.mask_T.sum()))), logprob_T, entropy_T
    )


def _with_gradients(loss: Tensor, *leaves: Tensor) -> list[Tensor]:
    return [loss.detach(), *torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)]


def _assert_same(ours: list[Tensor], theirs: list[Tensor]) -> None:
    """Each gradient within 1e-6 of itself; the loss, a sum of terms of both signs, by what it adds up."""
    for mine_T, their_T in zip(ours[1:], theirs[1:], strict=True):
        assert mine_T.dtype == their_T.dtype == torch.float32
        torch.testing.assert_close(mine_T, their_T, rtol=1e-6, atol=1e-7 * float(ours[1].abs().max()))
    size = float(ours[1].abs().sum() + ours[2].abs().sum())
    assert size > 0.1
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-6, atol=1e-7 * size)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    ("name", "arguments", "loss_types", "spread", "config"),
    [
        ("ppo_clip", {"dual_clip": None}, CLIPS, 0.4, {"epsilon": 0.2, "epsilon_high": 0.2}),
        ("clip_higher", {"dual_clip": None}, CLIPS, 0.4, {"epsilon": 0.2, "epsilon_high": 0.28}),
        ("ppo_clip", {"dual_clip": 1.5}, CLIPS, 0.4, {"epsilon": 0.2, "epsilon_high": 0.2, "delta": 1.5}),
        ("gspo", {}, CLIPS, 2e-3, {"importance_sampling_level": "sequence", "epsilon": 3e-4, "epsilon_high": 4e-4}),
        ("cispo", {"clip_high": 0.5}, ["cispo"], 0.4, {"epsilon_high": 1.5}),
        ("sapo", {}, ["sapo"], 0.4, {}),
    ],
    ids=["ppo", "higher", "two_sided", "gspo", "cispo", "sapo"],
)
def test_policy_losses(pair, monkeypatch, name, arguments: dict[str, Any], loss_types, spread, config, seed):
    batch = pair.batch(seed, by_token=name != "gspo")
    for loss_type in loss_types:
        method = Plain(loss_fn=build_loss(name, **arguments))
        ours = _ours(method, batch, (AGGREGATIONS | OWN)[loss_type], spread)
        _assert_same(ours, _theirs(pair.trainer(loss_type, **config), batch, spread, monkeypatch))


@pytest.mark.parametrize("loss_type", ["grpo", "dapo"])
def test_importance_weights(pair, monkeypatch, loss_type):
    batch = pair.batch(4)
    weight_T = 2 * torch.rand(batch.rollouts.T, generator=torch.Generator().manual_seed(4))
    batch = replace(batch, importance_T=weight_T)
    trainer = pair.trainer(loss_type, epsilon=0.2, epsilon_high=0.2)
    trainer.use_vllm = True  # read by the loss alone, from here on
    _assert_same(_ours(Plain(loss_fn=PPO), batch, AGGREGATIONS[loss_type], 0.4),
                 _theirs(trainer, batch, 0.4, monkeypatch))  # fmt: skip


@pytest.mark.parametrize("coefficient", [0.2, -0.05])
def test_the_bonus(pair, monkeypatch, coefficient):
    batch = pair.batch(5)
    trainer = pair.trainer("dapo", entropy_coef=coefficient, epsilon=0.2, epsilon_high=0.2)
    ours = _ours(EntropyBonus(coefficient=coefficient, loss_fn=PPO), batch, "token_mean", 0.4)
    _assert_same(ours, _theirs(trainer, batch, 0.4, monkeypatch))
    assert float(ours[2].sum()) == pytest.approx(-coefficient, rel=1e-5)
