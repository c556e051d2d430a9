"""GSPO and CISPO: vectors worked by hand, and the papers' formulas on full logits in fp64."""

import math
import re

import pytest
import torch
from torch import Tensor

from entrocraft import CISPO, GSPO, token_weights

LENGTHS = [4, 0, 1, 7, 3]
T, V, R = sum(LENGTHS), 9, len(LENGTHS)
ROLLOUT_T = torch.repeat_interleave(torch.arange(R), torch.tensor(LENGTHS))


def _logprobs(spread: float) -> tuple[Tensor, Tensor, Tensor]:
    """Logits that require a gradient, the log-probabilities of tokens, and those of an older policy near by."""
    logit_TV = (2 * torch.randn(T, V, dtype=torch.float64)).requires_grad_()
    logprob_T = torch.log_softmax(logit_TV, -1).gather(1, torch.randint(0, V, (T, 1)))[:, 0]
    return logit_TV, logprob_T, logprob_T.detach() + spread * torch.randn(T, dtype=torch.float64)


def test_gspo_by_hand() -> None:
    # Three sequences: mean log-ratio 0.1 (its clip is 1.05), -0.01 (inside), -0.01 of one counted token of two.
    log_ratio_T = torch.tensor([0.1, -0.2, 0.4, -0.02, 0.0, -0.01, 5.0], dtype=torch.float64).requires_grad_()
    old_T = torch.full((7,), -2.0, dtype=torch.float64)
    advantage_T = torch.tensor([1.0, 1.0, 1.0, -2.0, -2.0, 3.0, 3.0], dtype=torch.float64)
    mask_T = torch.tensor([True] * 6 + [False])
    loss_fn = GSPO(clip_low=0.02, clip_high=0.05)
    loss_T = loss_fn(old_T + log_ratio_T, old_T, advantage_T, [3, 2, 2], mask_T)
    s = 0.990049833749168  # exp(-0.01)
    assert loss_T.tolist() == pytest.approx([-1.05] * 3 + [2 * s] * 2 + [-3 * s] * 2, rel=1e-14)
    (gradient_T,) = torch.autograd.grad(loss_T.sum(), log_ratio_T)
    assert gradient_T.tolist() == pytest.approx([0.0] * 3 + [2 * s] * 2 + [-3 * s] * 2, rel=1e-14)
    flags = loss_fn.clipped(old_T + log_ratio_T, old_T, advantage_T, [3, 2, 2], mask_T)
    assert flags["high"].tolist() == [True] * 3 + [False] * 4
    assert not flags["low"].any()


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("clips", [(3e-4, 4e-4), (0.02, 0.03), (1.0, 50.0)], ids=str)
def test_gspo_is_the_objective_of_whole_sequences(clips: tuple[float, float], masked: bool) -> None:
    logit_TV, logprob_T, old_T = _logprobs(0.1)
    mask_T = torch.rand(T) < 0.7 if masked else torch.ones(T, dtype=torch.bool)
    mask_T[:2] = True
    advantage_R = torch.tensor([1.0, 0.5, -1.5, 0.75, -0.25], dtype=torch.float64)
    weight_T = token_weights(ROLLOUT_T, mask_T, torch.zeros(R).long(), aggregation="seq_mean_token_mean").double()
    loss_fn = GSPO(clip_low=clips[0], clip_high=clips[1])
    arguments = (old_T, advantage_R[ROLLOUT_T], LENGTHS, mask_T)
    ours = (weight_T * loss_fn(logprob_T, *arguments)).sum()
    # As the paper writes it: one term a sequence, whose ratio is (pi(y) / pi_old(y)) ** (1 / |y|).
    terms = []
    for r in range(R):
        counted_T = (r == ROLLOUT_T) & mask_T
        if counted_T.any():
            likelihood = (logprob_T[counted_T].sum() - old_T[counted_T].sum()).exp() ** (1 / int(counted_T.sum()))
            inside = likelihood.clamp(1 - clips[0], 1 + clips[1])
            terms.append(-torch.minimum(likelihood * advantage_R[r], inside * advantage_R[r]))
    paper = torch.stack(terms).mean()
    assert float(ours.detach()) == pytest.approx(float(paper.detach()), abs=1e-7)  # weights are fp32
    gradients = [torch.autograd.grad(loss, logit_TV, retain_graph=True)[0] for loss in (ours, paper)]
    torch.testing.assert_close(*gradients, rtol=1e-6, atol=1e-7)
    gone_T = torch.stack(list(loss_fn.clipped(logprob_T, *arguments).values())).any(0)
    assert gone_T[mask_T].tolist() == (gradients[0].abs().sum(1) == 0)[mask_T].tolist()
    assert clips[0] < 0.5 or not gone_T.any()


def test_gspo_beyond_the_clamp() -> None:
    # A < 0 above: the clamp alone, here on both sides of it. A > 0 far below: nothing binds.
    logprob_T = torch.tensor([9.0, 15.0, -30.0], requires_grad=True)
    loss_fn, advantage_T = GSPO(clip_high=50.0), torch.tensor([-1.0, -1.0, 1.0])
    loss_T = loss_fn(logprob_T, torch.zeros(3), advantage_T, [1, 1, 1])
    loss_T.sum().backward()
    expected = [math.exp(9), math.exp(10), -math.exp(-30)]
    assert loss_T.tolist() == pytest.approx(expected, rel=1e-5, abs=0.0)
    assert logprob_T.grad is not None
    assert logprob_T.grad.tolist() == pytest.approx([expected[0], 0.0, expected[2]], rel=1e-5, abs=0.0)
    flags = loss_fn.clipped(logprob_T, torch.zeros(3), advantage_T, [1, 1, 1])
    assert (flags["high"].tolist(), flags["low"].tolist()) == ([False, True, False], [False, False, False])


def test_cispo_by_hand() -> None:
    # r = 0.5, 1, 1.5, 4 under a lower bound of 0.8 and without one; the cap is 1.2.
    logprob_T = torch.tensor([-1.0, -2.0, -3.0, -0.5], dtype=torch.float64, requires_grad=True)
    old_T = logprob_T.detach() - torch.tensor([0.5, 1.0, 1.5, 4.0], dtype=torch.float64).log()
    advantage_T = torch.tensor([2.0, 1.0, -1.0, 0.5], dtype=torch.float64)
    for clip_low, first in ((1.0, 0.5), (0.2, 0.8)):
        loss_fn = CISPO(clip_low=clip_low)
        loss_T = loss_fn(logprob_T, old_T, advantage_T)
        assert loss_T.tolist() == pytest.approx([2 * first, 2.0, -3.6, 0.3], rel=1e-14)
        (gradient_T,) = torch.autograd.grad(loss_T.sum(), logprob_T)
        assert gradient_T.tolist() == pytest.approx([-2 * first, -1.0, 1.2, -0.6], rel=1e-14)
        flags = loss_fn.clipped(logprob_T, old_T, advantage_T)
        assert flags["high"].tolist() == [False, False, True, True]
        assert flags["low"].tolist() == [clip_low == 0.2, False, False, False]


def test_cispo_is_a_weighted_policy_gradient() -> None:
    logit_TV, logprob_T, old_T = _logprobs(0.5)
    advantage_T = torch.randn(T, dtype=torch.float64)
    (ours_TV,) = torch.autograd.grad(
        CISPO(clip_low=0.3)(logprob_T, old_T, advantage_T).sum(), logit_TV, retain_graph=True
    )
    # d logprob_t / d z = onehot - p, row by row, times a number worked out without autograd.
    ratio = [min(max(math.exp(float(new - old)), 0.7), 1.2) for new, old in zip(logprob_T.detach(), old_T, strict=True)]
    p_TV = torch.softmax(logit_TV.detach(), -1)
    token_T = (torch.log(p_TV) - logprob_T.detach()[:, None]).abs().argmin(1)
    onehot_TV = torch.nn.functional.one_hot(token_T, V)
    wanted_TV = -torch.tensor(ratio, dtype=torch.float64)[:, None] * advantage_T[:, None] * (onehot_TV - p_TV)
    assert len({round(r, 9) for r in ratio} & {0.7, 1.2}) == 2  # both bounds are met
    torch.testing.assert_close(ours_TV, wanted_TV, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("loss_fn", [GSPO, CISPO])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"clip_low": 0.0}, "clip_low = 0.0: expected 0 < clip_low <= 1, such as"),
        ({"clip_low": 1.5}, "clip_low = 1.5"),
        ({"clip_high": -0.2}, "clip_high = -0.2: expected a finite clip_high > 0, such as"),
        ({"clip_high": math.inf}, "clip_high = inf"),
    ],
)
def test_bad_clips(loss_fn: type, arguments: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        loss_fn(**arguments)


def test_what_does_not_fit() -> None:
    zero_T = torch.zeros(3)
    with pytest.raises(ValueError, match=r"advantage_T has shape \(2,\), expected \(3,\)"):
        CISPO()(zero_T, zero_T, zero_T[:2])
    with pytest.raises(ValueError, match="lengths_R sums to 4; expected 3"):
        GSPO()(zero_T, zero_T, zero_T, [1, 3])
    with pytest.raises(ValueError, match=r"mask_T is torch.float32 \(3,\); expected bool \(3,\)"):
        GSPO()(zero_T, zero_T, zero_T, [3], zero_T)
    assert GSPO()(zero_T[:0], zero_T[:0], zero_T[:0], [0]).tolist() == []
