"""Entropy of each row without the least likely part of the vocabulary: AEnt's, which no sum over columns gives.

    keep_t = the ceil((1 - share) V) tokens with the largest z_tv         q_t = softmax of z_t over keep_t
    H_t    = -sum over keep_t of q log q

Which tokens are kept depends on the ranking of the whole row, so it cannot be accumulated tile by tile as the other
statistics are. Rows are taken in blocks, whose logits are computed again in the backward: three products forward and
backward more than the fused op, and a sort of every row. Plain torch on any device.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from entrocraft.kernels.arguments import check_softcap, checked_inverse_temperature, compute_dtype
from entrocraft.kernels.head import BUFFER_BYTES


def clamped_entropy(
    hidden_TH: Tensor,
    weight_VH: Tensor,
    *,
    share: float,
    bias_V: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    buffer_bytes: int = BUFFER_BYTES,
) -> Tensor:
    """H_t of the equation above, nats, fp32 [T] (fp64 for fp64 operands).

    Differentiable with respect to hidden, weight and bias; the choice of the tokens has no gradient.

    Args:
        hidden_TH, weight_VH, bias_V, temperature, softcap: as for `linear_logprob_entropy`.
        share: of the vocabulary that is left out, in (0, 1); at least one token stays.
        buffer_bytes: bound on the logits of a block of rows and what is made of them.

    Raises:
        ValueError: share out of range, shapes that do not fit.

    Source: Shen et al. (arXiv 2509.03493).
    """
    if not 0.0 < share < 1.0:
        raise ValueError(f"share = {share!r}: expected a part of the vocabulary in (0, 1), such as 0.2")
    if hidden_TH.dim() != 2 or weight_VH.dim() != 2 or hidden_TH.shape[1] != weight_VH.shape[1]:
        raise ValueError(
            f"hidden_TH is {tuple(hidden_TH.shape)} and weight_VH {tuple(weight_VH.shape)}; expected [T, H] and [V, H]"
        )
    check_softcap(softcap)
    dtype = compute_dtype(hidden_TH, weight_VH)
    (T, _), V = hidden_TH.shape, len(weight_VH)
    inverse = checked_inverse_temperature(temperature, like=hidden_TH, dtype=dtype, validate=False)
    kept = max(1, math.ceil((1.0 - share) * V))
    rows = max(1, buffer_bytes // (5 * V * dtype.itemsize))

    def block(hidden_NH: Tensor, inverse_N: float | Tensor) -> Tensor:
        z_NV = hidden_NH.to(dtype) @ weight_VH.to(dtype).T
        if bias_V is not None:
            z_NV = z_NV + bias_V.to(dtype)
        if softcap is not None:
            z_NV = softcap * torch.tanh(z_NV / softcap)
        z_NV = z_NV * (inverse_N[:, None] if isinstance(inverse_N, Tensor) else inverse_N)
        logq_NK = z_NV.topk(kept, dim=1, sorted=False).values.log_softmax(1)
        return -(logq_NK.exp() * logq_NK.masked_fill(logq_NK == -math.inf, 0.0)).sum(1)

    parts = []
    for first in range(0, T, rows):
        here = slice(first, first + rows)
        inverse_N = inverse[here] if isinstance(inverse, Tensor) else inverse
        parts.append(checkpoint(block, hidden_TH[here], inverse_N, use_reentrant=False))
    return torch.cat(parts) if parts else hidden_TH.new_zeros(0, dtype=dtype)
