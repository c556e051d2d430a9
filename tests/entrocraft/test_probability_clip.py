"""Probability-dependent clips: the lines' values, gradients at their bounds, and the shares of each schedule."""

import pytest
import torch

from entrocraft import PPOClip, TokenStats, methods
from entrocraft.methods import Signal, Tokens
from entrocraft.probability_clip import FlexibleClip, ProbabilityClip


def test_the_lines_are_wide_for_rare_tokens_and_tight_for_common_ones():
    old_T = torch.tensor([1e-9, 0.5, 1.0], dtype=torch.float64).log()
    lower_T, upper_T = ProbabilityClip().bounds(old_T)
    torch.testing.assert_close(upper_T, torch.tensor([1.5, 1.5 / 1.125, 1.2], dtype=torch.float64))
    torch.testing.assert_close(lower_T, torch.tensor([0.7, 0.7 / 0.935, 0.7 / 0.87], dtype=torch.float64))
    # The bound solves r = 1 + a r p + b, and r = 1 - a r p - b.
    torch.testing.assert_close(upper_T, 1 - 0.25 * upper_T * old_T.exp() + 0.5)
    torch.testing.assert_close(lower_T, 1 + 0.13 * lower_T * old_T.exp() - 0.3)


def test_without_its_lines_it_is_ppo_clip():
    generator = torch.Generator().manual_seed(0)
    old_T = -3 * torch.rand(50, generator=generator, dtype=torch.float64)
    logprob_T = (old_T + 0.4 * torch.randn(50, generator=generator, dtype=torch.float64)).requires_grad_()
    advantage_T = torch.randn(50, generator=generator, dtype=torch.float64)
    plain = PPOClip(clip_low=0.15, clip_high=0.25, dual_clip=None)
    bent = ProbabilityClip(upper_share=0.0, lower_share=0.0, clip_low=0.15, clip_high=0.25)
    values = [loss_fn(logprob_T, old_T, advantage_T) for loss_fn in (bent, plain)]
    torch.testing.assert_close(*values)
    gradients = [torch.autograd.grad(value.sum(), logprob_T)[0] for value in values]
    torch.testing.assert_close(*gradients)


def test_gradients_vanish_where_a_line_binds_and_only_there():
    old_T = torch.tensor([0.01, 0.01, 0.9, 0.9], dtype=torch.float64).log()
    ratio_T = torch.tensor([1.45, 0.75, 1.3, 0.75], dtype=torch.float64)
    logprob_T = (old_T + ratio_T.log()).requires_grad_()
    advantage_T = torch.tensor([1.0, -1.0, 1.0, -1.0], dtype=torch.float64)
    loss_fn = ProbabilityClip()
    (gradient_T,) = torch.autograd.grad(loss_fn(logprob_T, old_T, advantage_T).sum(), logprob_T)
    torch.testing.assert_close(gradient_T, torch.tensor([-1.45, 0.75, 0.0, 0.0], dtype=torch.float64))
    clipped = loss_fn.clipped(logprob_T, old_T, advantage_T)
    assert (clipped["high"].tolist(), clipped["low"].tolist()) == ([False, False, True, False], [False] * 3 + [True])


def test_gradients_are_the_slopes_of_the_loss():
    generator = torch.Generator().manual_seed(1)
    old_T = -3 * torch.rand(60, generator=generator, dtype=torch.float64)
    logprob_T = (old_T + 0.4 * torch.randn(60, generator=generator, dtype=torch.float64)).requires_grad_()
    advantage_T = torch.randn(60, generator=generator, dtype=torch.float64)
    loss_fn = ProbabilityClip(upper_share=0.6, lower_share=0.3)
    (gradient_T,) = torch.autograd.grad(loss_fn(logprob_T, old_T, advantage_T).sum(), logprob_T)
    above_T, below_T = (loss_fn(logprob_T.detach() + step, old_T, advantage_T) for step in (1e-6, -1e-6))
    torch.testing.assert_close(gradient_T, (above_T - below_T) / 2e-6, rtol=1e-5, atol=1e-8)
    clipped = loss_fn.clipped(logprob_T, old_T, advantage_T)
    assert bool(clipped["high"].any())
    assert bool(clipped["low"].any())
    assert (gradient_T == 0).tolist() == (clipped["high"] | clipped["low"]).tolist()


def _shares(schedule, entropies, steps=8):
    method, state, seen = methods.build("flexible_clip", schedule=schedule), {}, []
    for step, entropy in enumerate(entropies):
        state = method.observe(state, Signal(step=step, steps=steps, entropy=entropy))
        seen.append((round(state["upper_share"], 6), round(state["lower_share"], 6)))
    return seen


def test_shares_over_the_run():
    flat = [1.0] * 8
    assert _shares("id", flat) == [
        (1.0, 0.0), (0.75, 0.0), (0.5, 0.0), (0.25, 0.0), (0.0, 0.0), (0.0, 0.75), (0.0, 0.5), (0.0, 0.25)
    ]  # fmt: skip
    assert _shares("did", flat) == [
        (0.0, 0.0), (0.25, 0.0), (0.5, 0.0), (0.75, 0.0), (1.0, 0.0), (1.0, 0.75), (1.0, 0.5), (1.0, 0.25)
    ]  # fmt: skip


def test_a_step_past_the_last_is_the_last():
    for schedule, shares in (("id", (0.0, 0.0)), ("did", (1.0, 0.0))):
        state = methods.build("flexible_clip", schedule=schedule).observe({}, Signal(step=12, steps=8, entropy=1.0))
        assert (state["upper_share"], state["lower_share"]) == shares


def test_the_switch_has_a_memory_between_two_bounds_that_come_together():
    # H_0 = 1: low 0.2, high 0.2 + 0.8 (1 - k / 8) = 1, 0.9, 0.8, 0.7, 0.6, 0.5
    seen = _shares("od", [1.0, 0.5, 0.2, 0.6, 0.61, 0.4])
    assert seen == [(0.0, 1.0), (0.0, 1.0), (1.0, 0.0), (1.0, 0.0), (0.0, 1.0), (0.0, 1.0)]
    # H_0 = 5: low 1; high 4, then 3.5, all exact in binary. On a bound the switch turns below and not above.
    assert _shares("od", [5.0, 1.0, 4.0, 3.6]) == [(0.0, 1.0), (1.0, 0.0), (1.0, 0.0), (0.0, 1.0)]


@pytest.mark.parametrize(
    ("schedule", "step", "entropy", "upper", "lower"),
    [
        ("id", 2, 1.0, 0.5, 0.0),
        ("id", 5, 1.0, 0.0, 0.75),
        ("did", 3, 1.0, 0.75, 0.0),
        ("did", 6, 1.0, 1.0, 0.5),
        ("od", 0, 1.0, 0.0, 1.0),
    ],
)
def test_the_loss_of_a_step_mixes_each_line_with_its_plain_clip(schedule, step, entropy, upper, lower):
    # Loop, not vectors: max(-r A, -clip(r) A) with bounds that are so much line and so much 1 + 0.3, or 1 - 0.1.
    generator = torch.Generator().manual_seed(3)
    old_T = -3 * torch.rand(80, generator=generator, dtype=torch.float64)
    logprob_T = (old_T + 0.4 * torch.randn(80, generator=generator, dtype=torch.float64)).requires_grad_()
    advantage_T = torch.randn(80, generator=generator, dtype=torch.float64)
    tokens = Tokens(
        stats=TokenStats(logprob_T=logprob_T.detach(), entropy_T=-old_T, lse_T=old_T), old_logprob_T=old_T,
        advantage_T=advantage_T, mask_T=torch.ones(80, dtype=torch.bool), rollout_T=torch.zeros(80, dtype=torch.int64),
        group_R=torch.zeros(1, dtype=torch.int64),
    )  # fmt: skip
    method = FlexibleClip(schedule=schedule, clip=ProbabilityClip(clip_low=0.1, clip_high=0.3))
    state = method.observe({}, Signal(step=step, steps=8, entropy=entropy))
    loss_T = method.terms(tokens, state).loss_fn(logprob_T, old_T, advantage_T)
    (gradient_T,) = torch.autograd.grad(loss_T.sum(), logprob_T)
    bound = {"high": 0, "low": 0}
    for t in range(80):
        p, r, a = old_T[t].exp().item(), (logprob_T[t] - old_T[t]).exp().item(), advantage_T[t].item()
        high = upper * 1.5 / (1.0 + 0.25 * p) + (1.0 - upper) * 1.3
        low = lower * 0.7 / (1.0 - 0.13 * p) + (1.0 - lower) * 0.9
        stopped = r > high if a > 0 else r < low
        bound["high" if a > 0 else "low"] += stopped
        assert loss_T[t].item() == pytest.approx(-a * ((high if a > 0 else low) if stopped else r), rel=1e-12)
        assert gradient_T[t].item() == pytest.approx(0.0 if stopped else -a * r, rel=1e-12, abs=0.0)
    assert min(bound.values()) > 3


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ProbabilityClip(upper_a=0.1), "upper_a = 0.1"),
        (lambda: ProbabilityClip(lower_b=1.0), "lower_b = 1.0"),
        (lambda: ProbabilityClip(upper_b=0.0), "upper_b = 0.0"),
        (lambda: ProbabilityClip(clip_high=-0.1), "clip_high = -0.1"),
        (lambda: ProbabilityClip(lower_share=1.5), "lower_share = 1.5"),
        (lambda: ProbabilityClip(upper_share=-0.5), r"upper_share = -0.5: expected a share in \[0, 1\]"),
        (lambda: FlexibleClip(schedule="up"), "schedule = 'up': expected one of 'id', 'did', 'od'"),
    ],
)
def test_bad_constants_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()
