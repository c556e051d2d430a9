"""Estimates of KL(pi || ref) from the log-probability of the sampled token, Schulman's three and their corrections.

With d = ref_logprob - logprob and the token drawn from pi:

    k1 = -d            unbiased; its gradient has mean 0: no penalty at all when it is differentiated
    k2 = d^2 / 2       biased; its gradient is an unbiased one of the KL
    k3 = e^d - d - 1   unbiased, >= 0, low variance; its gradient is that of the reverse, KL(ref || pi)
    k1+, k3+           the value of k1 or k3 with the gradient of k2 (straight-through): both unbiased

In k3 alone d is clamped to [-20, 20] and the value to 10, as trainers do: beyond, k3 is biased and has no gradient
(k3+ keeps that of k2). Entropy: a penalty towards a
reference of higher entropy holds the policy's up, without a set-point.

Source: Schulman, Approximating KL divergence (2020); straight-through as in verl.
"""

import torch
from torch import Tensor

from entrocraft.registry import resolve

_LIMIT = 20.0
_K3_LIMIT = 10.0


def k1(logprob_T: Tensor, ref_logprob_T: Tensor) -> Tensor:
    """logprob - ref_logprob, `[T]`, nats."""
    return -_difference(logprob_T, ref_logprob_T)


def k2(logprob_T: Tensor, ref_logprob_T: Tensor) -> Tensor:
    """(logprob - ref_logprob)^2 / 2, `[T]`."""
    return 0.5 * _difference(logprob_T, ref_logprob_T).square()


def k3(logprob_T: Tensor, ref_logprob_T: Tensor) -> Tensor:
    """e^d - d - 1 with d = ref_logprob - logprob in [-20, 20], at most 10, `[T]`."""
    d_T = _difference(logprob_T, ref_logprob_T).clamp(-_LIMIT, _LIMIT)
    return (d_T.exp() - d_T - 1.0).clamp(max=_K3_LIMIT)


def _straight_through(value_T: Tensor, logprob_T: Tensor, ref_logprob_T: Tensor) -> Tensor:
    """The value of one with the gradient of k2."""
    gradient_T = k2(logprob_T, ref_logprob_T)
    return value_T.detach() + (gradient_T - gradient_T.detach())


ESTIMATORS = {
    "k1": k1,
    "k2": k2,
    "k3": k3,
    "k1+": lambda logprob_T, ref_logprob_T: _straight_through(k1(logprob_T, ref_logprob_T), logprob_T, ref_logprob_T),
    "k3+": lambda logprob_T, ref_logprob_T: _straight_through(k3(logprob_T, ref_logprob_T), logprob_T, ref_logprob_T),
}


def kl(logprob_T: Tensor, ref_logprob_T: Tensor, *, kind: str) -> Tensor:
    """kl_T, nats, differentiable with respect to logprob_T alone.

    Args:
        logprob_T: of the sampled tokens under the policy. ref_logprob_T: under the reference.
        kind: "k1", "k2", "k3", "k1+" or "k3+", or the import path `package.module:name` of a function of these two.

    Raises:
        ValueError: unknown kind, shapes that differ.
    """
    return resolve(ESTIMATORS, kind, "KL estimator")(logprob_T, ref_logprob_T)


def _difference(logprob_T: Tensor, ref_logprob_T: Tensor) -> Tensor:
    if ref_logprob_T.shape != logprob_T.shape:
        raise ValueError(
            f"ref_logprob_T has shape {tuple(ref_logprob_T.shape)}, expected {tuple(logprob_T.shape)} like logprob_T"
        )
    return torch.sub(ref_logprob_T.detach(), logprob_T)
