"""PolicyObjective: a policy loss with its batch, as the closure that `linear_policy_loss` calls chunk by chunk."""

import math
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate, pairwise

import torch
from torch import Tensor

LossFn = Callable[..., Tensor]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Term:
    """Something that a method adds to the loss: sum over rows of weight_t l_t, `loss_fn` being one of single tokens."""

    loss_fn: Callable[[Tensor, Tensor, Tensor], Tensor]
    """`loss_fn(logprob_N, old_logprob_N, advantage_N) -> loss_N`."""
    advantage_T: Tensor
    """What `loss_fn` gets for an advantage."""
    weight_T: Tensor
    """Weight of each token in this term."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PolicyObjective:
    """The loss of a batch of T packed tokens, of which any run of rows can be asked for its share.

        share(rows) = sum over rows of  weight_t l_t  -  entropy_coefficient sum over rows of  entropy_weight_t H_t
                      + the same sum for each extra term

    `weight_T` and `entropy_weight_T` are constants of the batch, so the shares add up to the same loss and gradient
    however it is cut; between sequences only, for a sequence-level `loss_fn`. Differentiable with respect to logprob
    and entropy.

    Use:
        objective = PolicyObjective(loss_fn=GSPO(), old_logprob_T=..., advantage_T=..., weight_T=..., lengths_R=lengths)
        loss, stats = linear_policy_loss(hidden_TH, weight_VH, target_T, loss=objective, lengths_R=lengths)

    Raises:
        ValueError: shapes that do not fit, a coefficient that is not finite, a sequence-level loss_fn without
            lengths_R.
    """

    loss_fn: LossFn
    """`PPOClip`, `CISPO` or `GSPO`, or another `loss_fn(logprob_N, old_logprob_N, advantage_N) -> loss_N`. One that has
    `sequence_level = True` gets the lengths of its sequences and their mask besides. Its gradient must be 0 where the
    advantage is: what teaches without one is a `Term`."""
    old_logprob_T: Tensor
    """Log-probabilities under the policy at the start of the step, nats."""
    advantage_T: Tensor
    """Advantage of each token."""
    weight_T: Tensor
    """Weight of each token's loss, from `token_weights`; 0 leaves it out, in the backward too, also where what is known
    of it is NaN."""
    lengths_R: Sequence[int] | None = None
    """Tokens of each sequence, in order, as host integers that sum to T; give the same to `linear_policy_loss`."""
    mask_T: Tensor | None = None
    """bool: the tokens a sequence-level ratio is taken over, rejected ones included. None: all of a sequence."""
    entropy_coefficient: float = 0.0
    """What a nat of entropy is worth; negative to lower it."""
    entropy_weight_T: Tensor | None = None
    """Weight of each token's entropy. None: `weight_T`."""
    extra: Sequence[Term] = ()
    """Further terms, of single tokens."""
    clamped_share: float = 0.0
    """Above 0, the entropy that is to be given is that of `kernels.clamped_entropy` with this share (AEnt), which
    `linear_policy_loss` does not have and so refuses."""
    _ends: tuple[int, ...] = field(init=False, repr=False, default=())

    def __post_init__(self) -> None:
        T = len(self.weight_T)
        for name in ("old_logprob_T", "advantage_T", "weight_T", "mask_T", "entropy_weight_T"):
            value_T = getattr(self, name)
            if value_T is not None and value_T.shape != (T,):
                raise ValueError(f"{name} has shape {tuple(value_T.shape)}, expected ({T},) like weight_T")
        if self.mask_T is not None and self.mask_T.dtype != torch.bool:
            raise ValueError(f"mask_T is {self.mask_T.dtype}; expected bool, True where the policy chose the token")
        for number, term in enumerate(self.extra):
            for name in ("advantage_T", "weight_T"):
                if getattr(term, name).shape != (T,):
                    raise ValueError(
                        f"extra[{number}].{name} has shape {tuple(getattr(term, name).shape)}, expected ({T},) like "
                        "weight_T"
                    )
        if not callable(self.loss_fn) or isinstance(self.loss_fn, type):
            raise ValueError(
                f"loss_fn = {self.loss_fn!r}: expected a function of (logprob_N, old_logprob_N, advantage_N), such as "
                "PPOClip(), or by name surrogates.build_loss('gspo')"
            )
        if not math.isfinite(self.entropy_coefficient):
            raise ValueError(
                f"entropy_coefficient = {self.entropy_coefficient!r}: expected a finite number, such as 0.003"
            )
        if self.lengths_R is None:
            if self._sequence_level:
                raise ValueError(
                    f"loss_fn {self.loss_fn!r} is of whole sequences and lengths_R is None; expected the tokens of "
                    "each, as host integers"
                )
            return
        if sum(self.lengths_R) != T or min(self.lengths_R, default=0) < 0:
            raise ValueError(
                f"lengths_R sums to {sum(self.lengths_R)}, the least is {min(self.lengths_R, default=0)}; expected "
                f"lengths >= 0 that sum to {T}, the tokens of weight_T"
            )
        object.__setattr__(self, "_ends", tuple(accumulate(self.lengths_R, initial=0)))

    @property
    def _sequence_level(self) -> bool:
        return getattr(self.loss_fn, "sequence_level", False)

    def __call__(self, logprob_N: Tensor, entropy_N: Tensor, rows: slice) -> Tensor:
        """The share of `rows` in the loss, a tensor of no dimension.

        Raises:
            ValueError: rows that cut a sequence, with a sequence-level loss_fn.
        """
        live_N, mask_N = self._live(rows), None if self.mask_T is None else self.mask_T[rows]
        logprob_N = torch.where(live_N, logprob_N, 0.0)
        old_logprob_N = torch.where(live_N, self.old_logprob_T[rows], 0.0)
        batch = (logprob_N, old_logprob_N, torch.where(live_N, self.advantage_T[rows], 0.0))
        loss_N = self.loss_fn(*batch, self._lengths_of(rows), mask_N) if self._sequence_level else self.loss_fn(*batch)
        share = (self.weight_T[rows] * loss_N).sum()
        if self.entropy_coefficient:
            weight_T = self.weight_T if self.entropy_weight_T is None else self.entropy_weight_T
            paid_N = torch.where(weight_T[rows] != 0, entropy_N, 0.0)
            share = share - self.entropy_coefficient * (weight_T[rows] * paid_N).sum()
        for term in self.extra:
            extra_N = term.loss_fn(logprob_N, old_logprob_N, torch.where(live_N, term.advantage_T[rows], 0.0))
            share = share + (term.weight_T[rows] * extra_N).sum()
        return share

    def _live(self, rows: slice) -> Tensor:
        """bool `[N]`: what a loss may look at; a product with a weight of 0 would keep a NaN."""
        live_N = self.weight_T[rows] != 0
        for term in self.extra:
            live_N = live_N | (term.weight_T[rows] != 0)
        if self._sequence_level:  # a ratio is of all tokens of its sequence
            return torch.ones_like(live_N) if self.mask_T is None else live_N | self.mask_T[rows]
        return live_N

    @property
    def active_T(self) -> Tensor:
        """bool: tokens with a gradient; the others need not be computed."""
        active_T = (self.weight_T != 0) & (self.advantage_T != 0)
        if self.entropy_coefficient:
            active_T |= (self.weight_T if self.entropy_weight_T is None else self.entropy_weight_T) != 0
        for term in self.extra:
            active_T |= term.weight_T != 0
        return active_T

    def take(self, token_N: Tensor, lengths_R: Sequence[int] | None = None) -> "PolicyObjective":
        """The share of the tokens with these int64 indices, in their order; whole sequences of `lengths_R` tokens."""
        picked = {
            name: None if (value_T := getattr(self, name)) is None else value_T[token_N]
            for name in ("old_logprob_T", "advantage_T", "weight_T", "mask_T", "entropy_weight_T")
        }
        extra = tuple(
            Term(loss_fn=term.loss_fn, advantage_T=term.advantage_T[token_N], weight_T=term.weight_T[token_N])
            for term in self.extra
        )
        return replace(self, lengths_R=lengths_R, extra=extra, **picked)

    def to(self, device: torch.device | str) -> "PolicyObjective":
        """The same on another device."""
        moved = {
            name: None if (value_T := getattr(self, name)) is None else value_T.to(device)
            for name in ("old_logprob_T", "advantage_T", "weight_T", "mask_T", "entropy_weight_T")
        }
        extra = tuple(
            Term(loss_fn=term.loss_fn, advantage_T=term.advantage_T.to(device), weight_T=term.weight_T.to(device))
            for term in self.extra
        )
        return replace(self, extra=extra, **moved)

    def clipped(self, logprob_T: Tensor) -> dict[str, Tensor]:
        """What `loss_fn.clipped` says of all tokens, by name, where a token has a weight; empty if it has no such."""
        clipped = getattr(self.loss_fn, "clipped", None)
        if clipped is None:
            return {}
        batch = (logprob_T, self.old_logprob_T, self.advantage_T)
        found = clipped(*batch, self.lengths_R, self.mask_T) if self._sequence_level else clipped(*batch)
        return {name: value_T & (self.weight_T != 0) for name, value_T in found.items()}

    def _lengths_of(self, rows: slice) -> list[int]:
        """The lengths of the sequences that make up these rows."""
        first, last = bisect_left(self._ends, rows.start), bisect_right(self._ends, rows.stop) - 1
        if first == len(self._ends) or self._ends[first] != rows.start or self._ends[last] != rows.stop:
            raise ValueError(
                f"rows {rows.start} to {rows.stop} cut a sequence, whose ratio {self.loss_fn!r} needs whole; give "
                "lengths_R to linear_policy_loss too"
            )
        ends = self._ends[first : last + 1]
        return [end - start for start, end in pairwise(ends)]
