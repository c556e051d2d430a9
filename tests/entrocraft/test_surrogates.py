"""GMPO, SAPO, plain policy gradient: against their definitions a sequence or a number at a time, gradients too."""

import math

import pytest
import torch

from entrocraft.losses import PPOClip, token_weights
from entrocraft.surrogates import GPG, LOSSES, SAPO, GeoMean, build_loss

LENGTHS = [3, 1, 5, 2]


def _batch(seed=0, T=11, spread=0.5):
    generator = torch.Generator().manual_seed(seed)
    old_T = -3 * torch.rand(T, generator=generator, dtype=torch.float64)
    logprob_T = old_T + spread * torch.randn(T, generator=generator, dtype=torch.float64)
    advantage_T = torch.tensor([1.3, -0.7, 0.9, -1.1], dtype=torch.float64).repeat_interleave(torch.tensor(LENGTHS))
    return logprob_T.requires_grad_(), old_T, advantage_T


def _against_finite_differences(value, logprob_T):
    (gradient_T,) = torch.autograd.grad(value(logprob_T), logprob_T)
    for t in range(len(logprob_T)):
        step_T = torch.zeros_like(logprob_T)
        step_T[t] = 1e-6
        slope = float(value(logprob_T.detach() + step_T) - value(logprob_T.detach() - step_T)) / 2e-6
        assert float(gradient_T[t]) == pytest.approx(slope, rel=1e-5, abs=1e-8)


@pytest.mark.parametrize("clip", [(0.4, 0.4), (0.1, 0.3)])
def test_the_geometric_mean_is_the_papers_objective_in_value_and_gradient(clip):
    low, high = clip
    mask_T = torch.tensor([True, True, False, True, True, True, True, False, True, True, True])
    loss_fn = GeoMean(clip_low=low, clip_high=high)
    logprob_T, old_T, advantage_T = _batch()
    rollout_T = torch.arange(4).repeat_interleave(torch.tensor(LENGTHS))
    weight_T = token_weights(rollout_T, mask_T, torch.arange(4), aggregation="seq_mean_token_mean").double()
    loss_T = loss_fn(logprob_T, old_T, advantage_T, LENGTHS, mask_T)

    def objective(logprob_T):
        """Sequence by sequence, with a clip by sign as the paper writes it."""
        total, start = torch.zeros((), dtype=torch.float64), 0
        for length in LENGTHS:
            rows = slice(start, start + length)
            start += length
            d_N, a = (logprob_T - old_T)[rows][mask_T[rows]], float(advantage_T[rows][0])
            sign = math.copysign(1.0, a)
            bounded_N = sign * torch.minimum(sign * d_N, sign * d_N.clamp(-low, high))
            total = total - a * bounded_N.mean().exp() / 4
        return total

    torch.testing.assert_close((weight_T * loss_T).sum(), objective(logprob_T), rtol=1e-6, atol=0)
    (actual,) = torch.autograd.grad((weight_T * loss_T).sum(), logprob_T)
    (expected,) = torch.autograd.grad(objective(logprob_T), logprob_T)
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-9)
    clipped = loss_fn.clipped(logprob_T, old_T, advantage_T, LENGTHS, mask_T)
    silent_T = (clipped["high"] | clipped["low"]) & mask_T
    assert 0 < int(silent_T.sum()) < 8
    assert bool((actual[silent_T] == 0).all())
    assert bool((actual[mask_T & ~silent_T] != 0).all())


def test_the_geometric_mean_of_a_sequence_that_has_gone_far_stays_finite():
    # fp32, where exp(100) is infinite: two sequences whose mean is above 20, the second with nothing to teach.
    logprob_T = torch.tensor([30.0, 100.0, 100.0, 1.0], requires_grad=True)
    advantage_T = torch.tensor([-1.0, -1.0, 0.0, -1.0])
    batch = (torch.zeros(4), advantage_T, [2, 1, 1])
    loss_T = GeoMean()(logprob_T, *batch)
    assert loss_T.tolist() == pytest.approx([math.exp(20), math.exp(20), 0.0, math.e], rel=1e-5)
    (gradient_T,) = torch.autograd.grad(loss_T.sum(), logprob_T)
    assert gradient_T.tolist() == pytest.approx([0.0, 0.0, 0.0, math.e], rel=1e-5)
    clipped = GeoMean().clipped(logprob_T, *batch)
    assert (clipped["high"].tolist(), clipped["low"].tolist()) == ([True, True, False, False], [False] * 4)


def test_the_soft_gate_is_its_formula_and_its_gradient_minus_the_advantage_at_ratio_one():
    logprob_T, old_T, advantage_T = _batch(1)
    loss_fn = SAPO(tau_positive=1.0, tau_negative=2.0)
    for t, loss in enumerate(loss_fn(logprob_T, old_T, advantage_T).tolist()):
        a, r = float(advantage_T[t]), math.exp(float(logprob_T.detach()[t] - old_T[t]))
        tau = 1.0 if a > 0 else 2.0
        assert loss == pytest.approx(-4 / tau / (1 + math.exp(-tau * (r - 1))) * a, rel=1e-12)
    _against_finite_differences(lambda x: loss_fn(x, old_T, advantage_T).sum(), logprob_T)
    here_T = old_T.clone().requires_grad_()
    (gradient_T,) = torch.autograd.grad(loss_fn(here_T, old_T, advantage_T).sum(), here_T)
    torch.testing.assert_close(gradient_T, -advantage_T)


def test_plain_policy_gradient_and_the_unclipped_ratio():
    logprob_T, old_T, advantage_T = _batch(2, spread=3.0)
    torch.testing.assert_close(GPG()(logprob_T, old_T, advantage_T), -advantage_T * logprob_T)
    (gradient_T,) = torch.autograd.grad(GPG()(logprob_T, old_T, advantage_T).sum(), logprob_T)
    torch.testing.assert_close(gradient_T, -advantage_T)
    ratio_T = (logprob_T - old_T).exp()
    torch.testing.assert_close(build_loss("unclipped")(logprob_T, old_T, advantage_T), -ratio_T * advantage_T)
    _against_finite_differences(lambda x: build_loss("unclipped")(x, old_T, advantage_T).sum(), logprob_T)


def test_losses_by_name():
    assert build_loss("clip_higher") == PPOClip(clip_low=0.2, clip_high=0.28)
    assert build_loss("geo_mean", clip_high=0.2) == GeoMean(clip_high=0.2)
    with pytest.raises(ValueError, match="unknown policy loss 'gsppo': did you mean 'gspo'"):
        build_loss("gsppo")
    with pytest.raises(ValueError, match=r"policy loss 'sapo' was given \['tau'\]"):
        build_loss("sapo", tau=1.0)


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_scales_with_the_advantage_and_pushes_the_right_way_at_ratio_one(name):
    loss_fn = build_loss(name)
    _, old_T, advantage_T = _batch(3)
    here_T = old_T.clone().requires_grad_()
    more = (LENGTHS, None) if getattr(loss_fn, "sequence_level", False) else ()
    (gradient_T,) = torch.autograd.grad(loss_fn(here_T, old_T, advantage_T, *more).sum(), here_T)
    torch.testing.assert_close(gradient_T, -advantage_T)
    logprob_T, old_T, advantage_T = _batch(4)
    once, thrice = (loss_fn(logprob_T, old_T, factor * advantage_T, *more) for factor in (1.0, 3.0))
    torch.testing.assert_close(thrice, 3.0 * once)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: GeoMean(clip_low=0.0), "clip_low = 0.0"),
        (lambda: SAPO(tau_negative=-1.0), "tau_negative = -1.0"),
    ],
)
def test_bad_constants_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()
