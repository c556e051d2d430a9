"""The clamped entropy against a sort in fp64, its gradient against finite differences, and its bounds."""

import pytest
import torch

from entrocraft.kernels import clamped_entropy


def _operands(T=7, H=5, V=23, seed=0):
    generator = torch.Generator().manual_seed(seed)
    hidden_TH = 2 * torch.randn(T, H, generator=generator, dtype=torch.float64)
    return hidden_TH, torch.randn(V, H, generator=generator, dtype=torch.float64)


def _by_sorting(z_TV, share):
    """The definition, one row at a time."""
    kept = -(-round((1 - share) * 1000) * z_TV.shape[1] // 1000)  # ceil, in integers
    entropies = []
    for z_V in z_TV:
        logq_K = z_V.sort(descending=True).values[:kept].log_softmax(0)
        entropies.append(-(logq_K.exp() * logq_K).sum())
    return torch.stack(entropies)


@pytest.mark.parametrize("share", [0.05, 0.2, 0.7, 0.99])
@pytest.mark.parametrize("buffer_bytes", [1, 3000, 1 << 28])
def test_value_and_gradient_against_the_definition(share, buffer_bytes):
    hidden_TH, weight_VH = (one.requires_grad_() for one in _operands())
    got_T = clamped_entropy(hidden_TH, weight_VH, share=share, temperature=0.7, buffer_bytes=buffer_bytes)
    expected_T = _by_sorting(hidden_TH @ weight_VH.T / 0.7, share)
    torch.testing.assert_close(got_T, expected_T, rtol=1e-12, atol=1e-12)
    upstream_T = torch.linspace(-1, 1, 7, dtype=torch.float64)
    got = torch.autograd.grad((upstream_T * got_T).sum(), (hidden_TH, weight_VH))
    expected = torch.autograd.grad((upstream_T * expected_T).sum(), (hidden_TH, weight_VH))
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


def test_gradcheck_with_bias_softcap_and_a_temperature_a_row():
    hidden_TH, weight_VH = (one.requires_grad_() for one in _operands(T=3, V=9))
    bias_V = torch.linspace(-1, 1, 9, dtype=torch.float64).requires_grad_()
    temperature_T = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)

    def op(hidden_TH, weight_VH, bias_V):
        options = {"bias_V": bias_V, "softcap": 3.0, "temperature": temperature_T}
        return clamped_entropy(hidden_TH, weight_VH, share=0.3, **options)

    assert torch.autograd.gradcheck(op, (hidden_TH, weight_VH, bias_V))


def test_bf16_operands_lose_what_fp32_products_lose():
    hidden_TH, weight_VH = (one.bfloat16() for one in _operands(T=40, V=500))
    got_T = clamped_entropy(hidden_TH, weight_VH, share=0.2)
    exact_T = _by_sorting(hidden_TH.double() @ weight_VH.double().T, 0.2)
    assert got_T.dtype == torch.float32
    assert float((got_T.double() - exact_T).abs().max()) < 2e-6


def test_it_lies_between_zero_and_the_logarithm_of_what_is_kept():
    hidden_TH, weight_VH = _operands(T=50)
    entropy_T = clamped_entropy(hidden_TH, weight_VH, share=0.5)
    assert float(entropy_T.min()) >= 0
    flat = clamped_entropy(torch.zeros(1, 5), torch.ones(10, 5), share=0.5)
    assert float(flat) == pytest.approx(torch.log(torch.tensor(5.0)))
    assert clamped_entropy(hidden_TH[:0], weight_VH, share=0.5).shape == (0,)


@pytest.mark.parametrize("share", [0.0, 1.0, -0.2])
def test_a_share_out_of_range_is_named(share):
    with pytest.raises(ValueError, match=f"share = {share}: expected a part of the vocabulary"):
        clamped_entropy(*_operands(), share=share)


def test_shapes_that_do_not_fit_are_named():
    with pytest.raises(ValueError, match=r"hidden_TH is \(7, 5\) and weight_VH \(23, 4\)"):
        clamped_entropy(_operands()[0], _operands()[1][:, :4], share=0.5)
