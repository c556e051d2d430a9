"""Log-probability and entropy per token for a caller who already holds the logits.

    z_TV = softcap(logit_TV) / temperature        softcap(a) = cap * tanh(a / cap), or a
    logprob_t = z_t,y - logsumexp_v z_tv          entropy_t = -sum_v p_tv log p_tv,   p = softmax(z)

Bytes: log_softmax followed by entropy keeps log p, p and p log p, 3 x 4 T V bytes in fp32, for the backward. This op
keeps three numbers a row, works in row blocks of bounded size and recomputes p; its gradient is the only [T, V] tensor
it makes. Where it loses: the exponentials are taken twice, and whoever can avoid the logits should: see
`linear_logprob.py`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from entrocraft.kernels.arguments import (
    check_float_matrix,
    check_softcap,
    check_target,
    check_vocabulary,
    checked_inverse_temperature,
    compute_dtype,
    no_autocast,
    refuse_second_derivative,
)
from entrocraft.kernels.head import HeadOptions
from entrocraft.kernels.row_stats import (
    RowCoefficients,
    RowValues,
    active_rows,
    as_token_stats,
    finish,
    neutral_sums,
    row_coefficients,
    tile_gradient,
    tile_sums,
)
from entrocraft.kernels.token_stats import TokenStats

# Elements of a row block: two fp32 buffers of 4 MiB stay in a CPU's cache, and are plenty for a GPU's row kernels.
BLOCK_ELEMENTS = 1 << 20


def logits_logprob_entropy_reference(
    logit_TV: Tensor,
    target_T: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    ignore_index: int | None = -100,
    collision: bool = False,
    varentropy: bool = False,
    argmax: bool = False,
) -> TokenStats:
    """The specification, in plain differentiable torch that keeps every [T, V] tensor. fp32, or fp64 for fp64 input."""
    z_TV = logit_TV.to(compute_dtype(logit_TV))
    if softcap is not None:
        z_TV = softcap * torch.tanh(z_TV / softcap)
    z_TV = z_TV / (temperature[:, None].to(z_TV) if isinstance(temperature, Tensor) else temperature)
    valid_T = torch.ones_like(target_T, dtype=torch.bool) if ignore_index is None else target_T != ignore_index
    logp_TV = torch.log_softmax(z_TV, dim=1)
    # p log p = 0 where p = 0. Both the factor and the product are masked, so that the gradient is 0 there too.
    finite_TV = torch.where(logp_TV == -torch.inf, 0.0, logp_TV)
    p_TV = torch.where(logp_TV == -torch.inf, 0.0, logp_TV.exp())
    logprob_T = logp_TV.gather(1, torch.where(valid_T, target_T, 0)[:, None])[:, 0]
    fields = {
        "logprob_T": logprob_T,
        "entropy_T": -(p_TV * finite_TV).sum(1),
        "lse_T": torch.logsumexp(z_TV, dim=1),
    }
    if collision:
        fields["p2_T"] = (p_TV * p_TV).sum(1).detach()
        fields["p2logp_T"] = (p_TV * p_TV * finite_TV).sum(1).detach()
    if varentropy:
        surprise_TV = finite_TV + fields["entropy_T"][:, None]
        fields["varentropy_T"] = (p_TV * surprise_TV * surprise_TV).sum(1).detach()
    fields = {name: torch.where(valid_T, field, 0.0) for name, field in fields.items()}
    if argmax:
        fields["argmax_T"] = torch.where(valid_T, z_TV.argmax(1), 0)
        fields["top1_T"] = (fields["argmax_T"] == target_T) & valid_T
    return TokenStats(**fields)


def scaled_logits(
    logit_TV: Tensor, inv_temperature: float | Tensor, softcap: float | None, *, slope: bool = False
) -> Tensor | None:
    """softcap and temperature, in place. With slope, returns 1 - tanh^2, the derivative of the softcap."""
    slope_TV = None
    if softcap is not None:
        tanh_TV = logit_TV.div_(softcap).tanh_()
        slope_TV = 1.0 - tanh_TV * tanh_TV if slope else None
        logit_TV.mul_(softcap)
    if isinstance(inv_temperature, Tensor):
        logit_TV.mul_(inv_temperature[:, None])
    elif inv_temperature != 1.0:
        logit_TV.mul_(inv_temperature)
    return slope_TV


def _forward(
    logit_TV: Tensor,
    target_T: Tensor,
    inv_temperature: float | Tensor,
    options: HeadOptions,
    ignore_index: int | None,
) -> Tensor:
    T, V = logit_TV.shape
    dtype = compute_dtype(logit_TV)
    sums_KT = neutral_sums(T, like=logit_TV, dtype=dtype)
    asked = {name: getattr(options, name) for name in ("collision", "varentropy", "argmax")}
    valid_T = torch.ones_like(target_T, dtype=torch.bool) if ignore_index is None else target_T != ignore_index
    for rows_N in valid_T.nonzero()[:, 0].split(max(1, BLOCK_ELEMENTS // V)):
        z_NV = logit_TV[rows_N].to(dtype)
        scaled_logits(z_NV, _rows_of(inv_temperature, rows_N), options.softcap)
        part_KN = tile_sums(z_NV, torch.empty_like(z_NV), target_T[rows_N], **asked)
        sums_KT.index_copy_(1, rows_N, part_KN)
    return sums_KT


def _backward(
    logit_TV: Tensor,
    target_T: Tensor,
    inv_temperature: float | Tensor,
    softcap: float | None,
    rows: RowCoefficients,
    index: Tensor | None,
) -> Tensor:
    dtype = compute_dtype(logit_TV)
    grad_TV = torch.zeros_like(logit_TV, memory_format=torch.contiguous_format)
    index = torch.arange(len(logit_TV), device=logit_TV.device) if index is None else index
    for rows_N in index.split(max(1, BLOCK_ELEMENTS // logit_TV.shape[1])):
        z_NV = logit_TV[rows_N].to(dtype)
        slope_NV = scaled_logits(z_NV, _rows_of(inv_temperature, rows_N), softcap, slope=True)
        dz_NV = tile_gradient(z_NV, torch.empty_like(z_NV), target_T[rows_N], rows.pick(rows_N))
        if slope_NV is not None:
            dz_NV.mul_(slope_NV)
        grad_TV.index_copy_(0, rows_N, dz_NV.to(grad_TV.dtype))
    return grad_TV


def _rows_of(inv_temperature: float | Tensor, rows_N: Tensor) -> float | Tensor:
    return inv_temperature[rows_N] if isinstance(inv_temperature, Tensor) else inv_temperature


class _LogitsLogprobEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logit_TV, target_T, inv_temperature, options, ignore_index):
        ctx.set_materialize_grads(False)
        with no_autocast(logit_TV.device):
            values = finish(_forward(logit_TV, target_T, inv_temperature, options, ignore_index))
        temperature_T = inv_temperature if isinstance(inv_temperature, Tensor) else None
        ctx.softcap, ctx.ignore_index = options.softcap, ignore_index
        ctx.inv_temperature = None if temperature_T is not None else inv_temperature
        kept = values.shift_T, values.log_s0_T, values.entropy_T, values.logprob_T, temperature_T
        ctx.save_for_backward(logit_TV, target_T, *kept)
        ctx.mark_non_differentiable(*values[3:])
        return values

    @staticmethod
    def backward(ctx, *grads):
        upstream = grads[:3]
        if all(grad is None for grad in upstream):
            return (None,) * 5
        logit_TV, target_T, shift_T, log_s0_T, entropy_T, logprob_T, temperature_T = ctx.saved_tensors
        inv_temperature = ctx.inv_temperature if temperature_T is None else temperature_T
        with torch.no_grad(), no_autocast(logit_TV.device):
            rows = row_coefficients(
                *upstream,
                shift_T=shift_T,
                log_s0_T=log_s0_T,
                entropy_T=entropy_T,
                logprob_T=logprob_T,
                inv_temperature=inv_temperature,
            )
            index = active_rows(None if ctx.ignore_index is None else target_T != ctx.ignore_index, *upstream)
            grad_TV = _backward(logit_TV, target_T, inv_temperature, ctx.softcap, rows, index)
        return *refuse_second_derivative("logits_logprob_entropy", [logit_TV], [grad_TV]), None, None, None, None


def logits_logprob_entropy(
    logit_TV: Tensor,
    target_T: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    ignore_index: int | None = -100,
    collision: bool = False,
    varentropy: bool = False,
    argmax: bool = False,
    validate: bool = False,
) -> TokenStats:
    """TokenStats of softmax(softcap(logit_TV) / temperature), the equation at the top of this file.

    `logit_TV` is bf16, fp16, fp32 or fp64 [T, V], of any strides; `target_T` int64 [T]. Statistics are in nats, fp32
    (fp64 for fp64 logits). logprob_T, entropy_T and lse_T are differentiable with respect to `logit_TV`, once; p2_T and
    p2logp_T (collision=True), varentropy_T (varentropy=True), argmax_T and top1_T (argmax=True) are not. `temperature`
    is a positive float or a positive tensor [T], and gets no gradient; `softcap` a positive cap or None. Rows whose
    target is `ignore_index` give 0 in every field and no gradient, and are not computed; None: there are none. Logits
    of -inf are tokens of probability 0; a NaN gives NaN. Target ids are checked on a CPU always, on a GPU by a
    device-side assertion when `validate` is set. On a GPU forward and backward each wait for the device once, to learn
    which rows have a target or a gradient. Transient memory: a few fp32 row blocks of about 4 MiB, or of one row where
    that is more.

    Raises ValueError for a wrong shape, dtype, id or temperature; RuntimeError when differentiated twice.
    Source: arXiv 2604.26326 (entropy as the controlled quantity); the formulas are derived in `row_stats.py`.
    """
    check_float_matrix("logit_TV", logit_TV, "T, V")
    check_vocabulary("logit_TV", logit_TV)
    check_target(target_T, like=logit_TV, V=logit_TV.shape[1], ignore_index=ignore_index, validate=validate)
    check_softcap(softcap)
    dtype = compute_dtype(logit_TV)
    inv_temperature = checked_inverse_temperature(temperature, like=logit_TV, dtype=dtype, validate=validate)
    options = HeadOptions(softcap, collision, varentropy, argmax)
    values = RowValues(*_LogitsLogprobEntropy.apply(logit_TV, target_T, inv_temperature, options, ignore_index))
    ignored_T = None if ignore_index is None else target_T == ignore_index
    asked = {"collision": collision, "varentropy": varentropy, "argmax": argmax}
    return as_token_stats(values, target_T, **asked, ignored_T=ignored_T)
