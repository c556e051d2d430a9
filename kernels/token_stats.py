"""TokenStats: what the head says about every token, without the logits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TokenStats:
    """Per-token statistics of the policy p = softmax(z), one entry for each of T packed tokens.

    All fields are tensors [T] of one floating dtype (fp32; fp64 where the operands were fp64) on one device, in
    nats except `p2_T`. A row whose target was `ignore_index` holds 0 in every field.
    Raises ValueError when a field is not [T] or dtypes or devices differ, or only one collision field is given.
    """

    logprob_T: Tensor
    """log p(target); differentiable. Never clamped: a positive value is a bug to be seen."""
    entropy_T: Tensor
    """H = -sum_v p_v log p_v over the whole vocabulary; differentiable."""
    lse_T: Tensor
    """log sum_v exp z_v of the logits after softcap and temperature; differentiable."""
    p2_T: Tensor | None = None
    """sum_v p_v^2 (a probability, no unit); no gradient; only with collision=True."""
    p2logp_T: Tensor | None = None
    """sum_v p_v^2 log p_v; no gradient; only with collision=True."""

    def __post_init__(self) -> None:
        first = self.logprob_T
        if first.dim() != 1 or not first.is_floating_point():
            raise ValueError(
                f"logprob_T is {first.dtype} {tuple(first.shape)}; expected one floating point number per token, [T]"
            )
        if (self.p2_T is None) != (self.p2logp_T is None):
            raise ValueError("p2_T and p2logp_T come together: give both (collision=True) or neither")
        for name in ("entropy_T", "lse_T", "p2_T", "p2logp_T"):
            field = getattr(self, name)
            if field is None:
                continue
            if field.shape != first.shape or field.dtype != first.dtype or field.device != first.device:
                raise ValueError(
                    f"{name} is {field.dtype} {tuple(field.shape)} on {field.device}; expected the same as logprob_T: "
                    f"{first.dtype} {tuple(first.shape)} on {first.device}"
                )

    def __len__(self) -> int:
        """T, the number of tokens."""
        return self.logprob_T.shape[0]

    def detach(self) -> TokenStats:
        """The same numbers, cut from the autograd graph."""
        return self._map(torch.Tensor.detach)

    def index(self, index_T: Tensor) -> TokenStats:
        """The tokens picked by an int64 index or a bool mask; gradients flow back to the picked ones."""
        return self._map(lambda field: field[index_T])

    def to(self, device: torch.device | str) -> TokenStats:
        """The same numbers on another device."""
        return self._map(lambda field: field.to(device))

    @staticmethod
    def cat(parts: Sequence[TokenStats]) -> TokenStats:
        """The tokens of all parts, in order. ValueError when there is none or only some have collision fields."""
        if not parts:
            raise ValueError("parts is empty; expected at least one TokenStats to concatenate")
        if len({part.p2_T is None for part in parts}) > 1:
            raise ValueError("some parts have p2_T and some do not; compute all of them with the same collision=")
        columns = {name: [getattr(part, name) for part in parts] for name in TokenStats.__slots__}
        return TokenStats(**{name: torch.cat(column) for name, column in columns.items() if column[0] is not None})

    def _map(self, change: Callable[[Tensor], Tensor]) -> TokenStats:
        return TokenStats(
            logprob_T=change(self.logprob_T),
            entropy_T=change(self.entropy_T),
            lse_T=change(self.lse_T),
            p2_T=None if self.p2_T is None else change(self.p2_T),
            p2logp_T=None if self.p2logp_T is None else change(self.p2logp_T),
        )
