"""The head as two registered operators, entrocraft::linear_logprob and its backward, and their link to autograd.

Registered operators are opaque to torch.compile: what they give is described by fake kernels, what they do runs as it
does in eager mode, with all its waiting for row counts. Their arguments are tensors and plain numbers, so a process
group travels by its name.
"""

from __future__ import annotations

import ast
import functools
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from entrocraft.kernels.arguments import no_autocast, second_derivative_message
from entrocraft.kernels.head import Exponentials, Head, HeadOptions, Sinks
from entrocraft.kernels.head_passes import Kept, Setting, Upstream, backend_of, local_head, run_backward, run_forward
from entrocraft.kernels.row_stats import RowValues
from entrocraft.kernels.vocab_parallel import Shard

OPERANDS = "Tensor hidden, Tensor weight, Tensor? bias, Tensor target, Tensor? inv_temperature_T"
# The arguments of a call that are no tensors travel as one string: autograd looks at every argument of a schema in time
# that grows with the square of their number, a third of a millisecond for twenty.
SCALARS = "float inv_temperature, SymInt stored_rows, str setting"
VALUES = len(RowValues._fields)
OUTPUTS = VALUES + len(Kept._fields)


def packed_scalars(inv_temperature: float | Tensor, setting: Setting) -> tuple[float, int, str]:
    """The arguments that SCALARS names; written so that torch.compile can follow."""
    number = 1.0 if isinstance(inv_temperature, Tensor) else inv_temperature
    options, shard = setting.options, setting.shard
    group = "" if shard.group is None else shard.group.group_name
    fields = (
        options.softcap, options.collision, options.varentropy, options.argmax, options.buffer_bytes,
        options.batch_invariant, setting.ignore_index, setting.entropy_gradient, shard.vocab_start, shard.columns,
    )  # fmt: skip
    return number, setting.stored_rows, f"{', '.join([str(field) for field in fields])}, '{setting.mode}', '{group}'"


@functools.lru_cache(maxsize=256)
def _setting(stored_rows: int, text: str) -> tuple[Setting, str]:
    """The reverse of the above, and the name of the group."""
    *fields, mode, name = ast.literal_eval(text)
    ignore_index, entropy_gradient, vocab_start, columns = fields[6:]
    shard = Shard(None, vocab_start, columns)
    return Setting(HeadOptions(*fields[:6]), ignore_index, mode, stored_rows, entropy_gradient, shard), name


def _unpacked(
    operands: tuple[Any, ...], scalars: tuple[float, int, str], *, fake: bool = False
) -> tuple[Head, Setting]:
    """The reverse of `packed_scalars`, with the operands; a fake call communicates with nobody, and has no group."""
    hidden_TH, weight_VH, bias_V, target_T, inv_temperature_T = operands
    setting, name = _setting.__wrapped__(*scalars[1:]) if fake else _setting(*scalars[1:])
    if name and not fake:
        setting = setting._replace(shard=setting.shard._replace(group=_group_of(name)))
    inv_temperature = scalars[0] if inv_temperature_T is None else inv_temperature_T
    return Head(hidden_TH, weight_VH, bias_V, target_T, inv_temperature, setting.options), setting


def _group_of(name: str) -> ProcessGroup:
    from torch.distributed import distributed_c10d

    return distributed_c10d._resolve_process_group(name)  # pyright: ignore[reportPrivateImportUsage, reportArgumentType]


_library = torch.library.Library("entrocraft", "DEF")
_library.define(
    f"linear_logprob({OPERANDS}, Tensor? hidden_main_grad, Tensor? weight_main_grad, {SCALARS}) "
    f"-> ({', '.join(['Tensor'] * OUTPUTS)})"
)
_library.define(
    f"linear_logprob_backward({OPERANDS}, Tensor? grad_logprob, Tensor? grad_entropy, Tensor? grad_lse, "
    f"Tensor[] kept, bool needs_hidden, bool needs_weight, bool needs_bias, {SCALARS}) -> (Tensor, Tensor, Tensor)"
)


@torch.library.impl(_library, "linear_logprob", "CompositeExplicitAutograd")
def forward(*arguments):
    """The operator: row values, then what is kept."""
    head, setting = _unpacked(arguments[:5], arguments[7:])
    with torch.no_grad(), torch.cuda.device_of(head.hidden_TH), no_autocast(head.hidden_TH.device):
        values, kept = run_forward(head, setting)
    return *values, *kept


@torch.library.register_fake("entrocraft::linear_logprob", lib=_library)
def _fake_forward(*arguments):
    head, setting = _unpacked(arguments[:5], arguments[7:], fake=True)
    new = head.hidden_TH.new_empty
    values = [new(head.T, dtype=torch.int64 if name == "argmax_T" else head.dtype) for name in RowValues._fields]
    kept = Kept(*(new(0) for _ in Kept._fields))
    if setting.mode == "frozen":
        kept = kept._replace(logprob_basis_TH=new((head.T, head.H), dtype=head.dtype))
        if setting.entropy_gradient:
            kept = kept._replace(entropy_basis_TH=new((head.T, head.H), dtype=head.dtype))
    elif setting.mode == "cache":
        live = local_head(head, setting.shard)
        room = Exponentials.empty(live, setting.stored_rows, backend_of(live).tile_columns(live))
        kept = kept._replace(value_NV=room.value_NV, shift_NS=room.shift_NS)
    return *values, *kept


@torch.library.impl(_library, "linear_logprob_backward", "CompositeExplicitAutograd")
def backward(*arguments):
    """The operator: gradients of hidden, weight and bias, empty where not needed."""
    head, setting = _unpacked(arguments[:5], arguments[12:])
    grads = _gradients(head, setting, Upstream(*arguments[5:8]), arguments[8], arguments[9:12], (None, None))
    return tuple(head.hidden_TH.new_empty(0) if grad is None else grad for grad in grads)


@torch.library.register_fake("entrocraft::linear_logprob_backward", lib=_library)
def _fake_backward(*arguments):
    return tuple(
        torch.empty_like(operand, memory_format=torch.contiguous_format) if needed else arguments[0].new_empty(0)
        for operand, needed in zip(arguments[:3], arguments[9:12], strict=True)
    )


def _gradients(
    head: Head,
    setting: Setting,
    upstream: Upstream,
    kept: list[Tensor],
    needs: tuple[bool, ...],
    main_grads: tuple[Tensor | None, Tensor | None],
) -> list[Tensor | None]:
    """Gradients of hidden, weight and bias; None for what is not needed, or went into a main gradient."""
    grads = [
        operand.new_zeros(operand.shape, dtype=dtype) if needed and operand is not None and main is None else None
        for operand, dtype, needed, main in zip(
            head[:3], (head.dtype, None, None), needs, (*main_grads, None), strict=True
        )
    ]
    columns = setting.shard.columns
    hidden_TH, weight_VH, bias_V = grads
    sinks = Sinks(
        hidden_TH if main_grads[0] is None or not needs[0] else main_grads[0],
        # Padding rows keep their zeros.
        weight_VH[:columns] if weight_VH is not None else None,
        bias_V[:columns] if bias_V is not None else None,
    )
    if main_grads[1] is not None and needs[1]:
        assert bias_V is None, "a main gradient of the weight with a bias was refused"
        sinks = sinks._replace(weight_VH=main_grads[1][:columns], accumulate=True)
    with torch.no_grad(), torch.cuda.device_of(head.hidden_TH), no_autocast(head.hidden_TH.device):
        run_backward(head, upstream, RowValues(*kept[:VALUES]), Kept(*kept[VALUES:]), setting, sinks)
        return [None if hidden_TH is None else hidden_TH.to(head.hidden_TH.dtype), weight_VH, bias_V]


def _setup_context(ctx, inputs, output) -> None:
    ctx.set_materialize_grads(False)
    values, kept = RowValues(*output[:VALUES]), output[VALUES:]
    differentiable = (values.logprob_T, values.entropy_T, values.lse_T)
    ctx.mark_non_differentiable(*(field for field in output if not any(field is one for one in differentiable)))
    # Attributes, not saved tensors: they are meant to change between forward and backward.
    ctx.main_grads, ctx.scalars = inputs[5:7], inputs[7:]
    needed = [values.logprob_T, values.entropy_T, values.shift_T, values.log_s0_T]
    ctx.save_for_backward(*inputs[:5], *needed, *kept)


def _link(ctx, *grads):
    """The backward of entrocraft::linear_logprob."""
    saved = ctx.saved_tensors  # once: checkpointing gives them once
    operands, (logprob_T, entropy_T, shift_T, log_s0_T), kept = saved[:5], saved[5:9], saved[9:]
    upstream = Upstream(*grads[:3])
    needs = tuple(ctx.needs_input_grad[:3])
    none = (None,) * (len(ctx.scalars) + len(operands) - 3 + 2)
    if not any(needs) or all(grad is None for grad in upstream):
        return None, None, None, *none
    nothing = logprob_T.new_empty(0)
    values = RowValues(
        logprob_T, entropy_T, nothing, nothing, nothing, nothing, nothing, shift_T=shift_T, log_s0_T=log_s0_T
    )
    if any(main is not None for main in ctx.main_grads):
        head, setting = _unpacked(operands, ctx.scalars)
        results = _gradients(head, setting, upstream, [*values, *kept], needs, ctx.main_grads)
    else:
        results = torch.ops.entrocraft.linear_logprob_backward(
            *operands, *upstream, [*values, *kept], *needs, *ctx.scalars
        )
        results = [grad if needed else None for grad, needed in zip(results, needs, strict=True)]
    return *results, *none


def _no_second_derivative(ctx, *grads):
    raise RuntimeError(second_derivative_message("linear_logprob_entropy"))


torch.library.register_autograd("entrocraft::linear_logprob", _link, setup_context=_setup_context, lib=_library)
torch.library.register_autograd("entrocraft::linear_logprob_backward", _no_second_derivative, lib=_library)
