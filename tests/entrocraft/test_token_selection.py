"""Clip-Cov, KL-Cov, Clip_B, Clip_V: which tokens they choose, by plain loops, and what the loss makes of them."""

import math
from dataclasses import replace

import pytest
import torch

from entrocraft import PPOClip, TokenStats, methods
from entrocraft.covariance import covariances
from entrocraft.methods import Tokens, make_objective
from entrocraft.policy_losses import GSPO

T, V = 300, 13


def _tokens(seed=0, *, moved=0.0, keep=1.0):
    generator = torch.Generator().manual_seed(seed)
    logits_TV = 2.0 * torch.randn(T, V, generator=generator, dtype=torch.float64)
    token_T = torch.multinomial(logits_TV.softmax(1), 1, generator=generator)
    old_T = logits_TV.log_softmax(1).gather(1, token_T)[:, 0]
    logp_TV = (logits_TV + moved * torch.randn(T, V, generator=generator, dtype=torch.float64)).log_softmax(1)
    p_TV = logp_TV.exp()
    rollout_T = torch.arange(30).repeat_interleave(10)
    return Tokens(
        stats=TokenStats(
            logprob_T=logp_TV.gather(1, token_T)[:, 0],
            entropy_T=-(p_TV * logp_TV).sum(1),
            lse_T=torch.zeros(T, dtype=torch.float64),
            p2_T=p_TV.square().sum(1),
            p2logp_T=(p_TV.square() * logp_TV).sum(1),
        ),
        old_logprob_T=old_T,
        advantage_T=torch.randn(30, generator=generator, dtype=torch.float64)[rollout_T],
        mask_T=torch.rand(T, generator=generator) < 0.9,
        rollout_T=rollout_T,
        group_R=torch.arange(6).repeat_interleave(5),
        keep_T=None if keep == 1.0 else (torch.rand(30, generator=generator) < keep)[rollout_T],
        seed=3,
        step=7,
    )


def _covariance_by_hand(tokens):
    rows = [t for t in range(T) if tokens.mask_T[t]]
    a, lp = tokens.advantage_T.tolist(), tokens.stats.logprob_T.tolist()
    mean_a, mean_lp = sum(a[t] for t in rows) / len(rows), sum(lp[t] for t in rows) / len(rows)
    return {t: (a[t] - mean_a) * (lp[t] - mean_lp) for t in rows}


@pytest.mark.parametrize("keep", [1.0, 0.7])
def test_covariances_are_about_the_means_of_the_mask_whatever_is_rejected(keep):
    tokens = _tokens(1, keep=keep)
    got_T = covariances(tokens)
    for t, expected in _covariance_by_hand(tokens).items():
        assert float(got_T[t]) == pytest.approx(expected, abs=1e-12)


def test_clip_cov_silences_as_many_candidates_as_asked_and_no_others():
    tokens = _tokens(2, moved=0.4)
    ratio_T = (tokens.stats.logprob_T - tokens.old_logprob_T).exp()
    clip = PPOClip(clip_low=0.3, clip_high=0.3, dual_clip=None)
    by_hand = _covariance_by_hand(tokens)
    candidates = {
        t
        for t, c in by_hand.items()
        if 0.4 < c < 2.0
        and not (tokens.advantage_T[t] > 0 and ratio_T[t] > 1.3)
        and not (tokens.advantage_T[t] < 0 and ratio_T[t] < 0.7)
    }
    assert len(candidates) > 20
    for fraction, count in ((1e-4, 1), (0.03, int(0.03 * len(by_hand))), (1.0, len(candidates))):
        method = methods.build("clip_cov", fraction=fraction, lower=0.4, upper=2.0, loss_fn=clip)
        terms = method.terms(tokens, {})
        assert terms.gradient_T is not None
        silent = set((~terms.gradient_T).nonzero()[:, 0].tolist())
        assert len(silent) == count
        assert silent <= candidates
        torch.testing.assert_close(method.terms(tokens, {}).gradient_T, terms.gradient_T)  # the same draw again
    method = methods.build("clip_cov", fraction=0.03, lower=0.4, upper=2.0)
    draws = {tuple(_silent(method, replace(tokens, step=step))) for step in range(20)}
    assert len(draws) == 20
    draws = {tuple(_silent(method, replace(tokens, seed=seed))) for seed in range(20)}
    assert len(draws) == 20


def _silent(method, tokens):
    return (~method.terms(tokens, {}).gradient_T).nonzero()[:, 0].tolist()


def test_clip_cov_draws_uniformly():
    tokens = _tokens(2)
    method = methods.build("clip_cov", fraction=1e-4, lower=0.8, upper=1.2)
    everyone = methods.build("clip_cov", fraction=1.0, lower=0.8, upper=1.2)
    candidates = _silent(everyone, tokens)
    counts = dict.fromkeys(candidates, 0)
    for step in range(3000):
        counts[_silent(method, replace(tokens, step=step))[0]] += 1
    expected = 3000 / len(candidates)
    chi2 = sum((count - expected) ** 2 / expected for count in counts.values())
    assert chi2 < len(candidates) + 5 * math.sqrt(2 * len(candidates))


def test_silenced_tokens_stay_in_the_denominator():
    tokens = _tokens(3)
    method = methods.build("clip_cov", fraction=0.1, lower=0.0)
    objective = make_objective(method, tokens, {}, aggregation="token_mean")
    terms = method.terms(tokens, {})
    assert terms.gradient_T is not None
    expected_T = (tokens.mask_T & terms.gradient_T).float() / int(tokens.mask_T.sum())
    torch.testing.assert_close(objective.weight_T, expected_T)


@pytest.mark.parametrize("fraction", [1e-5, 0.02, 1.0])
def test_kl_cov_penalises_the_largest(fraction):
    tokens = _tokens(4, moved=0.3)
    method = methods.build("kl_cov", fraction=fraction, coefficient=0.7)
    by_hand = _covariance_by_hand(tokens)
    count = max(1, int(fraction * len(by_hand)))
    chosen = sorted(by_hand, key=by_hand.__getitem__)[-count:]
    objective = make_objective(method, tokens, {}, aggregation="token_mean")
    logprob_T = (tokens.stats.logprob_T + 0.1).requires_grad_()
    loss = objective(logprob_T, tokens.stats.entropy_T, slice(0, T))
    share = 1 / int(tokens.mask_T.sum())
    log_ratio_T = logprob_T - tokens.old_logprob_T
    expected_T = -log_ratio_T.exp() * tokens.advantage_T * tokens.mask_T * share
    expected = expected_T.sum() + 0.7 * share * log_ratio_T[chosen].abs().sum()
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-9)
    (got,) = torch.autograd.grad(loss, logprob_T)
    (wanted,) = torch.autograd.grad(expected, logprob_T)
    torch.testing.assert_close(got, wanted, rtol=1e-6, atol=1e-9)


def test_clip_b_drops_penalties_on_outliers_below():
    tokens = _tokens(5)
    s = (tokens.stats.logprob_T.exp() * (tokens.stats.logprob_T + tokens.stats.entropy_T)).tolist()
    rows = [t for t in range(T) if tokens.mask_T[t]]
    mean = sum(s[t] for t in rows) / len(rows)
    sigma = math.sqrt(sum((s[t] - mean) ** 2 for t in rows) / len(rows))
    expected = [t for t in rows if tokens.advantage_T[t] >= 0 or s[t] - mean >= -1.0 * sigma]
    assert 0 < len(rows) - len(expected) < 80
    mask_T = methods.build("clip_b", mu=1.0).terms(tokens, {}).mask_T
    assert mask_T.nonzero()[:, 0].tolist() == expected


@pytest.mark.parametrize("most", [1.0, 0.02])
def test_clip_v_drops_penalties_far_below_their_rows_mean_but_not_many(most):
    tokens = _tokens(6)
    stats = tokens.stats
    assert stats.p2_T is not None
    assert stats.p2logp_T is not None
    s_T = stats.logprob_T.exp() * (stats.logprob_T + stats.entropy_T)
    below = (stats.p2logp_T + stats.entropy_T * stats.p2_T - s_T).tolist()
    rows = [t for t in range(T) if tokens.mask_T[t]]
    mean = sum(below[t] for t in rows) / len(rows)
    sigma = math.sqrt(sum((below[t] - mean) ** 2 for t in rows) / len(rows))
    outliers = sorted((t for t in rows if tokens.advantage_T[t] < 0 and below[t] > sigma), key=below.__getitem__)
    gone = outliers[-min(len(outliers), math.ceil(most * len(rows))) :]
    assert len(outliers) > 10
    mask_T = methods.build("clip_v", mu=1.0, most=most).terms(tokens, {}).mask_T
    assert (tokens.mask_T & ~mask_T).nonzero()[:, 0].tolist() == sorted(gone)


def test_clip_cov_passes_by_the_sequences_that_a_sequence_loss_has_clipped():
    tokens = _tokens(8, moved=0.6)
    loss_fn = GSPO(clip_low=0.1, clip_high=0.1)
    clipped = loss_fn.clipped(
        tokens.stats.logprob_T, tokens.old_logprob_T, tokens.advantage_T, tokens.lengths_R, tokens.mask_T
    )
    clipped_T = clipped["high"] | clipped["low"]
    candidates = {t for t, c in _covariance_by_hand(tokens).items() if 0.2 < c < 5.0}
    gone = {t for t in candidates if clipped_T[t]}
    assert 10 < len(gone) < len(candidates) - 10
    method = methods.build("clip_cov", fraction=1.0, lower=0.2, loss_fn=loss_fn)
    assert set(_silent(method, tokens)) == candidates - gone


@pytest.mark.parametrize("name", ["clip_cov", "kl_cov", "clip_b", "clip_v"])
def test_gradients_are_the_slopes_of_the_loss(name):
    few = {"fraction": 0.1} if name.endswith("cov") else {"mu": 0.5}
    method, tokens = methods.build(name, **few), _tokens(9, moved=0.3)
    objective = make_objective(method, tokens, {}, aggregation="seq_mean_token_mean")

    def loss(logprob_T):
        return objective(logprob_T, tokens.stats.entropy_T, slice(0, T))

    logprob_T = tokens.stats.logprob_T.clone().requires_grad_()
    (gradient_T,) = torch.autograd.grad(loss(logprob_T), logprob_T)
    for t in range(0, T, 3):
        step_T = torch.zeros_like(logprob_T)
        step_T[t] = 1e-6
        slope = float(loss(logprob_T.detach() + step_T) - loss(logprob_T.detach() - step_T)) / 2e-6
        assert float(gradient_T[t]) == pytest.approx(slope, rel=1e-5, abs=1e-9)


def test_one_impossible_token_does_not_switch_a_clip_off():
    tokens = _tokens(5)
    kept_T = methods.build("clip_b", mu=1.0).terms(tokens, {}).mask_T
    first = int(tokens.mask_T.nonzero()[0])
    logprob_T = tokens.stats.logprob_T.clone()
    logprob_T[first] = -math.inf
    entropy_T = tokens.stats.entropy_T
    worse = replace(tokens, stats=replace(tokens.stats, logprob_T=logprob_T))
    s_T = (logprob_T.exp() * (logprob_T + entropy_T)).nan_to_num(0.0)[tokens.mask_T]
    limit = float(s_T.mean() - s_T.std(correction=0))
    got_T = methods.build("clip_b", mu=1.0).terms(worse, {}).mask_T
    expected_S = (s_T >= limit) | (tokens.advantage_T[tokens.mask_T] >= 0)
    assert got_T[tokens.mask_T].tolist() == expected_S.tolist()
    assert int(got_T.sum()) < int(tokens.mask_T.sum())
    assert int((got_T != kept_T).sum()) < 10


@pytest.mark.parametrize("name", ["clip_b", "clip_v"])
def test_a_batch_without_spread_loses_nothing(name):
    tokens = _tokens(7)
    flat_T = torch.full((T,), math.log(0.5), dtype=torch.float64)
    ones_T = torch.ones(T, dtype=torch.float64)
    # All rows alike but for rounding, which is no spread however small mu is.
    rounded_T = ones_T + 1e-14 * torch.randn(T, dtype=torch.float64)
    same = TokenStats(logprob_T=flat_T, entropy_T=rounded_T, lse_T=ones_T, p2_T=0.6 * ones_T, p2logp_T=-0.3 * ones_T)
    terms = methods.build(name, mu=1e-9).terms(replace(tokens, stats=same), {})
    assert torch.equal(terms.mask_T, tokens.mask_T)
    nothing = replace(tokens, mask_T=torch.zeros_like(tokens.mask_T))
    assert not methods.build(name).terms(nothing, {}).mask_T.any()


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("clip_cov", {"fraction": 0.0}, "fraction = 0.0"),
        ("clip_cov", {"lower": 5.0}, "lower, upper = 5.0, 5.0"),
        ("kl_cov", {"coefficient": -1.0}, "coefficient = -1.0"),
        ("clip_b", {"mu": 0.0}, "mu = 0.0"),
        ("clip_v", {"most": 2.0}, "most = 2.0"),
    ],
)
def test_bad_arguments_are_named(name, arguments, message):
    with pytest.raises(ValueError, match=message):
        methods.build(name, **arguments)
