"""How much an update would change the entropy, to first order, from four numbers a token.

Push the logits z of one row, p = softmax(z / tau), along the gradient of the log-probability of token y. With
H the entropy of p, the entropy discriminator of token i is

    S_i = p_i (log p_i + H)             dH / dz_i = -S_i / tau
    S_bar = sum_i p_i S_i = sum p^2 log p + H sum p^2

and one gradient step of unit size on a loss L that sees the row through log p_y alone changes its entropy by

    dL/dlog p_y (S_y - S_bar) / tau^2

For plain policy gradient, dL/dlog p_y = -A / N: rewarding a token with S_y > S_bar, one that is likelier than the
policy is on average, lowers entropy; rewarding an unlikely one raises it. E_p[S_y - S_bar] = 0: only advantages
that go with S move the entropy of a policy in expectation.

Exact for a row of independent logits. Rows coupled through shared weights, the optimizer's scaling and re-used
batches go into one number learnt online, `Gain`.

Source: the theorem of arXiv 2604.26326 in the closed form of this project; the same S appears in arXiv 2602.03392.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from entrocraft.batch import Batch, masked, per_rollout
from entrocraft.kernels.token_stats import TokenStats

LossFn = Callable[[Tensor], Tensor]

# Below this a predicted change is rounding, and realised / predicted would be a ratio of noise.
_SMALLEST_PREDICTION = 1e-9
_SMALLEST_GAIN = 1e-3


def entropy_discriminator(stats: TokenStats) -> tuple[Tensor, Tensor]:
    """`S_T = p (log p + H)` of the sampled token and `Sbar_T = sum p^2 log p + H sum p^2`, nats, without gradient.

    Entropy: rewarding a token with S above Sbar lowers it, one below raises it. Source: arXiv 2602.03392 has the same
    S; the closed form of its mean is this project's.

    Raises:
        ValueError: the statistics lack p2_T and p2logp_T.
    """
    if stats.p2_T is None or stats.p2logp_T is None:
        raise ValueError(
            "stats has no p2_T and p2logp_T, which the predicted entropy change needs: score the tokens with "
            "collision=True"
        )
    logprob_T, entropy_T = stats.logprob_T.detach(), stats.entropy_T.detach()
    # A token the policy cannot emit: p log p -> 0, where 0 * -inf would be NaN. NaN itself stays NaN.
    s_T = (logprob_T.clamp(min=torch.finfo(logprob_T.dtype).min) + entropy_T).mul_(logprob_T.exp())
    return s_T, stats.p2logp_T.detach() + entropy_T * stats.p2_T.detach()


def predicted_entropy_change(stats: TokenStats, loss_fn: LossFn, *, temperature: float | Tensor = 1.0) -> Tensor:
    """change_T = dL/dlogprob_T (S_T - Sbar_T) / temperature^2, in nats for a gradient step of unit size on the logits.

    Entropy: measured, not moved; the sum is the predicted change of the batch's. Ratios, clipping, masks, averaging and
    importance weights are in it because they are in L: a token whose gradient a clip removed predicts exactly 0.

    So is the denominator of L: a sum over a part of the tokens is the change of an update on that part only if L
    keeps its denominator without the others. `token_mean` does, `kept_tokens` and `eq5` do not
    (`losses.KEPT_DENOMINATORS`). Source: the theorem of arXiv 2604.26326 in the closed form of this project.

    Args:
        stats: of the policy that is scored, with p2_T and p2logp_T.
        loss_fn: logprob_T, a leaf that requires grad, to the scalar loss L; any differentiable loss.
        temperature: > 0, scalar or `[T]`; what the logits were divided by.

    Returns:
        change_T in the dtype of the statistics, on their device, without gradient.

    Raises:
        ValueError: temperature <= 0, statistics without p2, or a loss that is no scalar or ignores logprob_T.
    """
    check_temperature(temperature, len(stats.logprob_T))
    s_T, sbar_T = entropy_discriminator(stats)
    return change_from_gradient(loss_gradient(stats.logprob_T, loss_fn), s_T, sbar_T, temperature)


def change_from_gradient(gradient_T: Tensor, s_T: Tensor, sbar_T: Tensor, temperature: float | Tensor) -> Tensor:
    """gradient_T (S_T - Sbar_T) / temperature^2, where gradient_T is dL/dlogprob_T."""
    change_T = (s_T - sbar_T).mul_(gradient_T)
    if isinstance(temperature, Tensor):
        return change_T / temperature.detach().to(change_T) ** 2
    return change_T if temperature == 1.0 else change_T / temperature**2


def loss_gradient(logprob_T: Tensor, loss_fn: LossFn) -> Tensor:
    """dL/dlogprob_T of the scalar `loss_fn(logprob_T)`; errors as `predicted_entropy_change`."""
    if torch.is_inference_mode_enabled():
        raise ValueError("loss_fn has no gradient within torch.inference_mode(): use torch.no_grad() around this call")
    with torch.enable_grad():
        leaf_T = logprob_T.detach().clone().requires_grad_(True)
        loss = loss_fn(leaf_T)
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            what = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else repr(loss)
            raise ValueError(f"loss_fn returned {what}: expected one scalar tensor, the loss of the whole batch")
        if not loss.requires_grad:
            raise ValueError("loss_fn returned a loss that does not depend on the logprob_T it was given")
        (gradient_T,) = torch.autograd.grad(loss, leaf_T, allow_unused=True)
    if gradient_T is None:
        raise ValueError("loss_fn returned a loss that does not depend on the logprob_T it was given")
    return gradient_T


def check_temperature(temperature: float | Tensor, tokens: int) -> None:
    """Raise ValueError unless temperature is > 0 and finite, and a scalar or of shape `(tokens,)`."""
    if isinstance(temperature, Tensor):
        if temperature.ndim and temperature.shape != (tokens,):
            raise ValueError(
                f"temperature has shape {tuple(temperature.shape)}: expected a scalar or one for each of "
                f"{tokens} tokens"
            )
        worst = float(temperature.detach().min()) if temperature.numel() else 1.0
        finite = bool(torch.isfinite(temperature).all())
    else:
        worst, finite = temperature, math.isfinite(temperature)
    if not finite or not worst > 0:
        raise ValueError(f"temperature = {worst!r}: expected > 0 and finite; sampling used 1.0 unless told otherwise")


@dataclass(frozen=True, slots=True, eq=False)
class BatchChange:
    """The predicted change of a batch on the host, NumPy: of each token (0 outside the mask), summed by rollout."""

    change_T: np.ndarray
    change_R: np.ndarray

    @staticmethod
    def of(
        stats: TokenStats,
        batch: Batch,
        *,
        advantage_R: np.ndarray,
        loss_fn: LossFn | None,
        temperature: float | Tensor,
    ) -> "BatchChange | None":
        """Under `loss_fn`, or if it is None under plain policy gradient with `advantage_R`, token mean.

        None where the statistics lack p2_T. Raises ValueError where the prediction is not finite.
        """
        if stats.p2_T is None:
            return None
        if loss_fn is not None:
            change = predicted_entropy_change(stats, loss_fn, temperature=temperature)
        else:
            s_T, sbar_T = entropy_discriminator(stats)
            # The gradient of -sum(mask A logprob) / sum(mask), written down.
            gradient_R = torch.as_tensor(-advantage_R / len(batch.entropy_N), dtype=s_T.dtype, device=s_T.device)
            rollout_T = torch.as_tensor(batch.rollout_T, device=s_T.device)
            change = change_from_gradient(gradient_R[rollout_T], s_T, sbar_T, temperature)
        change_T = masked(change.to(torch.promote_types(change.dtype, torch.float32)).cpu().numpy(), batch.mask_T)
        change_R = per_rollout(change_T, batch.rollout_T, len(batch.group_R))
        if not np.isfinite(change_R).all():
            raise ValueError(
                "the predicted entropy change is not finite: loss_fn's gradient or the statistics hold NaN or inf"
            )
        return BatchChange(change_T, change_R)

    def kept(
        self,
        keep_R: np.ndarray,
        keep_T: np.ndarray | None,
        rollout_T: np.ndarray,
        weight_R: np.ndarray | None = None,
    ) -> float:
        """Sum over the kept rollouts, or the kept tokens where single tokens were judged, each times its weight."""
        kept_R = self.change_R * keep_R
        if keep_T is not None:
            kept_R = per_rollout(masked(self.change_T, keep_T), rollout_T, len(keep_R))
        return math.fsum(kept_R if weight_R is None else kept_R * weight_R)


@dataclass(frozen=True, slots=True, kw_only=True)
class Gain:
    """Realised over predicted entropy change, learnt online as a regression through the origin.

        value = EMA(realised predicted) / EMA(predicted^2)

    While the numerator is <= 0 the value fades by `ema` a step instead: a negative gain would turn control around on
    noise, and one that stood still where it is too large would leave control believing that a little is enough while
    the entropy goes elsewhere. Never below 1e-3, and blind to predictions of at most 1e-9. Source: this project.

    value: where it stands; ema: weight of the past in each average, in [0, 1); numerator, denominator: the averages.
    """

    value: float = 10.0
    ema: float = 0.9
    numerator: float = 0.0
    denominator: float = 0.0

    def __post_init__(self) -> None:
        if not 0.0 < self.value < math.inf:
            raise ValueError(f"initial_gain = {self.value!r}: expected finite and > 0, such as 10.0")
        if not 0.0 <= self.ema < 1.0:
            raise ValueError(f"ema = {self.ema!r}: expected 0 <= ema < 1, the weight of the past, such as 0.9")

    def updated(self, realised: float, predicted: float) -> "Gain":
        """The gain after one more step: `realised` nats came of a prediction of `predicted`."""
        if not (math.isfinite(realised) and math.isfinite(predicted) and abs(predicted) > _SMALLEST_PREDICTION):
            return self
        numerator = self.ema * self.numerator + (1.0 - self.ema) * realised * predicted
        denominator = self.ema * self.denominator + (1.0 - self.ema) * predicted**2
        value = numerator / denominator if numerator > 0 else self.ema * self.value
        return replace(self, value=max(value, _SMALLEST_GAIN), numerator=numerator, denominator=denominator)
