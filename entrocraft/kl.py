"""Estimates of KL(pi || ref) from the log-probability of the sampled token, Schulman's three and their corrections.

All are penalties, one number a token, with d = ref_logprob - logprob and the token drawn from pi.
"""

import torch
from torch import Tensor

from entrocraft.registry import resolve

_LIMIT = 20.0
_K3_LIMIT = 10.0


def k1(logprob_T: Tensor, ref_logprob_T: Tensor) -> Tensor:
    """k1 = -d = logprob - ref_logprob, `[T]`, nats: unbiased. Its gradient has mean 0: no penalty when differentiated.

    Aggregation: that of the loss it is added to. Entropy: nothing in expectation, for that reason. Source: Schulman,
    Approximating KL divergence (2020).
    """
    return -_difference(logprob_T, ref_logprob_T)


def k2(logprob_T: Tensor, ref_logprob_T: Tensor) -> Tensor:
    """k2 = d^2 / 2, `[T]`: biased, but its gradient is an unbiased one of the KL.

    Aggregation: as `k1`. Entropy: held up by a reference of higher entropy, without a set-point. Source: as `k1`.
    """
    return 0.5 * _difference(logprob_T, ref_logprob_T).square()


def k3(logprob_T: Tensor, ref_logprob_T: Tensor) -> Tensor:
    """k3 = e^d - d - 1, `[T]`: unbiased, >= 0, of low variance; its gradient is that of the reverse, KL(ref || pi).

    d is clamped to [-20, 20] and the value to 10, as trainers do: beyond, it is biased and has no gradient.
    Aggregation: as `k1`. Entropy: as `k2`. Source: as `k1`; the clamps as in verl.
    """
    d_T = _difference(logprob_T, ref_logprob_T).clamp(-_LIMIT, _LIMIT)
    return (d_T.exp() - d_T - 1.0).clamp(max=_K3_LIMIT)


def k1_plus(logprob_T: Tensor, ref_logprob_T: Tensor) -> Tensor:
    """k1+ = sg[k1 - k2] + k2, `[T]`: the value of k1 with the gradient of k2 (straight-through), both unbiased.

    Aggregation: as `k1`. Entropy: as `k2`. Source: verl.
    """
    return _straight_through(k1(logprob_T, ref_logprob_T), logprob_T, ref_logprob_T)


def k3_plus(logprob_T: Tensor, ref_logprob_T: Tensor) -> Tensor:
    """k3+ = sg[k3 - k2] + k2, `[T]`: the value of k3 with the gradient of k2, which the clamps of k3 leave alone.

    Aggregation: as `k1`. Entropy: as `k2`. Source: verl.
    """
    return _straight_through(k3(logprob_T, ref_logprob_T), logprob_T, ref_logprob_T)


def _straight_through(value_T: Tensor, logprob_T: Tensor, ref_logprob_T: Tensor) -> Tensor:
    """The value of one with the gradient of k2."""
    gradient_T = k2(logprob_T, ref_logprob_T)
    return value_T.detach() + (gradient_T - gradient_T.detach())


ESTIMATORS = {
    "k1": k1,
    "k2": k2,
    "k3": k3,
    "k1+": k1_plus,
    "k3+": k3_plus,
}


def kl(logprob_T: Tensor, ref_logprob_T: Tensor, *, kind: str) -> Tensor:
    """kl_T = k1, k2, k3, k1+ or k3+ of the functions of this module, nats, differentiable in logprob_T alone.

    Aggregation: that of the loss it is added to. Entropy: all but k1 pull the policy towards the reference, and hold
    its entropy up where the reference's is higher, without a set-point; k1 does nothing in expectation. Source:
    Schulman, Approximating KL divergence (2020); k1+ and k3+ as in verl.

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
