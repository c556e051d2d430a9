"""What the ops accept: the checks their public functions share, and the guards of their autograd functions."""

from __future__ import annotations

import contextlib
import math

import torch
from torch import Tensor


def compute_dtype(*operands: Tensor) -> torch.dtype:
    """fp64 when an operand is fp64, else fp32: products of bf16 or fp16 numbers are exact in it."""
    return torch.float64 if any(operand.dtype == torch.float64 for operand in operands) else torch.float32


def check_float_matrix(name: str, matrix: Tensor, shape: str) -> None:
    """A plain dense floating point matrix."""
    if matrix.dim() != 2 or not matrix.is_floating_point() or matrix.element_size() < 2:
        raise ValueError(
            f"{name} is {matrix.dtype} {tuple(matrix.shape)}; expected a bf16, fp16, fp32 or fp64 matrix [{shape}]"
        )
    if hasattr(matrix, "full_tensor"):
        raise ValueError(f"{name} is a DTensor; expected a plain tensor: pass {name}.full_tensor()")


def check_weight(weight_VH: Tensor, *, like: Tensor, sharded: bool) -> None:
    """[V, H] on the device of hidden `like`, H >= 1, V >= 1 unless it is one shard of several."""
    check_float_matrix("weight_VH", weight_VH, "V, H")
    V, H = weight_VH.shape
    if H == 0:
        raise ValueError(f"weight_VH is {tuple(weight_VH.shape)}; expected a hidden size H of at least 1")
    if like.shape[1] != H or (V == 0 and not sharded) or weight_VH.device != like.device:
        raise ValueError(
            f"weight_VH is {tuple(weight_VH.shape)} on {weight_VH.device}; expected at least one row of "
            f"{like.shape[1]} on {like.device}, as hidden_TH has"
        )


def check_bytes(name: str, value: int, *, least: int, such_as: int) -> None:
    """A number of bytes."""
    if value < least:
        raise ValueError(
            f"{name} is {value}; expected {'a positive' if least else 'a'} number of bytes, such as {such_as}"
        )


def check_main_grad(name: str, main_grad: Tensor | None, operand: Tensor, bias_V: Tensor | None = None) -> None:
    """None, or where the gradient of `operand` is to be added: its shape, its device, the dtype sums are kept in."""
    if main_grad is None:
        return
    dtype = compute_dtype(operand)
    if main_grad.shape != operand.shape or main_grad.dtype != dtype or main_grad.device != operand.device:
        raise ValueError(
            f"{name}_main_grad is {main_grad.dtype} {tuple(main_grad.shape)} on {main_grad.device}; expected {dtype} "
            f"{tuple(operand.shape)} on {operand.device}, as the gradient of {name} in full precision"
        )
    if main_grad.requires_grad:
        raise ValueError(f"{name}_main_grad requires a gradient; expected a plain buffer: pass it detached")
    if bias_V is not None and bias_V.requires_grad:
        raise ValueError("weight_main_grad_VH with a bias_V that requires a gradient; freeze the bias, or leave it out")
    if torch.compiler.is_compiling():
        raise ValueError(f"{name}_main_grad under torch.compile, which has no place for it; leave it out there")


def check_vocabulary(name: str, matrix: Tensor) -> None:
    """At least one token."""
    if matrix.shape[1] == 0:
        raise ValueError(
            f"{name} is {tuple(matrix.shape)}; expected a vocabulary of at least one token, [T, V] with V >= 1"
        )


def check_bias(bias_V: Tensor, *, V: int, like: Tensor) -> None:
    """A floating point vector [V] on the device of `like`."""
    if bias_V.shape != (V,) or bias_V.device != like.device or not bias_V.is_floating_point():
        raise ValueError(
            f"bias_V is {bias_V.dtype} {tuple(bias_V.shape)} on {bias_V.device}; expected floating point ({V},) on "
            f"{like.device}"
        )


def check_target(target_T: Tensor, *, like: Tensor, V: int | None, ignore_index: int | None, validate: bool) -> None:
    """int64 ids [T] in [0, V), or equal to ignore_index; on a GPU the ids only with validate. V None: of any size."""
    T = like.shape[0]
    if target_T.dtype != torch.int64 or target_T.shape != (T,) or target_T.device != like.device:
        raise ValueError(
            f"target_T is {target_T.dtype} {tuple(target_T.shape)} on {target_T.device}; expected int64 ({T},) on "
            f"{like.device}: one token id for each of the T rows"
        )
    if torch.compiler.is_compiling() or (target_T.device.type != "cpu" and not validate):
        return  # a graph has no place for a decision on values
    outside_T = target_T < 0
    if V is not None:
        outside_T |= target_T >= V
    if ignore_index is not None:
        outside_T &= target_T != ignore_index
    if target_T.device.type != "cpu":
        assert_on_device(~outside_T.any(), f"target_T has ids outside the vocabulary of {V}")
    elif outside_T.any():
        t = int(outside_T.nonzero()[0, 0])
        raise ValueError(
            f"target_T[{t}] is {int(target_T[t])}, outside the vocabulary [0, {V}); mark rows that have no target with "
            f"{'an ignore_index' if ignore_index is None else f'ignore_index={ignore_index}'}"
        )


def assert_on_device(condition: Tensor, message: str) -> None:
    """The device stops when the condition is False; the caller goes on without waiting for it."""
    torch._assert_async(condition, message)  # pyright: ignore[reportPrivateImportUsage]


def check_softcap(softcap: float | None) -> None:
    """None, or a positive finite cap."""
    if softcap is not None and not 0.0 < softcap < math.inf:
        raise ValueError(f"softcap is {softcap}; expected a positive finite number, or None for no cap")


def checked_inverse_temperature(
    temperature: float | Tensor, *, like: Tensor, dtype: torch.dtype, validate: bool
) -> float | Tensor:
    """1 / temperature: a float, or [T] in dtype."""
    if not isinstance(temperature, Tensor):
        if not 0.0 < temperature < math.inf:
            raise ValueError(f"temperature is {temperature}; expected a positive finite number")
        return 1.0 / temperature
    T = like.shape[0]
    if temperature.shape != (T,) or temperature.device != like.device or not temperature.is_floating_point():
        raise ValueError(
            f"temperature is {temperature.dtype} {tuple(temperature.shape)} on {temperature.device}; expected a float, "
            f"or floating point ({T},) on {like.device}"
        )
    if temperature.requires_grad:
        raise ValueError("temperature requires a gradient, which this op does not compute: pass temperature.detach()")
    if torch.compiler.is_compiling():
        return 1.0 / temperature.to(dtype)
    wrong_T = ~((temperature > 0) & (temperature < math.inf))
    if temperature.device.type == "cpu":
        if wrong_T.any():
            t = int(wrong_T.nonzero()[0, 0])
            raise ValueError(f"temperature[{t}] is {float(temperature[t])}; expected a positive finite number")
    elif validate:
        assert_on_device(~wrong_T.any(), "temperature has an element that is not positive and finite")
    return 1.0 / temperature.to(dtype)


def no_autocast(device: torch.device) -> contextlib.AbstractContextManager:
    """Autocast off: the ops choose their precision themselves, and a cast to bf16 would round the accumulators."""
    if torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return contextlib.nullcontext()


def second_derivative_message(name: str) -> str:
    """What to do about a second derivative that does not exist."""
    return (
        f"{name} has no second derivative: its backward is a fused computation. For a double backward (gradient "
        f"penalty, Hessian-vector product) use {name}_reference, or call backward without create_graph=True"
    )


class _SecondDerivative(torch.autograd.Function):
    """Identity on gradients, whose own backward explains that there is none."""

    @staticmethod
    def forward(ctx, name, anchor, *grads):
        ctx.name = name
        return tuple(grad.view_as(grad) for grad in grads)

    @staticmethod
    def backward(ctx, *_):
        raise RuntimeError(second_derivative_message(ctx.name))


def refuse_second_derivative(
    name: str, operands: list[Tensor | None], grads: list[Tensor | None]
) -> list[Tensor | None]:
    """The gradients; under create_graph=True, attached to the graph so that differentiating them is a clear error."""
    anchor = next((operand for operand in operands if operand is not None and operand.requires_grad), None)
    if not torch.is_grad_enabled() or anchor is None:
        return grads
    present = iter(_SecondDerivative.apply(name, anchor, *[grad for grad in grads if grad is not None]))
    return [None if grad is None else next(present) for grad in grads]
