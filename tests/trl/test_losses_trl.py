"""Policy losses against TRL's own `_compute_loss`: values and gradients of every parameter of the same model."""

import inspect
import re
from dataclasses import replace

import pytest
import torch
from loss_types import AGGREGATIONS, OWN
from trl import GRPOTrainer

from entrocraft.kl import kl
from entrocraft.methods import Plain
from entrocraft.objective import Term
from entrocraft.surrogates import build_loss

# Gamma weights of a product of ratios: no such loss here. Nor a ratio of sequences in cispo and sapo.
NOT_OURS = {"vespo"}
CLIP = {"epsilon": 0.2, "epsilon_high": 0.2}


def _plain(name, **arguments):
    return Plain(loss_fn=build_loss(name, **arguments))


def _plain_clip():
    return _plain("ppo_clip", dual_clip=None)


def test_every_loss_of_trl_is_here_or_named_as_missing():
    source = inspect.getsource(GRPOTrainer._compute_loss)
    compared = re.findall(r"self\.loss_type (?:==|in) (\[[^\]]*\]|\"\w+\")", source)
    assert {name for one in compared for name in re.findall(r"\w+", one)} == {*AGGREGATIONS, *OWN} | NOT_OURS


@pytest.mark.parametrize("loss_type", AGGREGATIONS)
@pytest.mark.parametrize(
    ("low", "high", "dual"), [(0.2, 0.2, None), (0.2, 0.28, None), (0.1, 0.15, 1.5)], ids=["ppo", "higher", "two_sided"]
)
def test_ppo_clip(pair, loss_type, low, high, dual):
    """TRL's delta, which bounds the ratio itself, is the dual clip: both silence A < 0 beyond it."""
    batch = pair.batch(0, by_token=True)
    method = _plain("ppo_clip", clip_low=low, clip_high=high, dual_clip=dual)
    ours = pair.ours(method, batch, AGGREGATIONS[loss_type])
    theirs = pair.theirs(pair.trainer(loss_type, epsilon=low, epsilon_high=high, delta=dual), batch)
    ours.assert_same(theirs)
    assert min(ours.metrics["low"], ours.metrics["high"]) > 0.05
    assert (ours.metrics["dual"] > 0.05) == (dual is not None)
    for mine, their in (("low", "clip_ratio/low_mean"), ("high", "clip_ratio/high_mean"), ("entropy", "entropy")):
        assert ours.metrics[mine] == pytest.approx(theirs.metrics[their], rel=1e-6)


@pytest.mark.parametrize("loss_type", AGGREGATIONS)
@pytest.mark.parametrize(("low", "high", "spread"), [(3e-4, 4e-4, 2e-3), (0.05, 0.1, 0.4)], ids=["default", "wide"])
def test_gspo(pair, loss_type, low, high, spread):
    """One ratio a sequence: with sums of tokens, too, both give a token the ratio's value and its own gradient."""
    batch = pair.batch(1, spread=spread)
    ours = pair.ours(_plain("gspo", clip_low=low, clip_high=high), batch, AGGREGATIONS[loss_type])
    config = {"importance_sampling_level": "sequence", "epsilon": low, "epsilon_high": high}
    ours.assert_same(pair.theirs(pair.trainer(loss_type, **config), batch))
    assert 0.05 < ours.metrics["low"] + ours.metrics["high"] < 0.95


@pytest.mark.parametrize("cap", [1.1, 1.5, 5.0])
def test_cispo(pair, cap):
    """epsilon_high of TRL is the largest ratio, our clip_high what it may be above 1: the same number less 1."""
    batch = pair.batch(2, by_token=True)
    ours = pair.ours(_plain("cispo", clip_high=cap - 1.0), batch, OWN["cispo"])
    ours.assert_same(pair.theirs(pair.trainer("cispo", epsilon_high=cap), batch))
    assert (ours.metrics["high"] > 0.05) == (cap < 5.0)


@pytest.mark.parametrize(("positive", "negative"), [(1.0, 1.05), (2.0, 0.5)])
def test_sapo(pair, positive, negative):
    batch = pair.batch(3, by_token=True)
    ours = pair.ours(_plain("sapo", tau_positive=positive, tau_negative=negative), batch, OWN["sapo"])
    config = {"sapo_temperature_pos": positive, "sapo_temperature_neg": negative}
    ours.assert_same(pair.theirs(pair.trainer("sapo", **config), batch))


@pytest.mark.parametrize("loss_type", ["grpo", "dapo"])
def test_importance_weights_multiply_the_loss(pair, loss_type):
    """What TRL does with vLLM's log-probabilities, from the finished weights on."""
    batch = pair.batch(4)
    weight_T = 2 * torch.rand(batch.rollouts.T, generator=torch.Generator().manual_seed(4))
    batch = replace(batch, importance_T=weight_T)
    trainer = pair.trainer(loss_type, **CLIP)
    trainer.use_vllm = True  # read by the loss alone, from here on
    pair.ours(_plain_clip(), batch, AGGREGATIONS[loss_type]).assert_same(pair.theirs(trainer, batch))


@pytest.mark.parametrize(("loss_type", "corrected"), [("grpo", False), ("dapo", False), ("dapo", True)])
def test_kl_penalty(pair, loss_type, corrected):
    """TRL's beta is k3, averaged as the loss is: a further term of our objective.

    On purpose it is not multiplied by the ratio, as TRL's is unless told otherwise: on policy k3+ is unbiased without.
    """
    batch = pair.batch(5)
    noise_T = 0.5 * torch.randn(batch.rollouts.T, generator=torch.Generator().manual_seed(5))
    batch = replace(batch, ref_logprob_T=batch.old_logprob_T + noise_T)

    def penalty(logprob_N, old_N, ref_N):
        ratio_N = (logprob_N - old_N).exp() if corrected else 1.0
        return ratio_N * kl(logprob_N, ref_N, kind="k3")

    def penalised(objective):
        term = Term(loss_fn=penalty, advantage_T=batch.ref_logprob_T, weight_T=0.3 * objective.weight_T)
        return replace(objective, extra=(term,))

    trainer = pair.trainer(loss_type, use_bias_correction_kl=corrected, **CLIP)
    trainer.beta = 0.3  # as an argument of the trainer it would load the reference model from a file
    ours = pair.ours(_plain_clip(), batch, AGGREGATIONS[loss_type], change=penalised)
    ours.assert_same(pair.theirs(trainer, batch))
    assert ours.distance(pair.ours(_plain_clip(), batch, AGGREGATIONS[loss_type])) > 0.05


# -- an update of several micro-batches


@pytest.mark.parametrize("loss_type", ["grpo", "dr_grpo", "dapo", "luspo", "cispo", "sapo"])
def test_the_cut_into_microbatches_changes_nothing(pair, loss_type):
    batch = pair.batch(6)
    method = {"cispo": _plain("cispo", clip_high=0.5), "sapo": _plain("sapo")}.get(loss_type, _plain_clip())
    clip = {"epsilon_high": 1.5} if loss_type == "cispo" else CLIP
    theirs = pair.theirs(pair.trainer(loss_type, microbatches=2, **clip), batch.take(0, 8), batch.take(8, 16))
    pair.ours(method, batch, (AGGREGATIONS | OWN)[loss_type]).assert_same(theirs)


def test_bnpo_averages_the_means_of_its_microbatches(pair):
    """On purpose: token_mean divides by the tokens of the whole update, so that its cut does not show in the loss."""
    batch = pair.batch(6)
    parts = batch.take(0, 8), batch.take(8, 16)
    theirs = pair.theirs(pair.trainer("bnpo", microbatches=2, **CLIP), *parts)

    def mean_of_means(objective):
        first_T, counted_T = batch.rollouts.rollout_T < 8, batch.rollouts.mask_T
        share = float((first_T & counted_T).sum()) / float(counted_T.sum())
        factor_T = torch.where(first_T, 0.5 / share, 0.5 / (1.0 - share))
        return replace(objective, weight_T=objective.weight_T * factor_T)

    ours = pair.ours(_plain_clip(), batch, "token_mean")
    pair.ours(_plain_clip(), batch, "token_mean", change=mean_of_means).assert_same(theirs)
    assert ours.distance(theirs) > 0.01


# -- edges at which ours differs on purpose


def test_a_rollout_without_a_token_counts_in_trls_mean(pair):
    """Ours divides by the rollouts with a token: a response that a tool wrote alone would shrink the step."""
    batch = pair.batch(7)
    mask_T = batch.rollouts.mask_T & (batch.rollouts.rollout_T != 3)
    batch = replace(batch, rollouts=replace(batch.rollouts, mask_T=mask_T))
    R = batch.rollouts.R

    def their_mean(objective):
        return replace(objective, weight_T=objective.weight_T.double() * (R - 1) / R)

    theirs = pair.theirs(pair.trainer("grpo", **CLIP), batch)
    pair.ours(_plain_clip(), batch, "seq_mean_token_mean", change=their_mean).assert_same(theirs)


def test_far_log_ratios_are_not_clamped_by_trl(pair):
    """Ours stops at exp(20), without gradient: at 40 a token of TRL's, A < 0, makes a loss of 1e17 |A|."""
    batch = pair.batch(8)
    token = int((batch.rollouts.mask_T & (batch.advantage_T < 0)).nonzero()[0])
    old_T = batch.old_logprob_T.clone()
    old_T[token] -= 40.0
    batch = replace(batch, old_logprob_T=old_T)
    theirs = pair.theirs(pair.trainer("dapo", **CLIP), batch)
    ours = pair.ours(_plain_clip(), batch, "token_mean")
    assert theirs.loss > 1e13
    assert ours.loss < 1e8
    kept_T = torch.arange(batch.rollouts.T) != token
    assert ours.distance(pair.ours(_plain_clip(), batch, "token_mean", keep_T=kept_T)) < 1e-9


def test_a_delta_below_the_upper_clip(pair):
    """There TRL's delta and upper clip change places: delta stops A > 0, the clip A < 0. Ours keep their sides."""
    batch = pair.batch(9)
    theirs = pair.theirs(pair.trainer("dapo", epsilon=0.2, epsilon_high=0.5, delta=1.1), batch)
    changed_places = _plain("ppo_clip", clip_low=0.2, clip_high=0.1, dual_clip=1.5)
    pair.ours(changed_places, batch, "token_mean").assert_same(theirs)
    as_written = _plain("ppo_clip", clip_low=0.2, clip_high=0.5, dual_clip=1.1)
    assert pair.ours(as_written, batch, "token_mean").distance(theirs) > 0.1
