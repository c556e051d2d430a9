"""The memory plan's head buffer against what the head really allocates, on the path of this process.

On a CPU that is the torch path; `tests/kernels/test_linear_logprob_triton.py` runs this file under Triton's interpreter
too, which allocates what a GPU does.
"""

import os
from typing import ClassVar

import pytest
import torch

from entrocraft.kernels import linear_logprob_entropy, linear_logprob_op
from entrocraft.train.plan_phases import head_buffer
from entrocraft.train.plan_trace import Allocations

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
T, V = 300, 700


class Inside(Allocations):
    """Allocations, of the head's two operators too, into which a mode does not see by itself."""

    opaque: ClassVar = {
        torch.ops.entrocraft.linear_logprob.default: linear_logprob_op.forward,
        torch.ops.entrocraft.linear_logprob_backward.default: linear_logprob_op.backward,
    }

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func not in self.opaque:
            return super().__torch_dispatch__(func, types, args, kwargs)
        with self:
            return self.opaque[func](*args)


def allocated(H, dtype, bound, learning):
    """Peak bytes of a forward and of a backward pass; of the latter without the gradients that it leaves behind."""
    hidden_TH = torch.randn(T, H).to(DEVICE, dtype).requires_grad_()
    weight_VH = (torch.randn(V, H) / H**0.5).to(DEVICE, dtype).requires_grad_()
    target_T, upstream_T = torch.randint(0, V, (T,)).to(DEVICE), torch.randn(T).to(DEVICE)
    upstream_T[learning:] = 0.0
    with Inside() as forward:
        stats = linear_logprob_entropy(hidden_TH, weight_VH, target_T, buffer_bytes=bound)
    with Inside() as backward:
        torch.autograd.backward([stats.logprob_T, stats.entropy_T], [upstream_T, upstream_T])
    return forward.peak, backward.peak - dtype.itemsize * V * H - 4 * T * H


# A buffer that holds all, and one that holds a part of the rows and columns; H as small and as large as tiles go.
@pytest.mark.parametrize(("H", "bound"), [(16, 1 << 28), (16, 1 << 18), (64, 1 << 19)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_head_stays_inside_what_is_planned(H, bound, dtype):
    if INTERPRETED and dtype != torch.float32:
        pytest.skip("the interpreter's products convert 16-bit operands, which a GPU's do not")
    planned = head_buffer(T, V, H, bound)
    forward, backward = allocated(H, dtype, bound, T)
    row_values = 40 * 4 * T  # a few numbers a row, which no plan counts
    assert forward < planned + row_values
    # Not much less either: tiles have whole sides, and a large buffer for a small head is bounded generously.
    assert planned / 4 < backward < planned + row_values
    # One token that has no gradient, and the rest are packed: their rows, and gradients of their own in fp32.
    packed = allocated(H, dtype, bound, T - 1)[1]
    assert packed - backward == pytest.approx((dtype.itemsize + 4) * T * H, abs=row_values)
