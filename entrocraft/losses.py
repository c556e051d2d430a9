"""The clipped policy loss of one token, and the weights that make one number of many tokens.

The two are apart on purpose: `weight_T` is computed once for the whole batch, so
`sum_T weight_T * loss_T` gives the same loss and gradient however the batch is cut into micro-batches.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from entrocraft.registry import resolve
from entrocraft.rollouts import check_packing

# exp(20) is finite in fp32 with room for a product; ratios that far off carry no information anyway.
LOG_RATIO_LIMIT = 20.0

# Aggregations whose denominator depends on what is kept: changes predicted with everything kept do not add up there.
KEPT_DENOMINATORS = ("kept_tokens", "eq5")


@dataclass(frozen=True, slots=True, kw_only=True)
class PPOClip:
    """The clipped surrogate of PPO with dual clip, to be minimised, token by token.

        r = exp(clamp(logprob - old_logprob, -20, 20))
        l = max(-r A, -clip(r, 1 - clip_low, 1 + clip_high) A)
        l = min(l, -dual_clip A)      where A < 0

    The gradient is that of `-r A`, and 0 where a clip binds: `A > 0, r > 1 + clip_high`; `A < 0, r < 1 - clip_low`;
    `A < 0, r > dual_clip`. The clamp removes it too, beyond a log-ratio of -20 or 20. At r = 1 it is the plain policy
    gradient, `-A`.

    clip_low, clip_high: 0 < clip_low <= 1, clip_high > 0; 0.2 and 0.2 (0.2 and 0.28 is Clip-Higher).
    dual_clip: > 1, or None for none.

    Aggregation: any; verl's default is `token_mean`. Entropy: at r = 1 what the advantages do, no set-point. On re-used
    batches the upper clip silences rare tokens of good rollouts that rise, which lowers entropy, and the lower one rare
    tokens of bad ones that fall, which raises it: seen in small simulations, not proved.

    Source: Schulman et al. (arXiv 1707.06347); dual clip: Ye et al. (arXiv 1912.09729).
    """

    clip_low: float = 0.2
    clip_high: float = 0.2
    dual_clip: float | None = 3.0

    def __post_init__(self) -> None:
        if not 0.0 < self.clip_low <= 1.0:
            raise ValueError(f"clip_low = {self.clip_low!r}: expected 0 < clip_low <= 1, such as 0.2")
        if not 0.0 < self.clip_high < math.inf:
            raise ValueError(f"clip_high = {self.clip_high!r}: expected a finite clip_high > 0, such as 0.2")
        if self.dual_clip is not None and not 1.0 < self.dual_clip < math.inf:
            raise ValueError(f"dual_clip = {self.dual_clip!r}: expected > 1, such as 3.0, or None for no dual clip")

    def __call__(self, logprob_T: Tensor, old_logprob_T: Tensor, advantage_T: Tensor) -> Tensor:
        """loss_T, differentiable with respect to logprob_T alone; in the widest dtype of the three arguments.

        Computed in that dtype: give fp32, in which a ratio near 1 is exact to 1e-7, rather than bf16 (4e-3).

        Args:
            logprob_T: log-probabilities under the policy being trained.
            old_logprob_T: under the policy at the start of the step.
            advantage_T: advantage of each token.

        Raises:
            ValueError: shapes differ.
        """
        ratio_T = self._ratio(logprob_T, old_logprob_T, advantage_T)
        advantage_T = advantage_T.detach()
        clipped_T = ratio_T.clamp(1.0 - self.clip_low, 1.0 + self.clip_high)
        loss_T = torch.maximum(-ratio_T * advantage_T, -clipped_T * advantage_T)
        if self.dual_clip is None:
            return loss_T
        return torch.where(advantage_T < 0, torch.minimum(loss_T, -self.dual_clip * advantage_T), loss_T)

    def clipped(self, logprob_T: Tensor, old_logprob_T: Tensor, advantage_T: Tensor) -> dict[str, Tensor]:
        """Where the gradient has been removed though A is not 0, as bool `[T]`; the three do not overlap.

        "high": A > 0, r above its clip. "low": A < 0, r below its clip. "dual": A < 0, r above dual_clip. What the
        clamp alone removes counts where it lies: log-ratio below -20 as "low", above 20 as "high" or (A < 0) "dual".
        """
        with torch.no_grad():
            ratio_T = self._ratio(logprob_T, old_logprob_T, advantage_T)
            log_ratio_T = logprob_T - old_logprob_T
            under_T, over_T = log_ratio_T < -LOG_RATIO_LIMIT, log_ratio_T > LOG_RATIO_LIMIT
            limit = math.inf if self.dual_clip is None else self.dual_clip
            positive_T, negative_T = advantage_T > 0, advantage_T < 0
            return {
                "high": positive_T & ((ratio_T > 1.0 + self.clip_high) | over_T),
                "low": (negative_T & (ratio_T < 1.0 - self.clip_low)) | ((advantage_T != 0) & under_T),
                "dual": negative_T & ((ratio_T > limit) | over_T),
            }

    @staticmethod
    def _ratio(logprob_T: Tensor, old_logprob_T: Tensor, advantage_T: Tensor) -> Tensor:
        log_ratio_T = checked_log_ratio(logprob_T, old_logprob_T, advantage_T)
        return log_ratio_T.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()


def checked_log_ratio(logprob_T: Tensor, old_logprob_T: Tensor, advantage_T: Tensor) -> Tensor:
    """logprob - old_logprob of each token, differentiable with respect to the first alone.

    Raises:
        ValueError: shapes differ.
    """
    for name, value_T in (("old_logprob_T", old_logprob_T), ("advantage_T", advantage_T)):
        if value_T.shape != logprob_T.shape:
            raise ValueError(
                f"{name} has shape {tuple(value_T.shape)}, expected {tuple(logprob_T.shape)} like logprob_T"
            )
    return logprob_T - old_logprob_T.detach()


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """What an aggregation may need to know of the batch; counts are integers, so exact on any device.

    An aggregation of your own is a function of it that returns fp64 `[T]`: what the loss of each token is multiplied
    by, where it is kept; `token_weights` gives 0 to the others.

    counted_T: bool, the mask, tokens of the loss, rejected ones included. kept_T: bool, those of them that are kept.
    rollout_T, group_R, advantage_R, scale: as `token_weights`.
    """

    rollout_T: Tensor
    group_R: Tensor
    counted_T: Tensor
    kept_T: Tensor
    advantage_R: Tensor | None
    scale: float | None

    def per_rollout(self, flag_T: Tensor) -> Tensor:
        """int64 `[R]`: flagged tokens of each rollout."""
        return torch.bincount(self.rollout_T[flag_T], minlength=len(self.group_R))


def _token_mean(layout: Layout) -> Tensor:
    return _constant(layout, int(layout.counted_T.sum()))


def _kept_tokens(layout: Layout) -> Tensor:
    return _constant(layout, int(layout.kept_T.sum()))


def _seq_mean_token_sum(layout: Layout) -> Tensor:
    return _constant(layout, int((layout.per_rollout(layout.counted_T) > 0).sum()))


def _seq_mean_token_mean(layout: Layout) -> Tensor:
    length_R = layout.per_rollout(layout.counted_T)
    sequences = (length_R > 0).sum().clamp(min=1)
    return (1.0 / (length_R.clamp(min=1).double() * sequences))[layout.rollout_T]


def _seq_mean_token_sum_norm(layout: Layout) -> Tensor:
    sequences = int((layout.per_rollout(layout.counted_T) > 0).sum())
    if layout.scale is not None:
        return _constant(layout, layout.scale * sequences)
    length_R = torch.bincount(layout.rollout_T, minlength=len(layout.group_R))
    return _constant(layout, int(length_R.max()) * sequences if len(length_R) else 0)


def _fixed(layout: Layout) -> Tensor:
    if layout.scale is None:
        raise ValueError(
            "aggregation 'fixed' needs scale, the constant to divide by: prompts x rollouts per prompt x longest "
            "response allowed (tokens)"
        )
    return _constant(layout, layout.scale)


def _eq5(layout: Layout) -> Tensor:
    if layout.advantage_R is None:
        raise ValueError(
            "aggregation 'eq5' needs advantage_R: it divides by the kept rollouts of a prompt that have an advantage"
        )
    member_R = (layout.per_rollout(layout.kept_T) > 0) & (layout.advantage_R != 0)
    _, index_R = torch.unique(layout.group_R, return_inverse=True)
    size_P = torch.bincount(index_R[member_R], minlength=len(layout.group_R))
    groups = (size_P > 0).sum().clamp(min=1)
    weight_R = member_R.double() / (size_P.clamp(min=1)[index_R] * groups)
    return weight_R[layout.rollout_T]


def _constant(layout: Layout, denominator: float) -> Tensor:
    # No token to count means no weight to give: the zero below is multiplied away by kept_T, it never shows.
    value = 1.0 / denominator if denominator else 0.0
    return torch.full(layout.rollout_T.shape, value, dtype=torch.float64, device=layout.rollout_T.device)


AGGREGATIONS: dict[str, Callable[[Layout], Tensor]] = {
    "token_mean": _token_mean,
    "all_tokens": _token_mean,
    "kept_tokens": _kept_tokens,
    "seq_mean_token_sum": _seq_mean_token_sum,
    "seq_mean_token_mean": _seq_mean_token_mean,
    "seq_mean_token_sum_norm": _seq_mean_token_sum_norm,
    "fixed": _fixed,
    "eq5": _eq5,
}


def token_weights(
    rollout_T: Tensor,
    mask_T: Tensor,
    group_R: Tensor,
    *,
    aggregation: str,
    keep_T: Tensor | None = None,
    advantage_R: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """weight_T, fp32, such that the loss of the batch is `(weight_T * loss_T).sum()` under any micro-batch split.

    With M the mask, K the kept tokens, |y| the counted tokens of a rollout, sums over i (rollouts) and t (tokens):

    =========================  ================================================================================
    token_mean, all_tokens     sum M K l / sum M: rejected tokens stay in the denominator (the released code)
    kept_tokens                sum M K l / sum M K
    seq_mean_token_sum         mean over rollouts with a counted token, rejected ones included, of sum_t M K l
    seq_mean_token_mean        the same mean of sum_t M K l / |y|
    seq_mean_token_sum_norm    seq_mean_token_sum / scale; scale defaults to the longest response of the batch
    fixed                      sum M K l / scale, scale required: prompts x rollouts x longest allowed response
    eq5                        mean over groups with |S_x| > 0 of sum over S_x of sum_t M K l / |S_x|, where S_x
                               are the kept rollouts of prompt x whose advantage is not 0
    =========================  ================================================================================

    Masking a rollout out and giving it advantage 0 differ in these denominators and nowhere else. A batch with
    nothing kept has weights 0. Not differentiable. Entropy: nothing by itself; the weights say whose tokens move it,
    and whether a step shrinks with what is rejected (`token_mean`) or not (`kept_tokens`, `eq5`).

    Source: the modes of verl 0.9.1 (before, its seq_mean_token_sum_norm did not divide by the rollouts); eq5 is
    Equation 5 of arXiv 2604.26326, with zero-advantage rollouts left out of |S_x| (they contribute nothing, and would
    dilute the mean); fixed is Dr. GRPO's (arXiv 2503.20783).

    Args:
        rollout_T: int64 `[T]`, non-decreasing. mask_T: bool `[T]`. group_R: int64 `[R]`.
        keep_T: bool `[T]` of a `Decision`; None keeps all.
        advantage_R: fp32 `[R]` of the same `Decision`; needed by eq5.
        scale: > 0, in tokens; aggregations without one do not read it.
        aggregation: a name above, or the import path `package.module:name` of a function of a `Layout`.

    Raises:
        ValueError: unknown aggregation, a missing argument, shapes that do not fit.
    """
    check_packing(rollout_T, mask_T, len(group_R))
    if keep_T is not None and (keep_T.shape != rollout_T.shape or keep_T.dtype != torch.bool):
        raise ValueError(
            f"keep_T must be bool of shape {tuple(rollout_T.shape)}, like rollout_T; "
            f"got shape {tuple(keep_T.shape)} {keep_T.dtype}"
        )
    if advantage_R is not None and advantage_R.shape != group_R.shape:
        raise ValueError(
            f"advantage_R has shape {tuple(advantage_R.shape)}, expected {tuple(group_R.shape)} like group_R"
        )
    if scale is not None and not 0.0 < scale < math.inf:
        raise ValueError(f"scale = {scale!r}: expected a finite number of tokens > 0")
    aggregate = resolve(AGGREGATIONS, aggregation, "aggregation")
    kept_T = mask_T if keep_T is None else mask_T & keep_T
    layout = Layout(
        rollout_T=rollout_T,
        group_R=group_R,
        counted_T=mask_T,
        kept_T=kept_T,
        advantage_R=advantage_R,
        scale=scale,
    )
    return (aggregate(layout) * kept_T).float()
