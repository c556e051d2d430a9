"""Linear head -> log-probability and entropy per token; the logits [T, V] are never stored.

    z_TV = softcap(hidden_TH @ weight_VH^T + bias_V) / temperature_T      softcap(a) = cap * tanh(a / cap), or a
    logprob_t = z_t,y - logsumexp_v z_tv        entropy_t = -sum_v p_tv log p_tv,   p = softmax(z)

and with collision=True sum_v p^2 and sum_v p^2 log p, from which the first-order change of the entropy under a policy
gradient step follows (README.md). Five sums a row suffice and merge over any split of the vocabulary; the gradient
dz needs two coefficients a row and a recomputed z. Both are derived in `row_stats.py`.

Bytes. Naive, with bf16 logits: 2 T V for them, 4 T V for their fp32 copy, 4 T V each for log p, p and p log p, and as
much again for gradients; T = 16384, V = 151936: 4.6 GiB for one bf16 [T, V], more than 40 GiB in all. Here: hidden and
weight are read, O(T) numbers written (in Triton 12 to 20 bytes a row and 1,024 columns first). The backward makes dz in
a buffer of bounded size, one vocabulary split after the other: `hidden` gradient accumulates over the splits in fp32
(8 T H bytes of traffic a split), `weight` gradient is written once a split. Accumulators are fp32 from the product to
the statistics and never rounded to bf16: an fp32 head.

Where it loses. Forward and backward together are four matrix products of 2 T V H operations (logits twice, hidden and
weight gradient), against three when the logits are kept: where [T, V] fits comfortably, naive can be faster.
"""

from __future__ import annotations

import importlib.util
import os
from types import ModuleType

import torch
from torch import Tensor

from entrocraft.kernels import linear_logprob_torch
from entrocraft.kernels.arguments import (
    HeadOptions,
    check_bias,
    check_float_matrix,
    check_softcap,
    check_target,
    checked_inverse_temperature,
    compute_dtype,
    no_autocast,
    refuse_second_derivative,
)
from entrocraft.kernels.logits_logprob import logits_logprob_entropy_reference
from entrocraft.kernels.row_stats import finish, row_coefficients
from entrocraft.kernels.token_stats import TokenStats

# Transient buffers. Large enough for efficient matrix products at V = 152k, T = 16k and H = 4096 (tiles of about
# 4,500 x 4,500), small beside the weights of any model whose vocabulary makes this op worth having.
BUFFER_BYTES = 256 << 20


def linear_logprob_entropy_reference(
    hidden_TH: Tensor,
    weight_VH: Tensor,
    target_T: Tensor,
    *,
    bias_V: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    collision: bool = False,
) -> TokenStats:
    """The specification: the same statistics in plain differentiable torch that keeps every [T, V] tensor.

    Computes in fp32, or in fp64 when an operand is fp64. A row whose target is `ignore_index` holds 0.
    """
    dtype = compute_dtype(hidden_TH, weight_VH)
    logit_TV = hidden_TH.to(dtype) @ weight_VH.to(dtype).T
    if bias_V is not None:
        logit_TV = logit_TV + bias_V.to(dtype)
    return logits_logprob_entropy_reference(
        logit_TV,
        target_T,
        temperature=temperature,
        softcap=softcap,
        ignore_index=ignore_index,
        collision=collision,
    )


# Triton itself decides between compiler and interpreter when it is imported, for good; so does this.
HAS_TRITON = importlib.util.find_spec("triton") is not None
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def _backend(hidden_TH: Tensor, weight_VH: Tensor) -> ModuleType:
    """The module that computes: Triton on CUDA, or anywhere under its interpreter; without it, and for fp64, torch."""
    asked = HAS_TRITON and (hidden_TH.is_cuda or INTERPRETED)
    if asked and compute_dtype(hidden_TH, weight_VH) == torch.float32:
        from entrocraft.kernels import linear_logprob_triton

        return linear_logprob_triton
    return linear_logprob_torch


class _LinearLogprobEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_TH, weight_VH, bias_V, target_T, inv_temperature, options):
        ctx.set_materialize_grads(False)
        backend = _backend(hidden_TH, weight_VH)
        with torch.cuda.device_of(hidden_TH), no_autocast(hidden_TH.device):
            sums_KT = backend.forward(hidden_TH, weight_VH, bias_V, target_T, inv_temperature, options)
            values = finish(sums_KT)
        ctx.backend, ctx.options = backend, options
        temperature_T = inv_temperature if isinstance(inv_temperature, Tensor) else None
        ctx.inv_temperature = None if temperature_T is not None else inv_temperature
        # shift_T is a view, which would keep all sums of the rows alive.
        kept = values.shift_T.clone(), values.log_s0_T, values.entropy_T, temperature_T
        ctx.save_for_backward(hidden_TH, weight_VH, bias_V, target_T, *kept)
        if options.collision:
            ctx.mark_non_differentiable(values.p2_T, values.p2logp_T)
        return values.logprob_T, values.entropy_T, values.lse_T, values.p2_T, values.p2logp_T

    @staticmethod
    def backward(ctx, *grads):
        grad_logprob_T, grad_entropy_T, grad_lse_T, *_ = grads
        hidden_TH, weight_VH, bias_V, target_T, *kept = ctx.saved_tensors
        shift_T, log_s0_T, entropy_T, temperature_T = kept
        inv_temperature = ctx.inv_temperature if temperature_T is None else temperature_T
        with torch.no_grad(), torch.cuda.device_of(hidden_TH), no_autocast(hidden_TH.device):
            rows = row_coefficients(
                grad_logprob_T,
                grad_entropy_T,
                grad_lse_T,
                shift_T=shift_T,
                log_s0_T=log_s0_T,
                entropy_T=entropy_T,
                inv_temperature=inv_temperature,
                valid_T=target_T != ctx.options.ignore_index,
            )
            grads = ctx.backend.backward(
                hidden_TH,
                weight_VH,
                bias_V,
                target_T,
                inv_temperature,
                ctx.options,
                rows,
                needs=ctx.needs_input_grad[:3],
            )
        operands = [hidden_TH, weight_VH, bias_V]
        return *refuse_second_derivative("linear_logprob_entropy", operands, grads), None, None, None


def linear_logprob_entropy(
    hidden_TH: Tensor,
    weight_VH: Tensor,
    target_T: Tensor,
    *,
    bias_V: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    collision: bool = False,
    validate: bool = False,
    buffer_bytes: int = BUFFER_BYTES,
) -> TokenStats:
    """Per-token log-probability and entropy of a linear head, in bounded memory: the equation at the top of the file.

    Args:
        hidden_TH: [T, H], bf16, fp16, fp32 or fp64, of any strides; T may be 0.
        weight_VH: [V, H], dtype of its own, V >= 1 and of any size.
        target_T: int64 [T], token ids in [0, V), or `ignore_index`.
        bias_V: [V], floating point, of any stride, or None. An entry of -inf takes the token out of the vocabulary
            (p = 0, no gradient), unless a softcap follows, which makes it -cap.
        temperature: a positive float, or a positive tensor [T]. It gets no gradient.
        softcap: cap of cap * tanh(a / cap) on the logits before temperature, or None.
        ignore_index: rows with this target give 0 in every field and no gradient, and are not computed.
        collision: also give p2_T and p2logp_T.
        validate: on a GPU, check target ids (and temperatures) by a device-side assertion; nothing waits for it. On a
            CPU both are always checked. Without it, an id outside the vocabulary gives a NaN log-probability.
        buffer_bytes: bound on the transient buffers, in bytes; see below.

    Returns:
        TokenStats, in nats, fp32 (fp64 when an operand is fp64). logprob_T, entropy_T and lse_T are differentiable,
        once, with respect to hidden_TH, weight_VH and bias_V, whose gradients come in their own dtypes; only those that
        are required are computed, and a row whose upstream gradient is zero costs nothing but its share of the
        products on a GPU. p2_T and p2logp_T have no gradient. A NaN or an overflow in a row makes that row NaN.

    Transient memory beyond inputs, outputs and gradients: `buffer_bytes` (but at least what one row and a few
    vocabulary columns need; in Triton 16 KiB of dz for bf16, 32 KiB for fp32, and 1,280 H bytes), and O(T). In the
    backward 4 T H bytes for a hidden gradient that is not fp32 itself, and on a CPU a copy of the rows that are
    computed when not all are. In Triton the forward adds its partial sums, 12 T ceil(V / 1024) bytes (20 with
    collision). Under autocast the op works in the dtypes of its operands.

    Raises:
        ValueError: wrong shape, dtype or device; a target id outside the vocabulary; a temperature or
            softcap that is not positive.
        RuntimeError: differentiated twice.

    Source: arXiv 2604.26326, section 3 (the entropy of the batch as the controlled quantity).
    """
    check_float_matrix("hidden_TH", hidden_TH, "T, H")
    check_float_matrix("weight_VH", weight_VH, "V, H")
    V, H = weight_VH.shape
    if hidden_TH.shape[1] != H or V == 0 or weight_VH.device != hidden_TH.device:
        raise ValueError(
            f"weight_VH is {tuple(weight_VH.shape)} on {weight_VH.device}; expected at least one row of "
            f"{hidden_TH.shape[1]} on {hidden_TH.device}, as hidden_TH has"
        )
    if bias_V is not None:
        check_bias(bias_V, V=V, like=hidden_TH)
        bias_V = bias_V.contiguous()  # device code reads it with stride 1
    check_target(target_T, like=hidden_TH, V=V, ignore_index=ignore_index, validate=validate)
    check_softcap(softcap)
    if buffer_bytes <= 0:
        raise ValueError(f"buffer_bytes is {buffer_bytes}; expected a positive number of bytes, such as {BUFFER_BYTES}")
    dtype = compute_dtype(hidden_TH, weight_VH)
    inv_temperature = checked_inverse_temperature(temperature, like=hidden_TH, dtype=dtype, validate=validate)
    options = HeadOptions(softcap, ignore_index, collision, buffer_bytes)
    values = _LinearLogprobEntropy.apply(hidden_TH, weight_VH, bias_V, target_T, inv_temperature, options)
    return TokenStats(**dict(zip(TokenStats.__slots__, values, strict=True)))
