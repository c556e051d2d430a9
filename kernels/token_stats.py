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
    nats except `p2_T`; `argmax_T` and `top1_T` alone are int64 and bool. A row whose target was `ignore_index` holds 0
    in every field.
    Raises ValueError when a field is not [T] or dtypes or devices differ, or one of a pair is given without the other.
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
    varentropy_T: Tensor | None = None
    """sum_v p_v (log p_v + H)^2, nats squared: how far the surprise spreads; no gradient; only with varentropy=True."""
    argmax_T: Tensor | None = None
    """int64: the most probable token, the lowest id of several; only with argmax=True."""
    top1_T: Tensor | None = None
    """bool: the target is the most probable token; only with argmax=True."""
    clamped_entropy_T: Tensor | None = None
    """H of each row without its least likely tokens; differentiable; of `clamped_entropy`, never of the fused op."""

    def __post_init__(self) -> None:
        first = self.logprob_T
        if first.dim() != 1 or not first.is_floating_point():
            raise ValueError(
                f"logprob_T is {first.dtype} {tuple(first.shape)}; expected one floating point number per token, [T]"
            )
        for one, other, option in (("p2_T", "p2logp_T", "collision"), ("argmax_T", "top1_T", "argmax")):
            if (getattr(self, one) is None) != (getattr(self, other) is None):
                raise ValueError(f"{one} and {other} come together: give both ({option}=True) or neither")
        dtypes = {"argmax_T": torch.int64, "top1_T": torch.bool}
        for name, field in self.as_dict().items():
            dtype = dtypes.get(name, first.dtype)
            if field.shape != first.shape or field.dtype != dtype or field.device != first.device:
                raise ValueError(
                    f"{name} is {field.dtype} {tuple(field.shape)} on {field.device}; expected {dtype} "
                    f"{tuple(first.shape)} on {first.device}, as many tokens as logprob_T ({first.dtype}) has"
                )

    @property
    def z_loss_T(self) -> Tensor:
        """lse^2, which keeps logits from drifting; differentiable. Times 1e-4 in PaLM (arXiv 2204.02311, section 5)."""
        return self.lse_T * self.lse_T

    def __len__(self) -> int:
        """T, the number of tokens."""
        return self.logprob_T.shape[0]

    def as_dict(self) -> dict[str, Tensor]:
        """The fields that are there, by name."""
        fields = {name: getattr(self, name) for name in self.__slots__}
        return {name: field for name, field in fields.items() if field is not None}

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
        """The tokens of all parts, in order. ValueError when there is none or only some have an optional field."""
        if not parts:
            raise ValueError("parts is empty; expected at least one TokenStats to concatenate")
        columns = [part.as_dict() for part in parts]
        for name in TokenStats.__slots__:
            if len({name in column for column in columns}) > 1:
                raise ValueError(f"some parts have {name} and some do not; compute all of them with the same options")
        return TokenStats(**{name: torch.cat([column[name] for column in columns]) for name in columns[0]})

    def _map(self, change: Callable[[Tensor], Tensor]) -> TokenStats:
        return TokenStats(**{name: change(field) for name, field in self.as_dict().items()})
