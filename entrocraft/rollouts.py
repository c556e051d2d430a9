"""Rollouts: what a sampler hands to the trainer, as one frozen packed value."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def check_packing(rollout_T: Tensor, mask_T: Tensor | None, rollouts: int) -> None:
    """Check the packed layout that every function on tokens shares.

    rollout_T: int64 `[T]`, non-decreasing, each in `[0, rollouts)`; mask_T: bool `[T]` or None.

    Raises:
        ValueError: naming the argument, what it held and what was expected.
    """
    _require(
        rollout_T.ndim == 1 and rollout_T.dtype == torch.int64,
        f"rollout_T must be one-dimensional int64, got shape {tuple(rollout_T.shape)} {rollout_T.dtype}",
    )
    if mask_T is not None:
        _require(
            mask_T.shape == rollout_T.shape and mask_T.dtype == torch.bool,
            f"mask_T must be bool of shape {tuple(rollout_T.shape)}, like rollout_T; "
            f"got shape {tuple(mask_T.shape)} {mask_T.dtype}",
        )
    if len(rollout_T) == 0:
        return
    _require(
        bool((rollout_T[1:] >= rollout_T[:-1]).all()),
        "rollout_T must not decrease: pack the tokens of one rollout next to each other, in rollout order",
    )
    first, last = int(rollout_T[0]), int(rollout_T[-1])
    _require(
        first >= 0 and last < rollouts,
        f"rollout_T must lie in [0, R) = [0, {rollouts}), got values from {first} to {last}",
    )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Rollouts:
    """R sampled responses to P prompts, their T response tokens packed end to end.

    token_T: int64 response tokens (prompts are in `prompts`, nowhere else).
    rollout_T: int64, non-decreasing; whose token it is. A rollout may have no token.
    mask_T: bool; True where the policy chose the token and the loss counts it (tool output: False).
    group_R: int64 index into `prompts`; the rollouts of one group are compared with one another.
    sample_R: int64 number of the rollout within its group; (group, sample) names a rollout for good,
        however rollouts are ordered or spread over processes.
    prompts: P tuples of token ids.
    truncated_R: bool; the length limit ended it.
    weight_version: number of optimizer steps behind the weights that sampled.
    sampler_logprob_T: fp32 log-probabilities as the sampler computed them, or None.

    Raises:
        ValueError: a shape, dtype, order or index that does not fit, by name.
    """

    token_T: Tensor
    rollout_T: Tensor
    mask_T: Tensor
    group_R: Tensor
    sample_R: Tensor
    prompts: tuple[tuple[int, ...], ...]
    truncated_R: Tensor
    weight_version: int
    sampler_logprob_T: Tensor | None = None

    def __post_init__(self) -> None:
        check_packing(self.rollout_T, self.mask_T, self.R)
        _require(
            self.token_T.shape == self.rollout_T.shape and self.token_T.dtype == torch.int64,
            f"token_T must be int64 of shape {tuple(self.rollout_T.shape)}, like rollout_T; "
            f"got shape {tuple(self.token_T.shape)} {self.token_T.dtype}",
        )
        for name, dtype in (("group_R", torch.int64), ("sample_R", torch.int64), ("truncated_R", torch.bool)):
            value = getattr(self, name)
            _require(
                value.shape == (self.R,) and value.dtype == dtype,
                f"{name} must be {dtype} of shape ({self.R},), like group_R; "
                f"got shape {tuple(value.shape)} {value.dtype}",
            )
        self._check_values()

    def _check_values(self) -> None:
        if self.R:
            low, high = int(self.group_R.min()), int(self.group_R.max())
            _require(
                low >= 0 and high < self.P,
                f"group_R must index prompts, so lie in [0, {self.P}); got values from {low} to {high}",
            )
            _require(int(self.sample_R.min()) >= 0, f"sample_R must be >= 0, got {int(self.sample_R.min())}")
            names = torch.stack((self.group_R, self.sample_R))
            _require(
                torch.unique(names, dim=1).shape[1] == self.R,
                "(group_R, sample_R) must name each rollout once; number the samples of a group 0, 1, 2, ...",
            )
        _require(self.weight_version >= 0, f"weight_version must be >= 0 steps, got {self.weight_version!r}")
        logprob_T = self.sampler_logprob_T
        if logprob_T is not None:
            _require(
                logprob_T.shape == self.rollout_T.shape and logprob_T.dtype == torch.float32,
                f"sampler_logprob_T must be float32 of shape {tuple(self.rollout_T.shape)}, like rollout_T; "
                f"got shape {tuple(logprob_T.shape)} {logprob_T.dtype}",
            )

    @property
    def T(self) -> int:
        """Number of response tokens, masked ones included."""
        return len(self.token_T)

    @property
    def R(self) -> int:
        """Number of rollouts."""
        return self.group_R.shape[0]

    @property
    def P(self) -> int:
        """Number of prompts."""
        return len(self.prompts)

    @property
    def length_R(self) -> Tensor:
        """int64 `[R]`: response tokens of each rollout, masked ones included."""
        return torch.bincount(self.rollout_T, minlength=self.R)

    def select(self, keep_R: Tensor) -> "Rollouts":
        """The rollouts where the bool `keep_R` is True, renumbered from 0; groups, samples and prompts stay.

        Raises:
            ValueError: keep_R is not bool of shape `(R,)`.
        """
        _require(
            keep_R.shape == (self.R,) and keep_R.dtype == torch.bool,
            f"keep_R must be bool of shape ({self.R},), got shape {tuple(keep_R.shape)} {keep_R.dtype}",
        )
        keep_T = keep_R[self.rollout_T]
        renumbered_R = torch.cumsum(keep_R, 0) - 1
        logprob_T = self.sampler_logprob_T
        return replace(
            self,
            token_T=self.token_T[keep_T],
            rollout_T=renumbered_R[self.rollout_T[keep_T]],
            mask_T=self.mask_T[keep_T],
            group_R=self.group_R[keep_R],
            sample_R=self.sample_R[keep_R],
            truncated_R=self.truncated_R[keep_R],
            sampler_logprob_T=None if logprob_T is None else logprob_T[keep_T],
        )
