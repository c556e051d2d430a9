"""Policy losses and the choice of tokens against verl's own functions: values and gradients, in fp32.

Ours are of packed tokens and the weights of an aggregation, verl's of padded rows. verl chooses tokens in one
micro-batch with the log-probabilities of the policy it trains, so it is given all rows at once.
"""

from dataclasses import replace

import pytest
import torch
from both_losses import assert_same, core_algos, ours, random_tokens, verls

from entrocraft import methods
from entrocraft.covariance import ClipCov
from entrocraft.losses import PPOClip
from entrocraft.surrogates import build_loss

SEEDS = (0, 1, 2, 3)

# verl's further names: bypass_mode picks one of the others, dppo_tv, dppo_kl and dro are not of this package.
NOT_OURS = {"bypass_mode", "dppo_tv", "dppo_kl", "dro"}
COMPARED = {"vanilla", "gspo", "sapo", "gpg", "clip_cov", "kl_cov", "geo_mean", "cispo"}


def _plain(name, **arguments):
    return methods.Plain(loss_fn=build_loss(name, **arguments))


def test_every_loss_of_verl_is_here_or_named_as_missing():
    assert set(core_algos.POLICY_LOSS_REGISTRY) == COMPARED | NOT_OURS


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("aggregation", ["token_mean", "seq_mean_token_sum", "seq_mean_token_mean"])
@pytest.mark.parametrize(
    ("low", "high", "dual"), [(0.2, 0.2, 3.0), (0.2, 0.28, 3.0), (0.05, 0.4, 1.5)], ids=["ppo", "higher", "narrow"]
)
def test_ppo_clip(seed, aggregation, low, high, dual):
    tokens = random_tokens(seed, by_token=True)
    mine = ours(_plain("ppo_clip", clip_low=low, clip_high=high, dual_clip=dual), tokens, aggregation)
    clips = {"clip_ratio_low": low, "clip_ratio_high": high, "clip_ratio_c": dual}
    theirs = verls("vanilla", tokens, aggregation, **clips)
    assert_same(mine, theirs)
    loss_fn = PPOClip(clip_low=low, clip_high=high, dual_clip=dual)
    clipped = loss_fn.clipped(tokens.stats.logprob_T, tokens.old_logprob_T, tokens.advantage_T)
    share = {side: float(one_T[tokens.mask_T].float().mean()) for side, one_T in clipped.items()}
    assert min(share["high"], share["low"]) > 0.05
    # verl's two fractions: the clip has made the loss larger; the dual clip has made it smaller again.
    assert share["high"] + share["low"] == pytest.approx(theirs[2]["actor/pg_clipfrac"], rel=1e-5)
    assert share["dual"] == pytest.approx(theirs[2]["actor/pg_clipfrac_lower"], rel=1e-5, abs=1e-7)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("aggregation", ["token_mean", "seq_mean_token_mean"])
def test_clip_higher_is_verls_with_its_upper_clip(seed, aggregation):
    tokens = random_tokens(seed)
    theirs = verls("vanilla", tokens, aggregation, clip_ratio_low=0.2, clip_ratio_high=0.28)
    assert_same(ours(_plain("clip_higher"), tokens, aggregation), theirs)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("aggregation", ["token_mean", "seq_mean_token_mean"])
@pytest.mark.parametrize(("low", "high", "spread"), [(3e-4, 4e-4, 2e-3), (0.05, 0.1, 0.4)], ids=["default", "wide"])
def test_gspo(seed, aggregation, low, high, spread):
    tokens = random_tokens(seed, spread=spread)
    mine = ours(_plain("gspo", clip_low=low, clip_high=high), tokens, aggregation)
    theirs = verls("gspo", tokens, aggregation, clip_ratio_low=low, clip_ratio_high=high)
    assert_same(mine, theirs)
    silent_T = (mine[1] == 0) & tokens.mask_T
    assert torch.equal(silent_T, (theirs[1] == 0) & tokens.mask_T)
    assert 0 < int(silent_T.sum()) < int(tokens.mask_T.sum())


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("positive", "negative"), [(1.0, 1.05), (2.0, 0.5)])
def test_sapo(seed, positive, negative):
    tokens = random_tokens(seed, by_token=True)
    mine = ours(_plain("sapo", tau_positive=positive, tau_negative=negative), tokens, "seq_mean_token_mean")
    # verl averages by sequences whatever it is told.
    assert_same(mine, verls("sapo", tokens, "token_mean", tau_pos=positive, tau_neg=negative))


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("aggregation", ["token_mean", "seq_mean_token_sum", "seq_mean_token_mean"])
def test_gpg(seed, aggregation):
    tokens = random_tokens(seed, by_token=True)
    assert_same(ours(_plain("gpg"), tokens, aggregation), verls("gpg", tokens, aggregation))


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("aggregation", ["token_mean", "seq_mean_token_mean"])
@pytest.mark.parametrize(("low", "their_low", "high"), [(1.0, 10.0, 0.2), (0.3, 0.3, 0.5)], ids=["cap", "both"])
def test_cispo(seed, aggregation, low, their_low, high):
    """verl's example writes 10 for no lower bound; a ratio is never below 0, so 1 is none either."""
    tokens = random_tokens(seed, by_token=True)
    theirs = verls("cispo", tokens, aggregation, clip_ratio_low=their_low, clip_ratio_high=high)
    assert_same(ours(_plain("cispo", clip_low=low, clip_high=high), tokens, aggregation), theirs)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("low", "high"), [(0.4, 0.4), (0.1, 0.3)])
def test_geo_mean(seed, low, high):
    tokens = random_tokens(seed)
    mine = ours(_plain("geo_mean", clip_low=low, clip_high=high), tokens, "seq_mean_token_mean")
    # verl averages by sequences whatever it is told.
    theirs = verls("geo_mean", tokens, "token_mean", clip_ratio_low=low, clip_ratio_high=high)
    assert_same(mine, theirs)
    assert torch.equal(mine[1] == 0, theirs[1] == 0)


def test_geo_mean_divides_by_the_sequences_that_have_a_token():
    """verl's divides by all rows; its other losses, and ours, by those with a token in the mask."""
    tokens = random_tokens(5)
    tokens = replace(tokens, mask_T=tokens.mask_T & (tokens.rollout_T != 3))
    mine = ours(_plain("geo_mean"), tokens, "seq_mean_token_mean")
    loss, gradient_T, _ = verls("geo_mean", tokens, "token_mean", clip_ratio_low=0.4, clip_ratio_high=0.4)
    R = len(tokens.group_R)
    assert_same(mine, (loss * R / (R - 1), gradient_T * R / (R - 1)))


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("aggregation", ["token_mean", "seq_mean_token_mean"])
@pytest.mark.parametrize(("fraction", "coefficient"), [(2e-4, 0.1), (2e-3, 1.0), (0.1, 1.0), (1.0, 0.5)])
def test_kl_cov(seed, aggregation, fraction, coefficient):
    tokens = random_tokens(seed, by_token=True)
    mine = ours(methods.build("kl_cov", fraction=fraction, coefficient=coefficient), tokens, aggregation)
    theirs = verls("kl_cov", tokens, aggregation, {"kl_cov_ratio": fraction, "ppo_kl_coef": coefficient})
    assert_same(mine, theirs)


CLIPS = {"clip_ratio_low": 0.3, "clip_ratio_high": 0.3}


def _clip_cov(fraction):
    clip = PPOClip(clip_low=0.3, clip_high=0.3, dual_clip=None)
    policy_loss = {"clip_cov_ratio": fraction, "clip_cov_lb": 0.5, "clip_cov_ub": 2.0}
    return ClipCov(fraction=fraction, lower=0.5, upper=2.0, loss_fn=clip), policy_loss


def _silenced(method, tokens):
    gradient_T = method.terms(tokens, {}).gradient_T
    assert gradient_T is not None
    return ~gradient_T


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("aggregation", ["token_mean", "seq_mean_token_mean"])
def test_clip_cov_where_the_draw_takes_all(seed, aggregation):
    tokens = random_tokens(seed, by_token=True)
    method, policy_loss = _clip_cov(1.0)
    theirs = verls("clip_cov", tokens, aggregation, policy_loss, **CLIPS)
    assert_same(ours(method, tokens, aggregation), theirs)
    silent = int(_silenced(method, tokens).sum())
    assert silent > 20
    assert silent / int(tokens.mask_T.sum()) == pytest.approx(theirs[2]["actor/pg_clipfrac"], rel=1e-5)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("fraction", [1e-5, 0.01, 0.04])
def test_clip_cov_draws_as_many_from_the_same_candidates(seed, fraction):
    """The generators differ, the rest does not: give verl's draw to our loss and it is verl's loss."""
    tokens = random_tokens(seed, by_token=True)
    method, policy_loss = _clip_cov(fraction)
    everyone, _ = _clip_cov(1.0)
    candidate_T, drawn_T = _silenced(everyone, tokens), _silenced(method, tokens)
    torch.manual_seed(seed)
    theirs = verls("clip_cov", tokens, "token_mean", policy_loss, **CLIPS)
    their_drawn_T = candidate_T & (theirs[1] == 0)
    assert int(drawn_T.sum()) == int(their_drawn_T.sum()) == max(1, int(fraction * int(tokens.mask_T.sum())))
    assert bool(candidate_T[drawn_T].all())
    clipped = methods.Plain(loss_fn=method.loss_fn)
    plain = ours(clipped, tokens, "token_mean")
    assert bool((plain[1][candidate_T] != 0).all())  # so that a zero of verl's is its draw
    kept = ours(clipped, replace(tokens, keep_T=~their_drawn_T), "token_mean")
    assert_same(kept, theirs)


def test_the_authors_constants_are_ours_with_their_clip_of_one():
    tokens = random_tokens(4, by_token=True)
    assert int(_silenced(methods.build("clip_cov", fraction=1.0), tokens).sum()) > 5
    mine = ours(methods.build("clip_cov", fraction=1.0), tokens, "token_mean")
    theirs = verls("clip_cov", tokens, "token_mean", {"clip_cov_ratio": 1.0}, clip_ratio_low=1.0, clip_ratio_high=1.0)
    assert_same(mine, theirs)
