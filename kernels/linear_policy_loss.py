"""Linear head -> policy loss, its gradients made in the forward: three matrix products, whatever the loss.

    loss = sum over chunks c of rows:  L(logprob_c, entropy_c),      logprob and entropy as in `linear_logprob.py`

The gradient of a head needs the logits twice: for the sums of a row, and again for dz when the upstream gradient is
known; that is a fourth product, or [T, V] kept. A policy loss needs no more than the sequences at hand to know its
gradient, so a chunk of rows goes all the way at once:

    1. sums of its rows; the exponentials e^(z - shift) stay behind              1 product
    2. L on [N] numbers, under autograd: d L / d logprob, d L / d entropy
    3. dz from the exponentials, dX and dW from dz                               2 products

and the next chunk uses the same room. Rows whose upstream gradient is zero (clipped, rejected) or that are ignored are
left out of step 3. A sequence that does not fit keeps the exponentials of as many rows as do; the logits of the others
are computed a second time.

Bytes. T = 16384, V = 151936, H = 2560 in bf16, buffers of 1 GiB: chunks of 2,432 rows; 2 T V = 5.0 GB of exponentials
written and read once, and dW in fp32 read and written once a chunk, 8 V H = 3.1 GB each. The larger the buffer, the
fewer chunks.

Where it loses: gradients are made before anyone asks for them, so a loss whose backward is never called has cost three
products instead of one (call it under no_grad); and a loss that ties all sequences together by more than a sum does not
fit: compute that of `linear_logprob_entropy`.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Sequence
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from entrocraft.kernels.arguments import (
    assert_on_device,
    check_bias,
    check_bytes,
    check_float_matrix,
    check_main_grad,
    check_softcap,
    check_target,
    check_weight,
    checked_inverse_temperature,
    compute_dtype,
    refuse_second_derivative,
)
from entrocraft.kernels.head import Head, HeadOptions, Sinks
from entrocraft.kernels.policy_loss_passes import ChunkPlan, Loss, PolicyPass, plan_of
from entrocraft.kernels.row_stats import as_token_stats
from entrocraft.kernels.token_stats import TokenStats
from entrocraft.kernels.vocab_parallel import Shard, shard_of

POLICY_BUFFER_BYTES = 1 << 30

_log = logging.getLogger("entrocraft.kernels")
Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


def _never_compiled(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """`function`, which torch.compile calls as it is. The compiler, seconds of imports, is loaded where it is at work:
    torch.compiler.disable would load it with this file."""
    opaque = torch._disable_dynamo(function)  # pyright: ignore[reportPrivateImportUsage]

    @functools.wraps(function)
    def call(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        return (opaque if torch.compiler.is_compiling() else function)(*args, **kwargs)

    return call


@_never_compiled
def linear_policy_loss(
    hidden_TH: Tensor,
    weight_VH: Tensor,
    target_T: Tensor,
    *,
    loss: Loss,
    lengths_R: Sequence[int] | None = None,
    bias_V: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    ignore_index: int | None = -100,
    collision: bool = False,
    varentropy: bool = False,
    argmax: bool = False,
    hidden_main_grad_TH: Tensor | None = None,
    weight_main_grad_VH: Tensor | None = None,
    vocab_size: int | None = None,
    group: ProcessGroup | None = None,
    vocab_start: int | None = None,
    validate: bool = False,
    buffer_bytes: int = POLICY_BUFFER_BYTES,
) -> tuple[Tensor, TokenStats]:
    """A loss of the log-probabilities and entropies of a linear head, in three products: see the top of the file.

    `loss(logprob_N, entropy_N, rows)` is called once for each chunk of rows, in order, `rows` being a slice of the T
    rows, and gives the chunk's share as a tensor of no dimension; the shares are summed. So it must be additive over
    sequences (over rows, without `lengths_R`), and divide by constants of the batch, never by what a chunk holds:
    weights from `token_weights` do that. `entrocraft.PolicyObjective` is such a closure, for PPO-clip, GSPO and CISPO.
    All else that it computes with is constant: only hidden, weight and bias get gradients. A row whose target is
    `ignore_index` holds 0 in both arguments and gets none.

    Args:
        hidden_TH, weight_VH, target_T, bias_V, temperature, softcap, ignore_index, collision, varentropy, argmax,
            vocab_size, vocab_start, validate: as in `linear_logprob_entropy`.
        loss: the closure, on [N] tensors in nats. With `group`, it must give the same on every rank.
        lengths_R: how many rows each sequence has, in order, as host integers that sum to T: a chunk then holds whole
            sequences. None: any consecutive rows.
        hidden_main_grad_TH, weight_main_grad_VH: fp32 (fp64) tensors of the operand's shape, to which its gradient is
            added, unrounded; autograd gets none. It is added in the forward, since keeping it apart until the backward
            would take the 4 V H bytes that are to be saved. So the loss must go into backward() once, with an upstream
            gradient of 1: put factors into the closure. Not with a bias that requires a gradient.
        group: the ranks over which the vocabulary is sharded, as in `linear_logprob_entropy`. Gradients of hidden are
            summed over them in the forward, chunk by chunk.
        buffer_bytes: bound on exponentials and all else that is transient; a quarter of it, at most 256 MiB, is for
            the tiles of the computation.

    Returns:
        The loss, of no dimension, fp32 (fp64 when an operand is fp64), differentiable once with respect to hidden_TH,
        weight_VH and bias_V; and the TokenStats of all T rows, detached. The gradients are there when this returns:
        the backward multiplies them by its upstream gradient. Those that are not required are not computed, and under
        no_grad none is. A NaN is passed on.

    Memory beyond inputs and outputs: `buffer_bytes` (but at least what one row needs), O(T), the gradients in the
    dtypes of their operands (fp16: in fp32, for small ones would be lost before a loss scale reaches them), and, while
    this runs, 4 V H bytes for the weight gradient's sum, unless `weight_main_grad_VH` is where it is summed. The
    backward needs nothing; under retain_graph=True a copy of the gradients.

    torch.compile does not look inside: it breaks the graph here, and the closure runs eagerly; fullgraph=True refuses.
    Under autocast the head works in the dtypes of its operands. Checkpoint the backbone but not this call, which would
    be computed twice, and add to main gradients twice.

    Raises:
        ValueError: as `linear_logprob_entropy`; lengths_R that do not sum to T; a closure that returns no scalar, or
            whose attribute `clamped_share` is above 0: the entropy here is that of the whole row.
        RuntimeError: differentiated twice; with main gradients, an upstream gradient other than 1 (on a GPU a
            device-side assertion) or a second backward.
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
    check_bytes("buffer_bytes", buffer_bytes, least=1, such_as=POLICY_BUFFER_BYTES)
    check_main_grad("hidden", hidden_main_grad_TH, hidden_TH)
    check_main_grad("weight", weight_main_grad_VH, weight_VH, bias_V)
    _check_lengths(lengths_R, hidden_TH.shape[0])
    _check_entropy(loss)
    dtype = compute_dtype(hidden_TH, weight_VH)
    inv_temperature = checked_inverse_temperature(temperature, like=hidden_TH, dtype=dtype, validate=validate)
    options = HeadOptions(softcap, collision, varentropy, argmax)
    head = Head(hidden_TH, weight_VH, bias_V, target_T.contiguous(), inv_temperature, options)
    main_grads = (hidden_main_grad_TH, weight_main_grad_VH, None)
    needs = [torch.is_grad_enabled() and operand is not None and operand.requires_grad for operand in head[:3]]
    with torch.no_grad(), torch.cuda.device_of(hidden_TH):
        made = PolicyPass(head, shard, ignore_index, lengths_R, buffer_bytes)
        _log_plan(head.T, head.H, plan_of(made.chunks, made.room, needs[0], needs[1] or needs[2]))
        sums = _sums(head, needs, main_grads)
        total, values = made.run(loss, _sinks(sums, shard) if any(needs) else None)
        grads = _finished(head, sums, main_grads)
    asked = {"collision": collision, "varentropy": varentropy, "argmax": argmax}
    ignored_T = None if ignore_index is None else target_T == ignore_index
    stats = as_token_stats(values, target_T, **asked, ignored_T=ignored_T).detach()
    if any(needs):
        total = _Ready.apply(total, any(main is not None for main in main_grads), *grads, *head[:3])
    return total, stats


def _check_lengths(lengths_R: Sequence[int] | None, T: int) -> None:
    if lengths_R is None:
        return
    if isinstance(lengths_R, Tensor) or not all(isinstance(length, int) and length >= 0 for length in lengths_R):
        raise ValueError(
            f"lengths_R is {lengths_R!r}; expected non-negative integers on the host, which decide where chunks are "
            "cut: pass lengths_R.tolist()"
        )
    if sum(lengths_R) != T:
        raise ValueError(
            f"lengths_R sums to {sum(lengths_R)} over {len(lengths_R)} sequences; expected {T}, the rows of hidden_TH"
        )


def _check_entropy(loss: Loss) -> None:
    share = getattr(loss, "clamped_share", 0.0)
    if share > 0.0:
        raise ValueError(
            f"loss has clamped_share = {share!r}; expected a loss of the entropy of whole rows: give this one "
            "linear_logprob_entropy's log-probabilities and kernels.clamped_entropy with that share"
        )


@functools.lru_cache(maxsize=256)
def _log_plan(T: int, H: int, plan: ChunkPlan) -> None:
    """Once for each set of arguments."""
    _log.info("policy loss of %d rows, hidden size %d: %s", T, H, plan)


def _kept_dtype(operand: Tensor) -> torch.dtype:
    """What a gradient waits in for the backward: fp16 would lose the small ones before a loss scale reaches them."""
    return torch.float32 if operand.dtype == torch.float16 else operand.dtype


def _sums(head: Head, needs: list[bool], main_grads: tuple[Tensor | None, ...]) -> list[Tensor | None]:
    """Where gradients are summed; hidden's are final row by row, and need no wider dtype than they are kept in."""
    sums: list[Tensor | None] = []
    for operand, needed, main, dtype in zip(
        head[:3], needs, main_grads, (_kept_dtype(head.hidden_TH), head.dtype, head.dtype), strict=True
    ):
        if operand is None or not needed:
            sums.append(None)
        else:
            sums.append(operand.new_zeros(operand.shape, dtype=dtype) if main is None else main)
    return sums


def _sinks(sums: list[Tensor | None], shard: Shard) -> Sinks:
    """Padding rows of the vocabulary keep their zeros."""
    hidden_TH, *others = sums
    return Sinks(hidden_TH, *(None if part is None else part[: shard.columns] for part in others), accumulate=True)


def _finished(head: Head, sums: list[Tensor | None], main_grads: tuple[Tensor | None, ...]) -> list[Tensor | None]:
    """The gradients as they are kept; None for those that went into a main gradient. Empties `sums`."""
    grads: list[Tensor | None] = []
    for i, (operand, main) in enumerate(zip(head[:3], main_grads, strict=True)):
        part, sums[i] = sums[i], None
        grads.append(None if part is None or operand is None or main is not None else part.to(_kept_dtype(operand)))
    return grads


class _Ready(torch.autograd.Function):
    """A loss whose gradients are there already."""

    @staticmethod
    def forward(ctx, total, into_main, *grads_and_operands):
        ctx.into_main, ctx.walked = into_main, False
        # The operands only so that a second derivative finds its way to the error.
        operands = zip(grads_and_operands[3:], ctx.needs_input_grad[5:], strict=True)
        ctx.save_for_backward(*grads_and_operands[:3], *(operand if needed else None for operand, needed in operands))
        return total.clone()

    @staticmethod
    def backward(ctx, *grad_outputs):
        (upstream,) = grad_outputs
        grads, operands = list(ctx.saved_tensors[:3]), list(ctx.saved_tensors[3:])
        if ctx.into_main:
            _check_walked_once(ctx, upstream)
        # Without retain_graph nobody comes back for them: they are multiplied where they are.
        again = torch._C._autograd._get_current_graph_task_keep_graph()  # pyright: ignore[reportAttributeAccessIssue]
        scaled: list[Tensor | None] = []
        with torch.no_grad():
            for grad, operand in zip(grads, operands, strict=True):
                if grad is not None and operand is not None:
                    grad = (grad * upstream if again else grad.mul_(upstream)).to(operand.dtype)
                scaled.append(grad)
        if torch.is_grad_enabled():
            # Empty, but a way from the gradients to every operand.
            way = torch.cat([operand[:0].flatten().to(upstream.dtype) for operand in operands if operand is not None])
            scaled = refuse_second_derivative("linear_policy_loss", [way], scaled)
        return None, None, None, None, None, *scaled


def _check_walked_once(ctx, upstream: Tensor) -> None:
    """What was added to a main gradient in the forward was meant for one backward, with an upstream gradient of 1."""
    if ctx.walked:
        raise RuntimeError(
            "a second backward through linear_policy_loss, whose main gradients were added once, in the forward; leave "
            "them out to walk a graph twice"
        )
    ctx.walked = True
    if upstream.device.type != "cpu":
        assert_on_device((upstream == 1).all(), "linear_policy_loss with main gradients: upstream gradient is not 1")
    elif upstream != 1:
        raise RuntimeError(
            f"linear_policy_loss got an upstream gradient of {float(upstream)}, but its main gradients were added in "
            "the forward, for 1; put the factor into the closure, or leave the main gradients out"
        )
