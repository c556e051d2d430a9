"""Entropy in TRL's loss against ours: the fixed bonus, the adaptive one and its state, the most uncertain tokens."""

from dataclasses import replace

import pytest
import torch
from loss_types import AGGREGATIONS

from entrocraft.entropy_bonus import AdaptiveBonus, EntropyBonus
from entrocraft.losses import PPOClip, token_weights
from entrocraft.methods import Plain, Signal

CLIP = {"epsilon": 0.2, "epsilon_high": 0.2}
PPO = PPOClip(dual_clip=None)


def _mean(batch):
    """Weights of a mean over the batch's tokens."""
    rollouts = batch.rollouts
    return token_weights(rollouts.rollout_T, rollouts.mask_T, rollouts.group_R, aggregation="token_mean")


@pytest.mark.parametrize("loss_type", ["bnpo", "dapo"])
@pytest.mark.parametrize("coefficient", [0.2, -0.05])
def test_fixed_bonus_of_a_token_mean(pair, loss_type, coefficient):
    batch = pair.batch(0)
    ours = pair.ours(EntropyBonus(coefficient=coefficient, loss_fn=PPO), batch, "token_mean")
    ours.assert_same(pair.theirs(pair.trainer(loss_type, entropy_coef=coefficient, **CLIP), batch))
    assert ours.distance(pair.ours(Plain(loss_fn=PPO), batch, "token_mean")) > 0.01


@pytest.mark.parametrize("loss_type", ["grpo", "dr_grpo", "luspo"])
def test_fixed_bonus_of_other_means(pair, loss_type):
    """On purpose: TRL's bonus is a mean over tokens whatever the loss is; ours is the mean that the loss is.

    So the coefficient weighs entropy against the policy loss token by token, alike in long and short rollouts.
    """
    batch, method = pair.batch(1), EntropyBonus(coefficient=0.2, loss_fn=PPO)
    theirs = pair.theirs(pair.trainer(loss_type, entropy_coef=0.2, **CLIP), batch)

    def token_mean(objective):
        return replace(objective, entropy_weight_T=_mean(batch))

    pair.ours(method, batch, AGGREGATIONS[loss_type], change=token_mean).assert_same(theirs)
    assert pair.ours(method, batch, AGGREGATIONS[loss_type]).distance(theirs) > 0.01


def test_where_weights_are_constant_another_coefficient_is_the_same_bonus(pair):
    """dr_grpo divides by the longest rollouts allowed, TRL's bonus by the tokens there are."""
    batch = pair.batch(2)
    slots = batch.rollouts.R * int(batch.rollouts.length_R.max())
    method = EntropyBonus(coefficient=0.1 * slots / int(batch.rollouts.mask_T.sum()), loss_fn=PPO)
    theirs = pair.theirs(pair.trainer("dr_grpo", entropy_coef=0.1, **CLIP), batch)
    pair.ours(method, batch, "fixed").assert_same(theirs)


def test_trls_bonus_averages_the_means_of_microbatches(pair):
    """On purpose: ours divides by the tokens of the whole update, so that its cut does not show in the loss."""
    batch, method = pair.batch(3), EntropyBonus(coefficient=0.2, loss_fn=PPO)
    parts = batch.take(0, 4), batch.take(4, 8), batch.take(8, 12), batch.take(12, 16)
    theirs = pair.theirs(pair.trainer("dapo", microbatches=4, entropy_coef=0.2, **CLIP), *parts)

    def mean_of_means(objective):
        weights = [_mean(part) / len(parts) for part in parts]
        return replace(objective, entropy_weight_T=torch.cat(weights))

    pair.ours(method, batch, "token_mean", change=mean_of_means).assert_same(theirs)
    assert pair.ours(method, batch, "token_mean").distance(theirs) > 0.01


# -- the adaptive coefficient

CONTROLLER = {"entropy_coef_min": 0.05, "entropy_coef_max": 0.3, "entropy_coef_delta": 0.07}
TARGET = 4.3


def _adaptive(delta=0.07):
    return AdaptiveBonus(target=TARGET, initial=0.1, delta=delta, minimum=0.05, maximum=0.3, loss_fn=PPO)


def _controlled(pair, **config):
    arguments = CONTROLLER | {"entropy_coef": 0.1, "entropy_target": TARGET} | CLIP | config
    return pair.trainer("dapo", use_adaptive_entropy=True, **arguments)


@pytest.fixture
def policies(pair):
    """The same model again and again, its head anew times a random number, so of a random entropy."""
    weight_VH = pair.policy.model.get_output_embeddings().weight
    first_VH = weight_VH.detach().clone()

    def change(generator):
        with torch.no_grad():
            weight_VH.copy_(first_VH * (0.5 + 1.5 * torch.rand(1, generator=generator)))

    return change


@pytest.mark.parametrize("pair", [False], indirect=True)
@pytest.mark.parametrize("microbatches", [1, 2])
def test_adaptive_state(pair, policies, microbatches):
    """TRL's coefficient before each of 40 updates, and the entropy it has seen, against `observe`."""
    generator = torch.Generator().manual_seed(0)
    trainer, method, state = _controlled(pair, microbatches=microbatches), _adaptive(), {}
    batch = pair.batch(4)
    size = batch.rollouts.R // microbatches
    parts = [batch.take(first, first + size) for first in range(0, batch.rollouts.R, size)]
    coefficients, used = [], []
    for step in range(40):
        policies(generator)
        entropy = pair.entropy(batch)
        state = method.observe(state, Signal(step=step, steps=40, entropy=entropy))
        assert trainer.entropy_coef == state["coefficient"]
        assert (trainer._last_world_entropy <= TARGET) == (state["used"] > 0.0)
        pair.theirs(trainer, *parts, backward=False)
        assert trainer._last_world_entropy == pytest.approx(entropy, rel=1e-6)
        coefficients.append(state["coefficient"])
        used.append(state["used"])
    assert min(coefficients) == 0.05
    assert max(coefficients) == 0.3
    assert len(set(coefficients)) > 5
    assert 10 < used.count(0.0) < 30
    assert set(used) <= {0.0, *coefficients}


@pytest.mark.parametrize("pair", [False], indirect=True)
def test_adaptive_loss(pair, policies):
    """What the state makes of the loss, and when."""
    generator = torch.Generator().manual_seed(1)
    trainer, method, state = _controlled(pair), _adaptive(), {}
    used = []
    for step in range(6):
        policies(generator)
        batch = pair.batch(step)
        state = method.observe(state, Signal(step=step, steps=6, entropy=pair.entropy(batch)))
        pair.ours(method, batch, "token_mean", state=state).assert_same(pair.theirs(trainer, batch))
        used.append(state["used"])
    assert 1 < used.count(0.0) < 5


@pytest.mark.parametrize("pair", [False], indirect=True)
def test_trls_coefficient_moves_at_every_update_and_ours_once_a_step(pair):
    """On purpose: entropy is measured once a step; with four updates a step ours takes one delta where TRL takes four.

    TRL's also goes by the entropy of an update's own rollouts, ours by that of the whole step.
    """
    trainer, method, state = _controlled(pair, entropy_coef_delta=0.01), _adaptive(delta=0.04), {}
    for step in range(3):
        batch = pair.batch(step)
        state = method.observe(state, Signal(step=step, steps=3, entropy=pair.entropy(batch)))
        assert trainer.entropy_coef == pytest.approx(state["coefficient"], rel=1e-12)
        for first in range(0, 16, 4):
            pair.theirs(trainer, batch.take(first, first + 4))
    assert state["coefficient"] != 0.1


# -- the most uncertain tokens


@pytest.mark.parametrize("loss_type", AGGREGATIONS)
@pytest.mark.parametrize("share", [0.2, 0.6])
def test_top_entropy_quantile(pair, loss_type, share):
    """The other tokens are rejected and stay in the mean. No method of ours chooses them, a rule can (keep_T)."""
    batch = pair.batch(5)
    entropy_T = pair.policy.score(batch.rollouts, 256).entropy_T
    keep_T = entropy_T >= torch.quantile(entropy_T[batch.rollouts.mask_T], 1.0 - share)
    ours = pair.ours(Plain(loss_fn=PPO), batch, AGGREGATIONS[loss_type], keep_T=keep_T)
    ours.assert_same(pair.theirs(pair.trainer(loss_type, top_entropy_quantile=share, **CLIP), batch))
    assert float(keep_T[batch.rollouts.mask_T].float().mean()) == pytest.approx(share, abs=0.02)


def test_trls_bonus_is_paid_for_the_most_uncertain_tokens_alone(pair):
    """On purpose: ours is paid for every token that counts, for what is rejected is still the policy's entropy."""
    batch, coefficient = pair.batch(6), 0.2
    entropy_T = pair.policy.score(batch.rollouts, 256).entropy_T
    keep_T = entropy_T >= torch.quantile(entropy_T[batch.rollouts.mask_T], 0.6)
    method = EntropyBonus(coefficient=coefficient, loss_fn=PPO)
    theirs = pair.theirs(pair.trainer("dapo", top_entropy_quantile=0.4, entropy_coef=coefficient, **CLIP), batch)

    def kept_alone(objective):
        weight_T = (keep_T & batch.rollouts.mask_T).double()
        return replace(objective, entropy_weight_T=weight_T / weight_T.sum())

    pair.ours(method, batch, "token_mean", keep_T=keep_T, change=kept_alone).assert_same(theirs)
    assert pair.ours(method, batch, "token_mean", keep_T=keep_T).distance(theirs) > 0.01
