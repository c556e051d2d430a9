"""What a forward and a backward pass keep in memory, by running them on tensors that have no storage.

The model's own code runs on the meta device, under a mode that adds up the storages that are alive: order and lifetime
are those of the real pass, as autograd keeps and frees the same tensors. One thing is put in place of the original:
fused attention, which on meta would take torch's unfused path and keep all scores. Its stand-in keeps what the fused
kernels keep: query, key, value, the mask as numbers of the compute dtype, the output, and a log-sum-exp per row.
"""

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import repeat_kv

from entrocraft.train.sharding import blocks


class Allocations(TorchDispatchMode):
    """Bytes of the storages that operations inside the block made and that are alive, and the most there were.

    device: count those of this type alone, such as "cpu".
    """

    def __init__(self, device: str | None = None) -> None:
        super().__init__()
        self.device = device
        self.alive = self.peak = 0
        self._known: dict[int, weakref.ref] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **kwargs or {})
        before = {id(_storage(leaf)) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                storage = _storage(leaf)
                if id(storage) in before or id(storage) in self._known:  # a view, or seen before
                    continue
                if self.device in (None, storage.device.type):
                    self._add(storage)
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = id(storage), storage.nbytes()

        def gone(_: object) -> None:
            self.alive -= size
            self._known.pop(key, None)

        self._known[key] = weakref.ref(storage, gone)
        self.alive += size
        self.peak = max(self.peak, self.alive)

    def restart(self) -> int:
        """Forgets the peak so far, which is returned."""
        peak, self.peak = self.peak, self.alive
        return peak


def _storage(tensor: Tensor) -> torch.UntypedStorage:
    """Of this rank's part: the storage of a DTensor itself pretends to be of the whole."""
    return (tensor._local_tensor if isinstance(tensor, DTensor) else tensor).untyped_storage()


class _FusedAttention(torch.autograd.Function):
    """The memory of a fused attention kernel, without its values."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        # As the kernels write it, with heads beside each other, so that merging them afterwards copies nothing.
        batch, heads, length = query.shape[:3]
        output = query.new_empty(batch, length, heads, value.shape[-1]).transpose(1, 2)
        row_sums = query.new_empty(query.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(query, key, value, mask, output, row_sums)
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        query, key, value, *_ = ctx.saved_tensors
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value), None


def _masked_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor, **options: Any
) -> tuple[Tensor, None]:
    """SDPA in the signature of transformers, with a mask, beside which it repeats the heads of key and value."""
    groups = getattr(module, "num_key_value_groups", 1)
    mask = torch.empty(attention_mask.shape, dtype=query.dtype, device=query.device)
    output = _FusedAttention.apply(query, repeat_kv(key, groups), repeat_kv(value, groups), mask)
    return output.transpose(1, 2).contiguous(), None


def _varlen_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor, **options: Any
) -> tuple[Tensor, None]:
    """flash-attention in the signature of transformers: no mask, and heads are not repeated."""
    return _FusedAttention.apply(query, key, value, None).transpose(1, 2), None


# A name with "flash" in it would make transformers look for the package.
MASKED, VARLEN = "entrocraft_planned_masked", "entrocraft_planned_varlen"
AttentionInterface.register(MASKED, _masked_attention)
AttentionInterface.register(VARLEN, _varlen_attention)

# Blocks of the short copies that stand in for a deep model. One is not enough: the first may be special.
_SHORT, _LONG = 2, 4


@dataclass(frozen=True, slots=True)
class Saved:
    """A tensor that autograd keeps for the backward pass and that is not a parameter."""

    shape: tuple[int, ...]
    """Of the view that is kept."""
    dtype: torch.dtype
    nbytes: int
    """Of its whole storage, which is what stays allocated; storages are listed once."""


@contextmanager
def listing_saved(model: nn.Module) -> Iterator[list[Saved]]:
    """Collects what autograd keeps in the block, storage by storage, in the order in which it is first kept."""
    held: list[Tensor] = []  # alive, so that no storage's place is given to another
    seen = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    seen |= {buffer.untyped_storage()._cdata for buffer in model.buffers()}
    found: list[Saved] = []

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in seen:
            seen.add(storage._cdata)
            held.append(tensor)
            found.append(Saved(tuple(tensor.shape), tensor.dtype, storage.nbytes()))
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        yield found


@dataclass(frozen=True, slots=True)
class Trace:
    """Bytes of a pass of the backbone, beyond parameters, their gradients and the inputs."""

    score: int
    """The most during a forward pass without gradients, output included."""
    kept: int
    """Alive after a forward pass with gradients: what the backward pass will need, output included."""
    forward: int
    """The most during that forward pass."""
    backward: int
    """The most during the backward pass, the output's gradient included and what is kept until it is used."""
    output: int
    """The hidden states [B, L, H]."""


def packed_inputs(rows: int, length: int, *, device: str = "meta") -> dict[str, Any]:
    """Token ids, positions and the mask of B rows of L packed tokens; without values on meta."""
    ids = torch.zeros(rows, length, dtype=torch.int64, device=device)
    places = torch.arange(length, device=device).expand(rows, length)
    mask = torch.ones(rows, 1, length, length, dtype=torch.bool, device=device).tril()
    return {"input_ids": ids, "position_ids": places, "attention_mask": mask, "use_cache": False}


def trace_blocks(model: Any, inputs: dict[str, Any]) -> Trace:
    """As `trace`, of a model whose blocks are alike, from two short copies of it: all but `output` and `score` is
    linear in the number of blocks. A model whose blocks differ, or that has few, is run as it is."""
    stack = next(module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module) > 0)
    all_blocks = list(blocks(model))
    if list(stack) != all_blocks or len(all_blocks) <= _LONG or len({_form(block) for block in all_blocks}) > 1:
        return trace(model, inputs)
    shorter = []
    try:
        for count in (_SHORT, _LONG):
            stack._modules.clear()
            stack.extend(all_blocks[:count])
            shorter.append(trace(model, inputs))
    finally:
        stack._modules.clear()
        stack.extend(all_blocks)
    low, high = shorter
    steps = (len(all_blocks) - _SHORT) / (_LONG - _SHORT)
    grown = {
        name: round(getattr(low, name) + steps * (getattr(high, name) - getattr(low, name)))
        for name in ("kept", "forward", "backward")
    }
    return Trace(score=high.score, output=high.output, **grown)


def _form(block: nn.Module) -> tuple:
    """What two blocks that keep the same have in common."""
    parts = tuple((name, tuple(parameter.shape)) for name, parameter in block.named_parameters())
    window = getattr(getattr(block, "self_attn", None), "sliding_window", None)
    return type(block), parts, window, getattr(block, "attention_type", None)


def trace(model: Any, inputs: dict[str, Any]) -> Trace:
    """Runs the backbone of a meta model on meta inputs: scored, then forward and backward.

    A parameter's gradient is let go when it has been accumulated: where gradients stay is the plan's to say.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    hooks = [parameter.register_post_accumulate_grad_hook(_let_go) for parameter in trained]
    run: Callable[[], Tensor] = lambda: model.base_model(**inputs).last_hidden_state  # noqa: E731
    try:
        with torch.no_grad(), Allocations() as scored:
            model.eval()
            run()
        model.train()
        with Allocations() as learnt:
            hidden = run()
            kept, forward = learnt.alive, learnt.restart()
            size = hidden.untyped_storage().nbytes()
            hidden.backward(torch.empty_like(hidden))
        return Trace(score=scored.peak, kept=kept, forward=forward, backward=learnt.peak, output=size)
    finally:
        for hook in hooks:
            hook.remove()


def _let_go(parameter: Tensor) -> None:
    parameter.grad = None
