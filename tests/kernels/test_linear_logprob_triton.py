"""What only the Triton path can get wrong: that it is taken at all, its row list, its 64-bit offsets, its determinism.

Without a GPU the interpreter stands in: one test starts it in a process of its own and runs there this file and every
test of the op. Values and gradients are in `test_linear_logprob.py` and
`_edges.py`, which hold for both paths.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from entrocraft.kernels import TokenStats, linear_logprob_entropy, linear_logprob_torch

TRITON = torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1"
needs_triton = pytest.mark.skipif(not TRITON, reason="no GPU: these run in the interpreter's process, started below")


@pytest.mark.skipif(TRITON, reason="this process runs them itself")
def test_all_tests_of_the_op_under_the_interpreter():
    files = [str(Path(__file__).with_name(f"test_linear_logprob{suffix}.py")) for suffix in ("", "_edges", "_triton")]
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

    for name in ("stats_kernel", "merge_kernel", "dlogits_kernel"):
        monkeypatch.setattr(linear_logprob_triton, name, Counted(getattr(linear_logprob_triton, name), name))
    # The torch path must have no part in it.
    monkeypatch.delattr(linear_logprob_torch, "forward")
    monkeypatch.delattr(linear_logprob_torch, "backward")
    stats, leaves = make_head(9, 300, 5).run(linear_logprob_entropy, buffer_bytes=4 * 9 * 128)
    torch.autograd.grad(stats.entropy_T.sum(), list(leaves.values()))
    # 300 columns through a buffer of 128: three vocabulary splits in the backward.
    assert launches == ["stats_kernel", "merge_kernel", *["dlogits_kernel"] * 3]


@needs_triton
def test_both_paths_agree(make_head):
    head = make_head(70, 1100, 33, bias=True, softcap=15.0, row_temperature=True, collision=True, ignored=11)
    stats, leaves = head.run(linear_logprob_entropy)
    gradients = torch.autograd.grad(stats.logprob_T.sum() + stats.entropy_T.sum(), list(leaves.values()))
    # fp64 operands always take the torch path.
    other, others = head.run(linear_logprob_entropy, torch.float64)
    expected = torch.autograd.grad(other.logprob_T.sum() + other.entropy_T.sum(), list(others.values()))
    for name in TokenStats.__slots__:
        torch.testing.assert_close(getattr(stats, name).double(), getattr(other, name), rtol=0, atol=1e-5)
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
    for name in TokenStats.__slots__:
        assert torch.equal(getattr(alone, name)[rows], getattr(stats, name)[picked][rows]), name
    # The product that follows dz is the library's, which may choose another order for another number of rows.
    torch.testing.assert_close(alone_gradient[rows], gradient[picked][rows], rtol=0, atol=1e-5)


@needs_triton
def test_target_outside_the_vocabulary_is_nan(make_head):
    from entrocraft.kernels import linear_logprob_triton
    from entrocraft.kernels.arguments import HeadOptions
    from entrocraft.kernels.row_stats import finish

    head = make_head(6, 11, 4)
    inside = finish(
        linear_logprob_triton.forward(
            head.hidden_TH, head.weight_VH, None, head.target_T, 1.0, HeadOptions(None, -100, False, 1)
        )
    )
    for wrong in (11, -1, 2**40):
        head.target_T[2] = wrong
        values = finish(
            linear_logprob_triton.forward(
                head.hidden_TH, head.weight_VH, None, head.target_T, 1.0, HeadOptions(None, -100, False, 1)
            )
        )
        assert values.logprob_T.isnan().tolist() == [False, False, True, False, False, False]
        torch.testing.assert_close(values.entropy_T, inside.entropy_T, rtol=0, atol=0)


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
