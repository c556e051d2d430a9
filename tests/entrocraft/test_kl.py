"""KL estimators: values by formula, and the mean of value and gradient over every token of a small policy."""

import math

import pytest
import torch

from entrocraft.kl import ESTIMATORS, kl

LOGITS = torch.tensor([1.2, -0.3, 0.4, -1.0], dtype=torch.float64)
REFERENCE = torch.tensor([0.1, 0.5, -0.2, 0.3], dtype=torch.float64).log_softmax(0)


def test_values_and_gradients_by_formula():
    logprob_T = torch.tensor([-0.5, -2.0, -1.0], dtype=torch.float64, requires_grad=True)
    ref_T = torch.tensor([-0.9, -1.5, -1.0], dtype=torch.float64)
    d = [-0.4, 0.5, 0.0]
    values = {"k1": [-x for x in d], "k2": [x * x / 2 for x in d], "k3": [math.exp(x) - x - 1 for x in d]}
    slopes = {"k1": [1.0] * 3, "k2": [-x for x in d], "k3": [1 - math.exp(x) for x in d]}
    for kind in ESTIMATORS:
        value_T = kl(logprob_T, ref_T, kind=kind)
        assert value_T.tolist() == pytest.approx(values[kind.rstrip("+")], abs=1e-12)
        (gradient_T,) = torch.autograd.grad(value_T.sum(), logprob_T)
        assert gradient_T.tolist() == pytest.approx(slopes["k2" if kind.endswith("+") else kind], abs=1e-12)


@pytest.mark.parametrize(
    ("kind", "value_unbiased", "gradient"),
    [("k1", True, "none"), ("k2", False, "kl"), ("k3", True, "reverse"), ("k1+", True, "kl"), ("k3+", True, "kl")],
)
def test_means_over_all_tokens(kind, value_unbiased, gradient):
    logits_V = LOGITS.clone().requires_grad_()
    logp_V = logits_V.log_softmax(0)
    p_V = logp_V.exp()
    exact = (p_V * (logp_V - REFERENCE)).sum()
    reverse = (REFERENCE.exp() * (REFERENCE - logp_V)).sum()
    mean = (p_V.detach() * kl(logp_V, REFERENCE, kind=kind)).sum()
    assert (abs(float((mean - exact).detach())) < 1e-12) is value_unbiased
    (got,) = torch.autograd.grad(mean, logits_V, retain_graph=True)
    wanted = {"kl": exact, "reverse": reverse}.get(gradient)
    expected = torch.zeros(4, dtype=torch.float64) if wanted is None else torch.autograd.grad(wanted, logits_V)[0]
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)


def test_far_log_ratios_stay_finite():
    far_T = torch.tensor([-50.0, 50.0], requires_grad=True)
    value_T = kl(far_T, torch.zeros(2), kind="k3")
    assert value_T.tolist() == [10.0, 10.0]
    (gradient_T,) = torch.autograd.grad(value_T.sum(), far_T)
    assert gradient_T.tolist() == [0.0, 0.0]
    # The clamps are of k3 alone: the others grow on, and k3+ has the gradient of k2.
    assert kl(far_T, torch.zeros(2), kind="k1").tolist() == [-50.0, 50.0]
    value_T = kl(far_T, torch.zeros(2), kind="k3+")
    assert value_T.tolist() == [10.0, 10.0]
    (gradient_T,) = torch.autograd.grad(value_T.sum(), far_T)
    assert gradient_T.tolist() == [-50.0, 50.0]


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="unknown KL estimator 'k4'"):
        kl(torch.zeros(2), torch.zeros(2), kind="k4")
    with pytest.raises(ValueError, match=r"ref_logprob_T has shape \(3,\), expected \(2,\)"):
        kl(torch.zeros(2), torch.zeros(3), kind="k1")
