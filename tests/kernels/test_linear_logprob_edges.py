"""The linear head op at its edges: nothing to do, odd strides, extreme and infinite logits, NaN; on both paths."""

import math

import pytest
import torch

from entrocraft.kernels import linear_logprob_entropy


def test_no_tokens_at_all(make_head):
    stats, leaves = make_head(0, 13, 5, bias=True, collision=True).run(linear_logprob_entropy)
    assert len(stats) == 0
    (stats.logprob_T.sum() + stats.entropy_T.sum()).backward()
    for leaf in leaves.values():
        torch.testing.assert_close(leaf.grad, torch.zeros_like(leaf))


def test_every_row_ignored(make_head, check_head):
    stats = check_head(make_head(9, 13, 5, ignored=9, bias=True, collision=True), floor=0.0, grad_floor=0.0)
    assert all(float(field.abs().sum()) == 0.0 for field in stats.as_dict().values())


def test_hidden_rows_of_any_stride(make_head, check_head):
    head = make_head(37, 131, 24)
    wide = torch.randn(37, 5, 48, device=head.hidden_TH.device)
    for view in (
        wide[:, 2, ::2],
        wide[:, 1, 24:],
        torch.randn(24, 37, device=wide.device).T,
        wide[:1, 0, :24].expand(37, 24),
    ):
        assert not view.is_contiguous()
        head.hidden_TH = view
        values = linear_logprob_entropy(view, head.weight_VH.T.contiguous().T, head.target_T)
        packed = linear_logprob_entropy(view.contiguous(), head.weight_VH, head.target_T)
        torch.testing.assert_close(values.logprob_T, packed.logprob_T, rtol=0, atol=2e-6)
        check_head(head)


# Spreads around 1e4: softmax is one-hot, exponentials underflow, and lse alone would lose four digits of log p.
@pytest.mark.parametrize("kind", ["huge", "one_hot", "uniform"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_extreme_logits(make_head, check_head, kind, dtype):
    T, V, H = 12, 261, 8
    head = make_head(T, V, H, dtype=dtype, collision=True)
    if kind == "uniform":
        head.weight_VH.zero_()
    else:
        head.hidden_TH = head.hidden_TH.sign() * (1e4 if kind == "huge" else 30.0)
        head.weight_VH = torch.zeros_like(head.weight_VH)
        head.weight_VH[:H].fill_diagonal_(1.0)
        head.weight_VH[H : 2 * H].fill_diagonal_(-1.0)
        head.target_T = torch.arange(T, device=head.target_T.device)
    stats = check_head(head)
    assert float(stats.logprob_T.max()) < 1e-6
    assert float(stats.entropy_T.min()) >= -1e-6
    assert float(stats.entropy_T.max()) <= math.log(V) + 1e-6
    if kind == "uniform":
        assert float((stats.entropy_T - math.log(V)).abs().max()) < 1e-6


# -inf in the bias pads a vocabulary: in the middle, a whole vocabulary split of the Triton path, all but one token.
@pytest.mark.parametrize("kept", [slice(0, 100), slice(1030, 1100), slice(5, 6)], ids=str)
def test_padded_vocabulary(make_head, check_head, kept):
    head = make_head(20, 1153, 8, bias=True, collision=True)
    padded = torch.ones_like(head.bias_V, dtype=torch.bool)
    padded[kept] = False
    head.bias_V[padded] = -torch.inf
    head.target_T = head.target_T % (kept.stop - kept.start) + kept.start
    stats = check_head(head, buffer_bytes=100_000)
    dense = linear_logprob_entropy(
        head.hidden_TH, head.weight_VH[kept], head.target_T - kept.start, bias_V=head.bias_V[kept], collision=True
    )
    for name, field in stats.as_dict().items():
        torch.testing.assert_close(field, getattr(dense, name), rtol=0, atol=3e-6)
    assert float(stats.entropy_T.detach().max()) <= math.log(kept.stop - kept.start) + 1e-6


def test_impossible_target_has_log_probability_minus_infinity(make_head, check_head):
    head = make_head(4, 9, 3, bias=True)
    head.bias_V[2] = -torch.inf
    head.target_T[1] = 2
    assert check_head(head).logprob_T[1] == -torch.inf


# The last column of a matrix, one number for all, a leaf of which every second entry is read.
@pytest.mark.parametrize("kind", ["column", "expanded", "every_second"])
def test_bias_of_any_stride(make_head, check_head, kind):
    head = make_head(37, 131, 24)
    base = {"column": torch.randn(131, 3), "expanded": torch.randn(1), "every_second": torch.randn(262)}[kind]
    base = base.to(head.hidden_TH.device).requires_grad_()
    view = {"column": lambda b: b[:, 1], "expanded": lambda b: b.expand(131), "every_second": lambda b: b[::2]}[kind]
    assert view(base).stride() != (1,)
    head.bias_V = view(base).detach()
    check_head(head)
    gradients = []
    for bias_V in (view(base), view(base).contiguous()):
        stats = linear_logprob_entropy(head.hidden_TH, head.weight_VH, head.target_T, bias_V=bias_V)
        gradients.append(torch.autograd.grad(stats.logprob_T.sum() + stats.entropy_T.sum(), [base])[0])
    assert float(gradients[1].abs().max()) > 1e-3 or kind == "expanded"  # a shift of all logits changes nothing
    torch.testing.assert_close(*gradients, rtol=0, atol=0)


# The interpreter computes with numpy, which warns where a GPU is silent.
quiet = pytest.mark.filterwarnings("ignore:(invalid value|overflow|All-NaN|divide by zero):RuntimeWarning")


@quiet
@pytest.mark.parametrize(
    ("poison", "dtype", "buffer_bytes"),
    [(torch.nan, torch.float32, 1 << 28), (torch.inf, torch.float16, 20_000)],
    ids=str,
)
def test_a_bad_row_without_gradient_reaches_no_gradient(make_head, poison, dtype, buffer_bytes):
    # One bad row is ignored; the other has a target but no upstream gradient. 0 * NaN is NaN.
    head = make_head(70, 131, 5, dtype=dtype, bias=True)
    head.target_T[66] = -100
    upstream = torch.randn(70, device=head.target_T.device)
    upstream[3] = 0.0
    results = []
    for bad in (False, True):
        if bad:
            head.hidden_TH = head.hidden_TH.clone()
            head.hidden_TH[66, 2] = head.hidden_TH[3, 1] = poison
        stats, leaves = head.run(linear_logprob_entropy, buffer_bytes=buffer_bytes)
        results.append(torch.autograd.grad([stats.logprob_T, stats.entropy_T], list(leaves.values()), [upstream] * 2))
    for clean, beside_bad in zip(*results, strict=True):
        assert float(clean.abs().max()) > 0
        torch.testing.assert_close(beside_bad, clean, rtol=0, atol=0)


@quiet
@pytest.mark.parametrize("poison", [torch.nan, torch.inf], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_a_bad_row_is_seen_and_stays_alone(make_head, poison, dtype):
    head = make_head(9, 131, 5, collision=True, dtype=dtype)
    clean, clean_leaves = head.run(linear_logprob_entropy)
    (expected,) = torch.autograd.grad(clean.logprob_T.sum() + clean.entropy_T.sum(), [clean_leaves["hidden_TH"]])
    clean, head.hidden_TH = clean.detach(), head.hidden_TH.clone()
    head.hidden_TH[4, 2] = poison
    stats, leaves = head.run(linear_logprob_entropy)
    others = torch.arange(9, device=head.target_T.device) != 4
    for name, field in stats.as_dict().items():
        assert field[4].isnan(), name
        torch.testing.assert_close(field[others], getattr(clean, name)[others], rtol=0, atol=1e-6)
    (gradient,) = torch.autograd.grad(stats.logprob_T.sum() + stats.entropy_T.sum(), [leaves["hidden_TH"]])
    assert gradient[4].isnan().all()
    torch.testing.assert_close(gradient[others], expected[others], rtol=2e-3, atol=1e-5)


def test_a_hidden_size_of_zero_is_refused(device):
    # The kernels take one step over H at least, which would read beyond an empty tensor.
    empty = torch.zeros(3, 0, device=device), torch.zeros(5, 0, device=device)
    with pytest.raises(ValueError, match=r"weight_VH is \(5, 0\); expected a hidden size H of at least 1"):
        linear_logprob_entropy(*empty, torch.zeros(3, dtype=torch.int64, device=device))
