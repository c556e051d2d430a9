"""The LM head sharded by vocabulary over data-parallel ranks: hidden states travel, its weight and gradient never do.

Each rank has tokens of its own and some rows of the weight. Forward: the ranks' hidden rows are gathered, every rank
computes its rows' part of all tokens' sums (`group=` of `linear_logprob_entropy`, which merges them), and keeps the
statistics of its own tokens. Backward: what each rank's loss asks of its tokens is gathered, so that all compute one
loss, and each keeps its own tokens' part of the hidden gradient. The weight's gradient is that of all tokens already.

Bytes a token and pass: 2 H for the hidden row out and its gradient within the group, and a few numbers, against
V H weights gathered and V H gradients scattered for every micro-batch.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from entrocraft.kernels import FusedHead, TokenStats


def vocabulary_group(model: Any) -> dist.ProcessGroup | None:
    """The ranks over which the head's vocabulary is sharded; None for a head that is not."""
    return getattr(model.get_output_embeddings(), "vocabulary_group", None)


class ShardedHead(FusedHead):
    """FusedHead for a head whose weight is a DTensor of vocabulary rows; every rank calls it with its own tokens."""

    def __init__(self, model: Any, group: dist.ProcessGroup, **options: Any) -> None:
        super().__init__(model, **options)
        self.group = group

    def stats(
        self, hidden_TH: Tensor, target_T: Tensor, *, temperature: float | Tensor = 1.0, **options: Any
    ) -> TokenStats:
        """Statistics of this rank's rows; arguments as for `FusedHead.stats`, with one temperature for all tokens."""
        counts = _counts(len(target_T), self.group, hidden_TH.device)
        first = sum(counts[: dist.get_rank(self.group)])
        everyone_TH = _GatherRows.apply(hidden_TH, counts, self.group)
        target_all_T = torch.cat(_gather(target_T, counts, self.group))
        with torch.autocast(
            hidden_TH.device.type, dtype=torch.bfloat16, enabled=hidden_TH.dtype == torch.bfloat16
        ):  # the master weight is float32
            stats = super().stats(everyone_TH, target_all_T, temperature=temperature, group=self.group, **options)
        fields = stats.as_dict()
        own = _TakeOwn.apply(torch.stack([*fields.values()]), first, counts, self.group)
        # Copies: FSDP hooks itself to what comes out, and warns of views.
        return TokenStats(**{name: row_T.clone() for name, row_T in zip(fields, own, strict=True)})

    def reference_logits(self, hidden_TH: Tensor) -> Tensor:
        """fp32 logits [T, V] of this rank's rows, from all parts of the vocabulary; all ranks call it together."""
        counts = _counts(len(hidden_TH), self.group, hidden_TH.device)
        first = sum(counts[: dist.get_rank(self.group)])
        everyone_TH = torch.cat(_gather(hidden_TH, counts, self.group))
        weight, bias_V = self.head_parameters()
        assert isinstance(weight, DTensor)
        assert bias_V is None, "a sharded head with a bias is refused when it is built"
        own_TV = everyone_TH.float() @ weight.to_local().to(hidden_TH.dtype).float().T
        widths = _counts(own_TV.shape[1], self.group, hidden_TH.device)
        all_VT = torch.cat(_gather(own_TV.T.contiguous(), widths, self.group))
        return all_VT[:, first : first + len(hidden_TH)].T

    def clamped_entropy(self, hidden_TH: Tensor, *, share: float, temperature: float | Tensor = 1.0) -> Tensor:
        """Not there for a sharded vocabulary: the least likely tokens are found among all of it. ValueError."""
        raise ValueError(
            "loss.method = 'aent' needs the whole vocabulary on one rank; switch parallel.vocab_parallel_head off"
        )


@contextmanager
def whole_logits(head: FusedHead) -> Iterator[None]:
    """Inside the block the model's own forward pass has all logits, also of a head that is sharded, whose weight stays
    where it is. No gradients; all ranks enter and leave together."""
    if not isinstance(head, ShardedHead):
        yield
        return
    module = head.model.get_output_embeddings()
    module.forward = lambda hidden: head.reference_logits(hidden.flatten(0, -2)).unflatten(0, hidden.shape[:-1])
    try:
        yield
    finally:
        del module.forward


def _counts(own: int, group: dist.ProcessGroup, device: torch.device) -> list[int]:
    counts = [torch.zeros(1, dtype=torch.int64, device=device) for _ in range(group.size())]
    dist.all_gather(counts, torch.tensor([own], device=device), group=group)
    return [int(count) for count in counts]


def _gather(own: Tensor, counts: list[int], group: dist.ProcessGroup) -> list[Tensor]:
    """Every rank's rows; on the way all are as many as the most."""
    padded = own.new_zeros(max(counts), *own.shape[1:])
    padded[: len(own)] = own
    parts = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(parts, padded, group=group)
    return [part[:count] for part, count in zip(parts, counts, strict=True)]


class _GatherRows(torch.autograd.Function):
    """All ranks' rows, in rank order. The gradient that comes back is complete on every rank: own rows are taken."""

    @staticmethod
    def forward(ctx: Any, own_NH: Tensor, counts: list[int], group: dist.ProcessGroup) -> Tensor:
        first = sum(counts[: dist.get_rank(group)])
        ctx.rows = slice(first, first + len(own_NH))
        return torch.cat(_gather(own_NH, counts, group))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return grads[0][ctx.rows], None, None


class _TakeOwn(torch.autograd.Function):
    """This rank's columns of [K, T]. Backward gathers what every rank asks of its own, so that all ask for the same."""

    @staticmethod
    def forward(ctx: Any, all_KT: Tensor, first: int, counts: list[int], group: dist.ProcessGroup) -> Tensor:
        ctx.counts, ctx.group = counts, group
        return all_KT[:, first : first + counts[dist.get_rank(group)]].clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        parts = _gather(grads[0].T.contiguous(), ctx.counts, ctx.group)
        return torch.cat(parts).T.contiguous(), None, None, None
