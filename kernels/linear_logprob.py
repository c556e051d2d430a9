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

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from entrocraft.kernels.arguments import (
    check_bias,
    check_bytes,
    check_float_matrix,
    check_main_grad,
    check_softcap,
    check_target,
    check_weight,
    checked_inverse_temperature,
    compute_dtype,
)
from entrocraft.kernels.head import BUFFER_BYTES, NARROWEST_TILE, Exponentials, Head, HeadOptions
from entrocraft.kernels.head_passes import Setting, local_head
from entrocraft.kernels.linear_logprob_op import VALUES, packed_scalars
from entrocraft.kernels.logits_logprob import logits_logprob_entropy_reference
from entrocraft.kernels.plan import HeadPlan, plan_head
from entrocraft.kernels.row_stats import RowValues, as_token_stats
from entrocraft.kernels.token_stats import TokenStats
from entrocraft.kernels.vocab_parallel import Shard, shard_of


def linear_logprob_entropy_reference(
    hidden_TH: Tensor,
    weight_VH: Tensor,
    target_T: Tensor,
    *,
    bias_V: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    ignore_index: int | None = -100,
    collision: bool = False,
    varentropy: bool = False,
    argmax: bool = False,
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
        varentropy=varentropy,
        argmax=argmax,
    )


def linear_logprob_entropy(
    hidden_TH: Tensor,
    weight_VH: Tensor,
    target_T: Tensor,
    *,
    bias_V: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    ignore_index: int | None = -100,
    collision: bool = False,
    varentropy: bool = False,
    argmax: bool = False,
    mode: str = "auto",
    cache_bytes: int = 0,
    entropy_gradient: bool = True,
    hidden_main_grad_TH: Tensor | None = None,
    weight_main_grad_VH: Tensor | None = None,
    vocab_size: int | None = None,
    group: ProcessGroup | None = None,
    vocab_start: int | None = None,
    batch_invariant: bool = False,
    validate: bool = False,
    buffer_bytes: int = BUFFER_BYTES,
) -> TokenStats:
    """Per-token log-probability and entropy of a linear head, in bounded memory: the equation at the top of the file.

    Args:
        hidden_TH: [T, H], bf16, fp16, fp32 or fp64, of any strides; T may be 0.
        weight_VH: [V, H], dtype of its own, V >= 1 and of any size. With `group`, this rank's rows.
        target_T: int64 [T], token ids in [0, V), or `ignore_index`.
        bias_V: [V], floating point, of any stride, or None. An entry of -inf takes the token out of the vocabulary
            (p = 0, no gradient), unless a softcap follows, which makes it -cap.
        temperature: a positive float, or a positive tensor [T]. It gets no gradient.
        softcap: cap of cap * tanh(a / cap) on the logits before temperature, or None.
        ignore_index: rows with this target give 0 in every field and no gradient, and are not computed. None: every
            row has a target, and a GPU is not asked how many do.
        collision: also give p2_T and p2logp_T.
        varentropy: also give varentropy_T.
        argmax: also give argmax_T and top1_T.
        mode: "auto", "statistics", "recompute", "cache" or "frozen": what is kept for the backward, and how many
            products it takes; the rule of "auto" stands in `plan.py`, and `plan_head` prints it.
        cache_bytes: what "cache" may keep between forward and backward; also the budget by which "auto" chooses.
        entropy_gradient: False makes entropy_T a constant for autograd, which saves "frozen" a product.
        hidden_main_grad_TH, weight_main_grad_VH: fp32 (fp64) tensors of the operand's shape. The backward adds the
            gradient there, unrounded, and gives autograd none. Not under torch.compile; the weight's not with a bias
            that requires a gradient.
        vocab_size: how many tokens the vocabulary has; rows of the weight from there on are padding: no probability,
            zero gradient. None: every row is a token.
        group: the ranks over which the vocabulary is sharded. All hold the same hidden_TH, target_T (ids of the whole
            vocabulary) and options, and all get the same statistics; each must compute the same loss of them. The
            hidden gradient is complete on every rank. weight_VH is a plain shard, or a DTensor with Shard(0).
        vocab_start: with `group` and a plain shard, the token id of its first row.
        batch_invariant: the statistics of a row, and its hidden gradient, do not depend on the other rows, to the last
            bit (fp16 gradients on a GPU excepted, whose scale is the batch's); slower on a CPU. "auto" then never
            chooses by the number of rows, and "cache" must have room for all of them.
        validate: on a GPU, check target ids (and temperatures) by a device-side assertion; nothing waits for it. On a
            CPU both are always checked, but in a compiled graph neither. Without it, an id outside the vocabulary
            gives a NaN log-probability.
        buffer_bytes: bound on the transient buffers, in bytes; see below.

    Returns:
        TokenStats, in nats, fp32 (fp64 when an operand is fp64). logprob_T, entropy_T and lse_T are differentiable,
        once, with respect to hidden_TH, weight_VH and bias_V, whose gradients come in their own dtypes; only those that
        are required are computed, and a row whose upstream gradient is zero costs nothing. The other fields have no
        gradient. A NaN or an overflow in a row makes that row NaN.

    Transient memory beyond inputs, outputs and gradients: `buffer_bytes` (but at least what one row and a few
    vocabulary columns need; in Triton one tile), O(T), and what `mode` keeps. In the backward 4 T H bytes for a hidden
    gradient that is not fp32 itself, and where not all rows are computed a copy of those that are and of their
    gradient; on a GPU as much again for fp16, whose gradients are scaled, and a copy of a hidden_TH without 16-byte
    rows; for `frozen` two more of 4 T H. Under autocast the op works in the dtypes of its operands; products of fp32
    operands take the precision that torch.set_float32_matmul_precision asks for, the logits never less than fp32.
    torch.compile(fullgraph=True) sees one operator forward and one backward.

    Raises:
        ValueError: wrong shape, dtype or device; a target id outside the vocabulary; a temperature or softcap that is
            not positive; a mode that cannot give what is required; a shard whose place is unknown.
        RuntimeError: differentiated twice.

    Source: arXiv 2604.26326, section 3 (the entropy of the batch as the controlled quantity).
    """
    check_float_matrix("hidden_TH", hidden_TH, "T, H")
    weight_VH, shard = shard_of(weight_VH, group, vocab_start, vocab_size)
    check_weight(weight_VH, like=hidden_TH, sharded=group is not None)
    if bias_V is not None:
        check_bias(bias_V, V=weight_VH.shape[0], like=hidden_TH)
        bias_V = bias_V.contiguous()  # device code reads it with stride 1
    known_V = vocab_size if group is not None or vocab_size is not None else weight_VH.shape[0]
    check_target(target_T, like=hidden_TH, V=known_V, ignore_index=ignore_index, validate=validate)
    check_softcap(softcap)
    check_bytes("buffer_bytes", buffer_bytes, least=1, such_as=BUFFER_BYTES)
    check_bytes("cache_bytes", cache_bytes, least=0, such_as=4 << 30)
    check_main_grad("hidden", hidden_main_grad_TH, hidden_TH)
    check_main_grad("weight", weight_main_grad_VH, weight_VH, bias_V)
    dtype = compute_dtype(hidden_TH, weight_VH)
    inv_temperature = checked_inverse_temperature(temperature, like=hidden_TH, dtype=dtype, validate=validate)
    options = HeadOptions(softcap, collision, varentropy, argmax, buffer_bytes, batch_invariant)
    head = Head(hidden_TH, weight_VH, bias_V, target_T.contiguous(), inv_temperature, options)
    plan = _plan(head, shard, mode, cache_bytes, entropy_gradient)
    setting = Setting(options, ignore_index, plan.mode, plan.stored_rows, entropy_gradient, shard)
    temperature_T = inv_temperature if isinstance(inv_temperature, Tensor) else None
    results = torch.ops.entrocraft.linear_logprob(
        *head[:4], temperature_T, hidden_main_grad_TH, weight_main_grad_VH, *packed_scalars(inv_temperature, setting)
    )
    values = RowValues(*results[:VALUES])
    if not entropy_gradient:
        values = values._replace(entropy_T=values.entropy_T.detach())
    asked = {"collision": collision, "varentropy": varentropy, "argmax": argmax}
    ignored_T = None if ignore_index is None else target_T == ignore_index
    return as_token_stats(values, target_T, **asked, ignored_T=ignored_T)


def _plan(head: Head, shard: Shard, mode: str, cache_bytes: int, entropy_gradient: bool) -> HeadPlan:
    """`plan_head` for these operands."""
    needs = [operand is not None and operand.requires_grad for operand in head[:3]]
    live = local_head(head, shard)
    return plan_head(
        head.T,
        head.H,
        mode=mode,
        needs_hidden=torch.is_grad_enabled() and needs[0],
        needs_weight=torch.is_grad_enabled() and (needs[1] or needs[2]),
        entropy_gradient=entropy_gradient,
        cache_bytes=cache_bytes,
        # Of the narrowest tiles there are, so at most a few percent too much: a backend's own would ask for the chip
        # and the addresses of the operands, which a graph that is being traced does not have.
        bytes_per_row=Exponentials.bytes_per_row(live, NARROWEST_TILE) if live.V else 1,
        element_bytes=head.dtype.itemsize,
        batch_invariant=head.options.batch_invariant,
    )
