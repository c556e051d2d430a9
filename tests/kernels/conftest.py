"""Heads to test with, and the comparison every test of the ops makes: values and gradients against fp64."""

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from entrocraft.kernels import (
    TokenStats,
    linear_logprob_entropy,
    linear_logprob_entropy_reference,
    linear_logprob_op,
    logits_logprob_entropy_reference,
)
from entrocraft.kernels.testing import assert_no_worse_than_torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
# A logit of size 20 is known to 1e-6 in fp32. So is what follows from it in nats, and, relative to the largest element,
# a gradient.
FP32_FLOOR = 2e-6


@dataclass
class Head:
    """Operands and options of one call."""

    hidden_TH: Tensor
    weight_VH: Tensor
    target_T: Tensor
    bias_V: Tensor | None = None
    options: dict[str, Any] = field(default_factory=dict)

    def run(self, op: Callable[..., TokenStats], dtype: torch.dtype | None = None, **more: Any):
        """Statistics, and the leaves they depend on by name."""
        leaves = {"hidden_TH": self.hidden_TH, "weight_VH": self.weight_VH, "bias_V": self.bias_V}
        leaves = {
            name: leaf.detach().to(dtype or leaf.dtype).requires_grad_()
            for name, leaf in leaves.items()
            if leaf is not None
        }
        return op(**leaves, target_T=self.target_T, **self.options, **more), leaves


@pytest.fixture(scope="session")
def device() -> str:
    """Where the ops are tested: a GPU if there is one."""
    return DEVICE


@pytest.fixture
def make_head() -> Callable[..., Head]:
    """A head with logits of the given spread, with or without bias, per-token temperature, ignored rows."""

    def make(
        T: int,
        V: int,
        H: int,
        *,
        dtype: torch.dtype = torch.float32,
        weight_dtype: torch.dtype | None = None,
        spread: float = 3.0,
        bias: bool = False,
        ignored: int = 0,
        row_temperature: bool = False,
        **options: Any,
    ) -> Head:
        hidden_TH = (torch.randn(T, H) * spread).to(DEVICE, dtype)
        weight_VH = (torch.randn(V, H) / H**0.5).to(DEVICE, weight_dtype or dtype)
        target_T = torch.randint(0, V, (T,))
        target_T[torch.randperm(T)[:ignored]] = options.get("ignore_index", -100)
        bias_V = torch.randn(V).to(DEVICE, weight_dtype or dtype) if bias else None
        if row_temperature:
            options["temperature"] = (torch.rand(T) + 0.5).to(DEVICE)
        return Head(hidden_TH, weight_VH, target_T.to(DEVICE), bias_V, options)

    return make


@pytest.fixture
def check_head() -> Callable[..., TokenStats]:
    """Compare the op with the reference: every value, and the gradients of a random function of `wanted`."""

    def check(
        head: Head,
        *,
        wanted: tuple[str, ...] = ("logprob_T", "entropy_T", "lse_T"),
        floor: float = FP32_FLOOR,
        grad_floor: float = FP32_FLOOR,
        op: Callable[..., TokenStats] = linear_logprob_entropy,
        **only_op: Any,
    ) -> TokenStats:
        upstream = {name: torch.randn(head.target_T.shape[0]).to(DEVICE) for name in wanted}
        runs = [
            head.run(op, **only_op),
            head.run(linear_logprob_entropy_reference),
            head.run(linear_logprob_entropy_reference, torch.float64),
        ]
        names = list(runs[2][0].as_dict())
        assert list(runs[0][0].as_dict()) == names, "fields that were asked for"
        for name in names:
            values = [getattr(stats, name) for stats, _ in runs]
            if values[2].dtype in (torch.int64, torch.bool):
                # Where two logits are within rounding of each other, either may be the larger.
                assert float((values[0] == values[2]).double().mean()) >= 0.9 or len(values[0]) < 10, name
            else:
                size = float(values[2].detach().abs().nan_to_num(posinf=0.0).max()) if len(head.target_T) else 0.0
                assert_no_worse_than_torch(*values, floor=floor * max(1.0, size / 20), name=name)
        gradients = []
        if DEVICE == "cuda" or INTERPRETED:
            # Triton hands dz to the products in the operands' dtype. So does torch, but not the reference.
            runs[1] = head.run(_in_operand_dtype)
        for stats, leaves in runs:
            total = torch.stack([getattr(stats, name) * upstream[name] for name in wanted]).sum()
            gradients.append(dict(zip(leaves, torch.autograd.grad(total, list(leaves.values())), strict=True)))
        for name, actual in gradients[0].items():
            assert actual.dtype == getattr(head, name).dtype
            triple = [gradient[name] for gradient in gradients]
            largest = max(1.0, float(triple[2].abs().nan_to_num().max())) if actual.numel() else 1.0
            assert_no_worse_than_torch(*triple, floor=grad_floor * largest, name=f"gradient of {name}")
        return runs[0][0].detach()

    return check


class _Products(TorchDispatchMode):
    """Counts the multiplications of every matrix product inside it, in-place ones too."""

    count = 0
    opaque: ClassVar = {  # a mode sees an operator of ours, but not what happens inside it
        torch.ops.entrocraft.linear_logprob.default: linear_logprob_op.forward,
        torch.ops.entrocraft.linear_logprob_backward.default: linear_logprob_op.backward,
    }

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in self.opaque:
            with self:
                return self.opaque[func](*args)
        left = {"mm": 0, "addmm": 1, "addmm_": 1}.get(func.overloadpacket.__name__)
        if left is not None:
            (rows, inner), columns = args[left].shape, args[left + 1].shape[1]
            self.count += rows * inner * columns
        return func(*args, **(kwargs or {}))


@pytest.fixture(scope="session")
def count_products() -> type[_Products]:
    """A context in which the multiplications of matrix products are counted; Triton's own products are not seen."""
    return _Products


def _in_operand_dtype(hidden_TH, weight_VH, target_T, *, bias_V=None, **options) -> TokenStats:
    """What a trainer without the op does: a linear layer in the operands' dtype, statistics in fp32."""
    if hidden_TH.dtype != weight_VH.dtype:
        return linear_logprob_entropy_reference(hidden_TH, weight_VH, target_T, bias_V=bias_V, **options)
    return logits_logprob_entropy_reference(
        torch.nn.functional.linear(hidden_TH, weight_VH, bias_V), target_T, **options
    )


def pytest_report_header() -> str:
    """Which of the two paths the tests of the ops take in this process."""
    return (
        f"kernels: {DEVICE}, {'Triton interpreter' if INTERPRETED else 'Triton' if DEVICE == 'cuda' else 'torch path'}"
    )
