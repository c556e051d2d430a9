"""The logits op against its reference in fp64, and against the linear head with the same logits."""

import math

import pytest
import torch

from entrocraft.kernels import TokenStats, linear_logprob_entropy, logits_logprob_entropy
from entrocraft.kernels import logits_logprob as module
from entrocraft.kernels import logits_logprob_entropy_reference as reference
from entrocraft.kernels.testing import assert_no_worse_than_torch


def _run(op, logit_TV, target_T, upstream, **options):
    leaf_TV = logit_TV.detach().requires_grad_()
    stats = op(leaf_TV, target_T, collision=True, varentropy=True, argmax=True, **options)
    total = (upstream * torch.stack([stats.logprob_T, stats.entropy_T, stats.lse_T])).sum()
    return [*stats.as_dict().values(), *torch.autograd.grad(total, [leaf_TV])]


# A single token, a vocabulary of one, ragged; the last with blocks of two rows, as a vocabulary of 500k has.
@pytest.mark.parametrize(("T", "V", "block"), [(1, 9, 1 << 20), (6, 1, 1 << 20), (37, 131, 1 << 20), (37, 131, 300)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("options", [{}, {"softcap": 4.0, "temperature": "rows"}], ids=str)
def test_values_and_gradients(device, monkeypatch, T, V, block, dtype, options):
    monkeypatch.setattr(module, "BLOCK_ELEMENTS", block)
    options = dict(options)
    if options.get("temperature") == "rows":
        options["temperature"] = (torch.rand(T) + 0.5).to(device)
    logit_TV = (3 * torch.randn(T, V)).to(device, dtype)
    target_T = torch.randint(0, V, (T,), device=device)
    target_T[T // 2 : T // 2 + T // 4] = -100
    upstream = torch.randn(3, T, device=device)
    results = [
        _run(logits_logprob_entropy, logit_TV, target_T, upstream, **options),
        _run(reference, logit_TV, target_T, upstream, **options),
        _run(reference, logit_TV.double(), target_T, upstream, **options),
    ]
    assert results[0][-1].dtype == dtype
    assert [value.requires_grad for value in results[0][:8]] == [True] * 3 + [False] * 5
    names = [name for name in TokenStats.__slots__ if name != "clamped_entropy_T"]  # which no op of these gives
    for name, *triple in zip([*names, "gradient"], *results, strict=True):
        assert_no_worse_than_torch(*triple, floor=1e-6, name=name)


def test_masked_logits_as_after_top_k(device):
    # -inf logits have no probability and no gradient; every row keeps 5 of 40, and the target is one of them.
    logit_TV = torch.randn(11, 40, device=device)
    kept_TV = logit_TV.topk(5, dim=1).indices
    masked_TV = torch.full_like(logit_TV, -torch.inf).scatter(1, kept_TV, logit_TV.gather(1, kept_TV))
    upstream = torch.randn(3, 11, device=device)
    actual = _run(logits_logprob_entropy, masked_TV, kept_TV[:, 2], upstream)
    dense = _run(logits_logprob_entropy, logit_TV.gather(1, kept_TV), torch.full_like(kept_TV[:, 2], 2), upstream)
    exact = _run(reference, masked_TV.double(), kept_TV[:, 2], upstream)
    for left, right, best in zip(actual[:6], dense[:6], exact[:6], strict=True):
        torch.testing.assert_close(left, right, rtol=0, atol=1e-6)
        torch.testing.assert_close(left.double(), best, rtol=0, atol=1e-6)
    torch.testing.assert_close(actual[8].gather(1, kept_TV), dense[8], rtol=0, atol=1e-6)
    assert float(actual[8].masked_fill(~masked_TV.isneginf(), 0).abs().max()) == 0.0
    assert exact[8].isfinite().all()


def test_extremes_and_bad_rows(device):
    logit_TV = torch.zeros(4, 50, device=device)
    logit_TV[1, 3] = 1e4
    logit_TV[2] = torch.linspace(-1e4, 1e4, 50, device=device)
    logit_TV[3, 7] = torch.nan
    stats = logits_logprob_entropy(logit_TV, torch.tensor([0, 3, 49, 2], device=device))
    expected_T = torch.tensor([math.log(50), 0.0, 0.0, torch.nan], device=device)
    torch.testing.assert_close(stats.entropy_T, expected_T, rtol=0, atol=1e-6, equal_nan=True)
    torch.testing.assert_close(stats.logprob_T, -expected_T, rtol=0, atol=1e-6, equal_nan=True)


def test_gradcheck_and_no_second_derivative(device):
    logit_TV = torch.randn(4, 6, dtype=torch.float64, device=device, requires_grad=True)
    target_T = torch.tensor([0, 5, -100, 2], device=device)

    def outputs(logit_TV):
        stats = logits_logprob_entropy(logit_TV, target_T, softcap=3.0, temperature=0.7)
        return stats.logprob_T, stats.entropy_T, stats.lse_T

    assert torch.autograd.gradcheck(outputs, [logit_TV])
    (first,) = torch.autograd.grad(outputs(logit_TV)[1].sum(), [logit_TV], create_graph=True)
    with pytest.raises(RuntimeError, match="logits_logprob_entropy has no second derivative"):
        first.sum().backward()


def test_agrees_with_the_linear_head(make_head):
    head = make_head(37, 131, 24, collision=True, ignored=5)
    linear, _ = head.run(linear_logprob_entropy)
    logits = logits_logprob_entropy(head.hidden_TH @ head.weight_VH.T, head.target_T, collision=True)
    for name, field in linear.as_dict().items():
        torch.testing.assert_close(field, getattr(logits, name), rtol=0, atol=4e-6)


def test_all_rows_ignored_and_no_rows(device):
    for T in (0, 5):
        logit_TV = torch.randn(T, 7, device=device, requires_grad=True)
        stats = logits_logprob_entropy(logit_TV, torch.full((T,), -100, device=device))
        (gradient,) = torch.autograd.grad(stats.logprob_T.sum() + stats.entropy_T.sum(), [logit_TV])
        torch.testing.assert_close(gradient, torch.zeros_like(logit_TV), rtol=0, atol=0)
        torch.testing.assert_close(stats.lse_T, torch.zeros(T, device=device), rtol=0, atol=0)
