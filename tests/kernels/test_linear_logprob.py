"""The linear head op against fp64: values and gradients over sizes, dtypes and options.

The same tests hold for both paths: the torch path, and Triton on a GPU or under TRITON_INTERPRET=1.
"""

import math
import os

import hypothesis
import pytest
import torch
from hypothesis import strategies as st

from entrocraft.kernels import linear_logprob_entropy, linear_logprob_entropy_reference
from entrocraft.kernels.linear_logprob_torch import tile_shape
from entrocraft.kernels.testing import assert_no_worse_than_torch

TRITON = torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
if os.environ.get("TRITON_INTERPRET") == "1":
    DTYPES.pop()  # the interpreter truncates at a bf16 store, where a GPU rounds


# Sizes: a single token; a vocabulary of one; ragged in everything; one past a Triton tile in rows, columns and hidden
# size and past a vocabulary split; more hidden columns than vocabulary.
@pytest.mark.parametrize(("T", "V", "H"), [(1, 7, 3), (5, 1, 4), (37, 131, 24), (65, 1153, 65), (3, 50, 300)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_and_gradients(make_head, check_head, T, V, H, dtype):
    check_head(make_head(T, V, H, dtype=dtype, ignored=T // 4, collision=True))


# One ragged size: options act on a row or a logit, whatever the size.
@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0.6},
        {"row_temperature": True},
        {"softcap": 5.0},
        {"bias": True},
        {"bias": True, "softcap": 5.0, "row_temperature": True, "collision": True, "ignored": 20},
        {"ignored": 30, "ignore_index": 7},
        {"weight_dtype": torch.float16},
        {"dtype": torch.float16, "weight_dtype": torch.float32, "bias": True, "collision": True},
        {"dtype": torch.bfloat16, "weight_dtype": torch.float32, "ignored": 9},
    ],
    ids=str,
)
def test_options(make_head, check_head, options):
    check_head(make_head(37, 131, 24, **options))


@pytest.mark.parametrize("wanted", [("logprob_T",), ("entropy_T",), ("lse_T",), ("logprob_T", "entropy_T")], ids=str)
def test_each_output_alone(make_head, check_head, wanted):
    check_head(make_head(37, 131, 24, bias=True, ignored=9), wanted=wanted)


# Budgets: one row and one column at a time; many tiles both ways (T past a Triton row block); all at once.
@pytest.mark.parametrize(
    ("T", "V", "H", "buffer_bytes"), [(3, 11, 5, 1), (200, 300, 8, 50_000), (37, 131, 24, 1 << 28)]
)
def test_any_split_gives_the_same(make_head, check_head, T, V, H, buffer_bytes):
    head = make_head(T, V, H, bias=True, collision=True, ignored=T // 3, softcap=20.0, row_temperature=True)
    check_head(head, buffer_bytes=buffer_bytes)


def test_tiles_stay_inside_the_budget():
    # The Qwen3-4B head, the largest of KERNELS' shapes, a single token, a demo.
    for T, V, H in [(16384, 151936, 2560), (131072, 262144, 8192), (1, 151936, 4096), (2000, 300, 96)]:
        for buffer_bytes in (1 << 22, 1 << 28):
            rows, columns = tile_shape(T, V, H, element_bytes=4, buffer_bytes=buffer_bytes)
            used = 4 * (3 * rows * columns + 2 * columns * H + 2 * rows * H)
            assert 1 <= rows <= T
            assert 1 <= columns <= V
            assert used <= buffer_bytes
    assert tile_shape(2000, 300, 96, element_bytes=4, buffer_bytes=1 << 28) == (2000, 300)


def test_vector_worked_by_hand(device):
    # softmax(2, 1, 0, -1), with its entropy, collision sums and entropy gradient -p (log p + H).
    logit_V = torch.tensor([2.0, 1.0, 0.0, -1.0], device=device)
    hidden_TH = torch.ones(4, 1, device=device, requires_grad=True)
    weight_VH = logit_V[:, None].clone().requires_grad_()
    stats = linear_logprob_entropy(hidden_TH, weight_VH, torch.arange(4, device=device), collision=True)
    p_V = torch.tensor([0.6439142599, 0.2368828181, 0.0871443187, 0.0320586033], device=device)
    close = {"rtol": 0, "atol": 2e-7}
    torch.testing.assert_close(stats.logprob_T.exp(), p_V, **close)
    torch.testing.assert_close(stats.entropy_T, torch.full((4,), 0.9475369640, device=device), **close)
    torch.testing.assert_close(stats.p2_T, torch.full((4,), 0.4793609299, device=device), **close)
    torch.testing.assert_close(stats.p2logp_T, torch.full((4,), -0.2853947395, device=device), **close)
    (gradient_VH,) = torch.autograd.grad(stats.entropy_T[:1].sum(), [weight_VH])
    discriminator_V = torch.tensor([0.3266881389, -0.1167009681, -0.1300762057, -0.0799109651], device=device)
    torch.testing.assert_close(gradient_VH[:, 0], -discriminator_V, **close)


def test_entropy_gradient_by_finite_differences(make_head):
    head = make_head(6, 17, 5, dtype=torch.float64, bias=True, softcap=4.0, row_temperature=True)
    stats, leaves = head.run(linear_logprob_entropy)
    gradients = torch.autograd.grad(stats.entropy_T.sum(), list(leaves.values()))
    step = 1e-6
    for (name, leaf), gradient in zip(leaves.items(), gradients, strict=True):
        direction = torch.randn_like(leaf)
        sides = []
        for sign in (1, -1):
            moved = {**leaves, name: leaf + sign * step * direction}
            with torch.no_grad():
                sides.append(
                    float(linear_logprob_entropy(**moved, target_T=head.target_T, **head.options).entropy_T.sum())
                )
        assert (sides[0] - sides[1]) / (2 * step) == pytest.approx(
            float((gradient * direction).sum()), rel=1e-7, abs=1e-9
        )


@pytest.mark.parametrize(
    "options", [{}, {"bias": True, "softcap": 3.0, "row_temperature": True, "ignored": 2}], ids=str
)
def test_gradcheck(make_head, options):
    head = make_head(5, 11, 4, dtype=torch.float64, **options)
    leaves = [leaf.requires_grad_() for leaf in (head.hidden_TH, head.weight_VH, head.bias_V) if leaf is not None]

    def outputs(hidden_TH, weight_VH, bias_V=None):
        # A budget of a few columns, so that the gradients of several tiles meet.
        stats = linear_logprob_entropy(
            hidden_TH, weight_VH, head.target_T, bias_V=bias_V, buffer_bytes=600, **head.options
        )
        return stats.logprob_T, stats.entropy_T, stats.lse_T

    assert torch.autograd.gradcheck(outputs, leaves)


def test_rows_without_upstream_gradient_are_not_computed(make_head, count_products):
    head = make_head(64, 40, 8)
    if not TRITON:
        counts = {}
        for rows in (64, 16):
            stats, leaves = head.run(linear_logprob_entropy)
            with count_products() as products:
                torch.autograd.grad(stats.logprob_T[:rows].sum(), list(leaves.values()))
            counts[rows] = products.count
        assert counts == {64: 3 * 64 * 40 * 8, 16: 3 * 16 * 40 * 8}
    stats, leaves = head.run(linear_logprob_entropy)
    (gradient,) = torch.autograd.grad(stats.logprob_T[:16].sum(), [leaves["hidden_TH"]])
    exact, exact_leaves = head.run(linear_logprob_entropy_reference, torch.float64)
    (exact_gradient,) = torch.autograd.grad(exact.logprob_T[:16].sum(), [exact_leaves["hidden_TH"]])
    torch.testing.assert_close(gradient.double(), exact_gradient, rtol=0, atol=1e-5)
    assert float(gradient[16:].abs().max()) == 0.0


@pytest.mark.parametrize("frozen", ["weight_VH", "hidden_TH"])
def test_only_needed_gradients_are_computed(make_head, count_products, frozen):
    head = make_head(33, 40, 8)
    _, leaves = head.run(linear_logprob_entropy)
    leaves[frozen].requires_grad_(False)
    (wanted,) = (leaf for name, leaf in leaves.items() if name != frozen)
    stats = linear_logprob_entropy(**leaves, target_T=head.target_T)
    with count_products() as products:
        stats.entropy_T.sum().backward()
    assert leaves[frozen].grad is None
    # One gradient, one product. The recomputed logits are another on the torch path; Triton's own are not counted.
    assert products.count == (1 if TRITON else 2) * 33 * 40 * 8
    exact, exact_leaves = head.run(linear_logprob_entropy_reference, torch.float64)
    exact.entropy_T.sum().backward()
    (name,) = (name for name in leaves if name != frozen)
    torch.testing.assert_close(wanted.grad.double(), exact_leaves[name].grad, rtol=0, atol=1e-5)


def test_which_fields_require_a_gradient(make_head):
    head = make_head(4, 9, 3)
    with torch.no_grad():
        stats = linear_logprob_entropy(head.hidden_TH.requires_grad_(), head.weight_VH, head.target_T, collision=True)
    assert not any(field.requires_grad for field in stats.as_dict().values())
    stats, _ = head.run(linear_logprob_entropy, collision=True, varentropy=True, argmax=True)
    assert [field.requires_grad for field in stats.as_dict().values()] == [True] * 3 + [False] * 5
    stats, _ = head.run(linear_logprob_entropy, entropy_gradient=False)
    assert [field.requires_grad for field in stats.as_dict().values()] == [True, False, True]


def test_second_derivative_is_refused(make_head):
    stats, leaves = make_head(4, 9, 3).run(linear_logprob_entropy)
    (first,) = torch.autograd.grad(stats.entropy_T.sum(), [leaves["hidden_TH"]], create_graph=True)
    with pytest.raises(RuntimeError, match=r"linear_logprob_entropy has no second derivative.*_reference"):
        torch.autograd.grad(first.square().sum(), [leaves["hidden_TH"]])


def test_autocast_does_not_round(make_head, check_head):
    head = make_head(37, 131, 24)
    with torch.autocast(head.hidden_TH.device.type, dtype=torch.bfloat16):
        inside, leaves = head.run(linear_logprob_entropy)
        inside.logprob_T.sum().backward()
    outside, outside_leaves = head.run(linear_logprob_entropy)
    outside.logprob_T.sum().backward()
    torch.testing.assert_close(inside.logprob_T, outside.logprob_T, rtol=0, atol=0)
    torch.testing.assert_close(leaves["weight_VH"].grad, outside_leaves["weight_VH"].grad, rtol=0, atol=0)


# Peaked like a language model's rows: entropy of a few tenths, top logit about 20. Means over 32 rows of 20k columns.
def test_error_against_fp64_is_that_of_fp32(device):
    T, V, H = 32, 20_000, 128
    weight_VH = (torch.randn(V, H, device=device) / H**0.5).bfloat16()
    target_T = torch.randint(0, V, (T,), device=device)
    hidden_TH = (18 * weight_VH[target_T].float() + 2 * torch.randn(T, H, device=device)).bfloat16()
    stats = linear_logprob_entropy(hidden_TH, weight_VH, target_T, collision=True)
    exact = linear_logprob_entropy_reference(hidden_TH.double(), weight_VH.double(), target_T, collision=True)
    for name, mean in (("logprob_T", 1e-6), ("entropy_T", 1e-6), ("p2_T", 1e-6), ("p2logp_T", 1e-6)):
        assert float((getattr(stats, name).double() - getattr(exact, name)).abs().mean()) <= mean, name


@hypothesis.settings(max_examples=12 if TRITON else 30)  # the interpreter is slow
@hypothesis.given(
    T=st.integers(0, 30),
    V=st.integers(1, 150),
    H=st.integers(1, 40),
    seed=st.integers(0, 2**31),
    temperature=st.one_of(st.floats(0.05, 20.0), st.just("rows")),
    softcap=st.one_of(st.none(), st.floats(0.5, 50.0)),
    bias=st.booleans(),
    buffer_bytes=st.sampled_from([6_000, 1 << 28]),
)
def test_any_shape_and_option(device, T, V, H, seed, temperature, softcap, bias, buffer_bytes):
    torch.manual_seed(seed)
    operands = [torch.randn(T, H) * 3, torch.randn(V, H)] + [torch.randn(V)] * bias
    operands = [operand.to(device).requires_grad_() for operand in operands]
    target_T = torch.randint(-1, V, (T,), device=device)
    options = {"softcap": softcap, "ignore_index": -1, "collision": True}
    options["temperature"] = (torch.rand(T) + 0.1).to(device) if temperature == "rows" else temperature
    upstream = torch.randn(3, T, device=device)
    results, names = [], []
    for op, dtype in (
        (linear_logprob_entropy, torch.float32),
        *((linear_logprob_entropy_reference, d) for d in (torch.float32, torch.float64)),
    ):
        cast = [operand.to(dtype) for operand in operands]
        more = {"buffer_bytes": buffer_bytes} if op is linear_logprob_entropy else {}
        stats = op(cast[0], cast[1], target_T, bias_V=cast[2] if bias else None, **options, **more)
        total = (upstream * torch.stack([stats.logprob_T, stats.entropy_T, stats.lse_T])).sum()
        results.append([*stats.as_dict().values(), *torch.autograd.grad(total, cast)])
        names = [*stats.as_dict(), "hidden", "weight", "bias"]
    logits = float((operands[0] @ operands[1].T).detach().abs().max()) if T else 0.0
    scale = logits / float(torch.as_tensor(options["temperature"]).min()) if T else 0.0
    for name, actual, in_torch, exact in zip(names, *results, strict=False):
        # Logits of size z are known to z * 2^-24 in fp32, and so is everything that follows from them.
        floor = 2e-6 + 1e-6 * scale * max(
            1.0, float(exact.detach().abs().max()) if exact.numel() and name in ("hidden", "weight", "bias") else 1.0
        )
        assert_no_worse_than_torch(actual, in_torch, exact, floor=floor, name=name)
    logprob_T, entropy_T = (value.detach() for value in results[0][:2])
    assert not T or float(logprob_T.max()) < 1e-6
    assert not T or (float(entropy_T.min()) >= -1e-6 and float(entropy_T.max()) <= math.log(V) + 2e-6)
