"""What only the Triton path can get wrong: that it is taken at all, its row list, its 64-bit offsets, its determinism.

Without a GPU the interpreter stands in: one test starts it in a process of its own and runs there this file, every
test of the op, and the memory plan's of it. Values and gradients are in `test_linear_logprob.py` and
`_edges.py`, which hold for both paths.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from entrocraft.kernels import linear_logprob_entropy, linear_logprob_torch

TRITON = torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1"
needs_triton = pytest.mark.skipif(not TRITON, reason="no GPU: these run in the interpreter's process, started below")


@pytest.mark.skipif(TRITON, reason="this process runs them itself")
def test_all_tests_of_the_op_under_the_interpreter():
    files = [str(Path(__file__).with_name(f"test_linear_logprob{suffix}.py")) for suffix in ("", "_edges", "_triton")]
    files += [str(Path(__file__).with_name(name)) for name in ("test_modes.py", "test_linear_policy_loss.py")]
    files.append(str(Path(__file__).parents[1] / "train" / "test_plan_head.py"))
    result = subprocess.run(
        [sys.executable, "-P", "-m", "pytest", "-q", "-x", "-rs", *files],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == 0, result.stdout[-5000:] + result.stderr[-2000:]
    passed = re.search(r"(\d+) passed", result.stdout)
    assert passed, result.stdout[-2000:]
    assert int(passed[1]) >= 50
    assert "no GPU" not in result.stdout, "tests that need Triton were left out under the interpreter"


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="runs once, in the process outside")
def test_without_triton_the_torch_path_computes():
    # A process in which triton cannot be imported, asked to use it.
    script = """
import sys, torch
sys.modules["triton"] = None
from entrocraft.kernels import linear_logprob_entropy
weight_VH = torch.tensor([[2.0], [1.0], [0.0], [-1.0]], requires_grad=True)
stats = linear_logprob_entropy(torch.ones(1, 1), weight_VH, torch.tensor([0]))
stats.entropy_T.sum().backward()
print(float(stats.entropy_T), float(weight_VH.grad[0]))
"""
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    result = subprocess.run(
        [sys.executable, "-P", "-c", script], env=environment, capture_output=True, text=True, timeout=200, check=False
    )
    assert result.returncode == 0, result.stderr[-2000:]
    assert [float(number) for number in result.stdout.split()] == pytest.approx([0.9475370, -0.3266881], abs=1e-6)


@needs_triton
def test_the_kernels_are_launched(make_head, monkeypatch):
    from entrocraft.kernels import linear_logprob_triton

    launches: list[str] = []

    class Counted:
        def __init__(self, kernel, name):
            self.kernel, self.name = kernel, name

        def __getitem__(self, grid):
            launches.append(self.name)
            return self.kernel[grid]

    for name in ("stats_kernel", "merge_kernel", "dlogits_kernel", "stored_dlogits_kernel"):
        monkeypatch.setattr(linear_logprob_triton, name, Counted(getattr(linear_logprob_triton, name), name))
    # The torch path must have no part in it.
    monkeypatch.delattr(linear_logprob_torch, "statistics")
    monkeypatch.delattr(linear_logprob_torch, "gradients")
    head = make_head(9, 600, 5)
    # 600 columns through a buffer of 256: three vocabulary splits in the backward.
    for options, backward in (
        ({}, ["dlogits_kernel"] * 3),
        ({"mode": "cache", "cache_bytes": 1 << 20}, ["stored_dlogits_kernel"] * 3),
        # Room for the exponentials of some of the rows only.
        ({"mode": "cache", "cache_bytes": 5 * (2400 + 20)}, ["stored_dlogits_kernel", "dlogits_kernel"] * 3),
    ):
        launches.clear()
        stats, leaves = head.run(linear_logprob_entropy, buffer_bytes=4 * 9 * 128, **options)
        torch.autograd.grad(stats.entropy_T.sum(), list(leaves.values()))
        assert launches == ["stats_kernel", "merge_kernel", *backward]


def _dlogits_bytes(T, rows, columns, H, dtype, weight_dtype):
    """What the backward allocates for one split: the upper bound over the dtypes' cases, each tensor by name."""
    dz = dtype if dtype == weight_dtype else torch.float32
    slice_MH = 4 * columns * H  # grad_w_MH
    if dz != torch.float32:
        slice_MH += 4 * columns * H  # the product added to it
    if weight_dtype != dz:
        slice_MH += 4 * columns * H  # factor_MH
    per_row = max(4 if dz != torch.float32 else 0, dz.itemsize)  # the product added to grad_x_TH, or x_NH
    return dz.itemsize * rows * columns + slice_MH + per_row * rows * H


@pytest.mark.parametrize(
    ("dtype", "weight_dtype"),
    [
        (torch.bfloat16, torch.bfloat16),
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.bfloat16),
    ],
    ids=str,
)
def test_everything_the_backward_holds_is_inside_the_budget(dtype, weight_dtype):
    pytest.importorskip("triton")
    from entrocraft.kernels.linear_logprob_triton import LEAST_T, LEAST_V, buffer_shape

    element_bytes = (dtype if dtype == weight_dtype else torch.float32).itemsize
    for V, H in ((151936, 4096), (262144, 8192), (151936, 256), (300, 96)):
        for budget in (1 << 20, 1 << 28, 1 << 31):
            columns_of_T = set()
            for T in (1, 16, 1000, 16384, 131072):
                rows, columns = buffer_shape(T, V, H, element_bytes=element_bytes, buffer_bytes=budget)
                assert 1 <= rows <= T
                assert 1 <= columns <= V
                least = element_bytes * LEAST_T * LEAST_V + (8 * LEAST_V + 4 * LEAST_T) * H
                assert _dlogits_bytes(T, rows, columns, H, dtype, weight_dtype) <= max(budget, least), (T, V, H)
                columns_of_T.add(columns)
            assert len(columns_of_T) == 1, "the number of columns depends on T"
    # Not by being tiny either: most of the budget is used where there are rows enough.
    rows, columns = buffer_shape(16384, 151936, 4096, element_bytes=2, buffer_bytes=1 << 28)
    assert min(rows, columns) > 4000


@needs_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_several_blocks_and_splits_as_one(make_head, dtype):
    # The least budget: two row blocks and two splits, after the rows without a gradient are packed away.
    head = make_head(300, 400, 20, dtype=dtype, bias=True)
    upstream = torch.randn(300, device=head.target_T.device)
    upstream[:70] = 0.0
    results = []
    for buffer_bytes in (1, 1 << 28):
        stats, leaves = head.run(linear_logprob_entropy, buffer_bytes=buffer_bytes)
        results.append(torch.autograd.grad([stats.logprob_T, stats.entropy_T], list(leaves.values()), [upstream] * 2))
    for split, whole in zip(*results, strict=True):
        size = float(whole.abs().max())
        torch.testing.assert_close(split, whole, rtol=0, atol=size * (1e-6 if dtype == torch.float32 else 1e-3))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two GPUs")
def test_a_gpu_that_is_not_the_current_one(make_head):
    head = make_head(9, 300, 5)
    first, _ = head.run(linear_logprob_entropy)
    head.hidden_TH, head.weight_VH, head.target_T = (
        operand.to("cuda:1") for operand in (head.hidden_TH, head.weight_VH, head.target_T)
    )
    stats, leaves = head.run(linear_logprob_entropy)
    torch.testing.assert_close(stats.entropy_T.cpu(), first.entropy_T.cpu(), rtol=0, atol=1e-6)
    assert all(gradient.isfinite().all() for gradient in torch.autograd.grad(stats.entropy_T.sum(), [*leaves.values()]))


@needs_triton
def test_both_paths_agree(make_head):
    head = make_head(70, 1100, 33, bias=True, softcap=15.0, row_temperature=True, collision=True, ignored=11)
    stats, leaves = head.run(linear_logprob_entropy)
    gradients = torch.autograd.grad(stats.logprob_T.sum() + stats.entropy_T.sum(), list(leaves.values()))
    # fp64 operands always take the torch path.
    other, others = head.run(linear_logprob_entropy, torch.float64)
    expected = torch.autograd.grad(other.logprob_T.sum() + other.entropy_T.sum(), list(others.values()))
    for name, field in stats.as_dict().items():
        torch.testing.assert_close(field.double(), getattr(other, name), rtol=0, atol=1e-5)
    for actual, wanted in zip(gradients, expected, strict=True):
        torch.testing.assert_close(actual.double(), wanted, rtol=0, atol=1e-5 * float(wanted.abs().max()))


@needs_triton
def test_a_row_does_not_depend_on_its_batch(make_head):
    # 130 rows are three row blocks; the subset lands in other blocks, at other places, beside ignored rows.
    head = make_head(130, 1100, 40, collision=True)
    stats, leaves = head.run(linear_logprob_entropy)
    (gradient,) = torch.autograd.grad(stats.entropy_T.sum(), [leaves["hidden_TH"]])
    picked = torch.randperm(130, device=head.target_T.device)[:37]
    head.hidden_TH, head.target_T = head.hidden_TH[picked], head.target_T[picked].clone()
    head.target_T[5] = -100
    alone, alone_leaves = head.run(linear_logprob_entropy)
    (alone_gradient,) = torch.autograd.grad(alone.entropy_T.sum(), [alone_leaves["hidden_TH"]])
    rows = torch.arange(37, device=picked.device) != 5
    for name, field in alone.as_dict().items():
        assert torch.equal(field[rows], getattr(stats, name)[picked][rows]), name
    # The product that follows dz is the library's, which may choose another order for another number of rows.
    torch.testing.assert_close(alone_gradient[rows], gradient[picked][rows], rtol=0, atol=1e-5)


@needs_triton
def test_target_outside_the_vocabulary_is_nan(make_head):
    from entrocraft.kernels.head import Head
    from entrocraft.kernels.linear_logprob_triton import statistics
    from entrocraft.kernels.row_stats import finish

    made = make_head(6, 11, 4)
    head = Head(made.hidden_TH, made.weight_VH, None, made.target_T, 1.0)
    inside = finish(statistics(head))
    assert inside.logprob_T.isfinite().all()
    for wrong in (11, -1, 2**40):
        head.target_T[2] = wrong
        values = finish(statistics(head))
        assert values.logprob_T.isnan().tolist() == [False, False, True, False, False, False]
        torch.testing.assert_close(values.entropy_T, inside.entropy_T, rtol=0, atol=0)


@needs_triton
@pytest.mark.parametrize("mode", ["recompute", "cache"])
def test_descriptors_and_pointers_give_the_same_bits(make_head, monkeypatch, mode):
    # Hidden of 40 fp16 columns has the pitch a tensor descriptor needs. 300 rows and columns: ragged tiles both ways.
    from entrocraft.kernels import linear_logprob_launch

    head = make_head(300, 300, 40, dtype=torch.float16, collision=True, row_temperature=True)
    calls = []
    of = linear_logprob_launch.TensorDescriptor.from_tensor
    monkeypatch.setattr(
        linear_logprob_launch.TensorDescriptor, "from_tensor", lambda *args: calls.append(args) or of(*args)
    )
    results = []
    for described in (True, False):
        if not described:
            monkeypatch.setattr(linear_logprob_launch, "describable", lambda matrix: False)
        stats, leaves = head.run(linear_logprob_entropy, mode=mode, cache_bytes=1 << 17)
        gradients = torch.autograd.grad(stats.logprob_T.sum() + stats.entropy_T.sum(), list(leaves.values()))
        assert bool(calls) == described
        calls.clear()
        results.append([*stats.detach().as_dict().values(), *gradients])
    for left, right in zip(*results, strict=True):
        assert torch.equal(left, right)


@needs_triton
def test_offsets_past_two_to_the_31(tmp_path, device):
    # Three rows 2^30 elements apart: in 32 bits the third would be read before the first. On a CPU the storage is a
    # sparse file, of which a few pages exist.
    stride, H = 2**30, 6
    if device == "cpu":
        storage = torch.from_file(str(tmp_path / "sparse"), shared=True, size=2 * stride + H, dtype=torch.float16)
    else:
        storage = torch.zeros(2 * stride + H, dtype=torch.float16, device=device)
    far_TH = storage.as_strided((3, H), (stride, 1))
    far_TH.copy_(torch.randn(3, H))
    weight_VH = torch.randn(9, H, dtype=torch.float16, device=device)
    target_T = torch.tensor([1, 2, 8], device=device)
    far = linear_logprob_entropy(far_TH, weight_VH, target_T)
    near = linear_logprob_entropy(far_TH.contiguous(), weight_VH, target_T)
    assert torch.equal(far.logprob_T, near.logprob_T)
    assert len(set(near.entropy_T.tolist())) == 3
    weight = linear_logprob_entropy(weight_VH[:3].contiguous(), far_TH, torch.tensor([0, 1, 2], device=device))
    packed = linear_logprob_entropy(
        weight_VH[:3].contiguous(), far_TH.contiguous(), torch.tensor([0, 1, 2], device=device)
    )
    assert torch.equal(weight.logprob_T, packed.logprob_T)


@needs_triton
def test_small_fp16_gradients_do_not_underflow(make_head):
    # Upstream gradients of 1e-3 (a mean over a thousand tokens) times p = 2e-3: fp16 knows 2e-6 to 3 %. Large hidden
    # rows lift the weight gradient itself out of that range; the target's own row, which is larger, is left out.
    head = make_head(20, 500, 16, dtype=torch.float16)
    head.hidden_TH, head.weight_VH = head.hidden_TH * 32, head.weight_VH / 128
    head.target_T = torch.zeros_like(head.target_T)
    gradients = []
    for dtype in (torch.float16, torch.float64):
        stats, leaves = head.run(linear_logprob_entropy, dtype)
        upstream = torch.full_like(stats.logprob_T, 1e-3)
        (gradient,) = torch.autograd.grad(stats.logprob_T, [leaves["weight_VH"]], upstream)
        gradients.append(gradient[1:].double())
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-3 * float(gradients[1].abs().max()))
