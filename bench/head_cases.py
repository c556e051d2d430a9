"""What the head's benchmarks share: operands as peaked as a language model's, its modes, errors against fp64."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from entrocraft.kernels import TokenStats, linear_logprob_entropy, linear_policy_loss

# T, H, V.
SHAPES = {
    "least": (40, 32, 300),  # for Triton's interpreter
    "tiny": (256, 64, 2_000),
    "qwen3_4b": (16_384, 2_560, 151_936),
    "llama31_8b": (16_384, 4_096, 128_256),
}
# Products of 2 T V H operations that a mode takes, forward and backward.
PRODUCTS = {"statistics": 1, "recompute": 4, "cache": 3, "policy_loss": 3, "frozen": 2, "frozen_entropy": 3}


class Case(NamedTuple):
    """Operands of a head and upstream gradients of its log-probabilities and entropies."""

    hidden_TH: Tensor
    weight_VH: Tensor
    target_T: Tensor
    grad_logprob_T: Tensor
    grad_entropy_T: Tensor


def make_case(T: int, H: int, V: int, *, device: str, dtype: torch.dtype, zero_rows: float = 0.0) -> Case:
    """Rows whose entropy is 0.3 to 1.5 nats at large V; a share of them, at random, without an upstream gradient.

    weight ~ N(0, 1/H), hidden = 20 weight[y] + noise, and half of the targets are another token than the one a row
    peaks at. hidden and weight require gradients.
    """
    torch.manual_seed(T + V)
    weight_VH = torch.randn(V, H, device=device).div_(H**0.5)
    target_T = torch.randint(0, V, (T,), device=device)
    hidden_TH = torch.randn(T, H, device=device).mul_(1.8).add_(weight_VH[target_T], alpha=20.0)
    target_T[::2] = torch.randint(0, V, (len(target_T[::2]),), device=device)
    live_T = torch.rand(T, device=device) >= zero_rows
    return Case(
        hidden_TH.to(dtype).requires_grad_(),
        weight_VH.to(dtype).requires_grad_(),
        target_T,
        torch.randn(T, device=device) * live_T / T,
        torch.randn(T, device=device) * live_T / T,
    )


def weighted(case: Case, logprob_T: Tensor, entropy_T: Tensor) -> Tensor:
    """The scalar whose gradients are checked: upstream gradients times log-probability and entropy."""
    return (case.grad_logprob_T * logprob_T).sum() + (case.grad_entropy_T * entropy_T).sum()


def run_mode(mode: str, case: Case, **options: Any) -> tuple[TokenStats, tuple[Tensor, ...]]:
    """Forward and backward in a mode: its statistics, and the gradients of hidden and (unless frozen) weight."""
    hidden_TH, weight_VH, target_T = case.hidden_TH, case.weight_VH, case.target_T
    if mode == "statistics":
        with torch.no_grad():
            return linear_logprob_entropy(hidden_TH, weight_VH, target_T, mode=mode, **options), ()
    if mode == "policy_loss":

        def loss(logprob_N: Tensor, entropy_N: Tensor, rows: slice) -> Tensor:
            share = (case.grad_logprob_T[rows] * logprob_N).sum()
            return share + (case.grad_entropy_T[rows] * entropy_N).sum()

        total, stats = linear_policy_loss(hidden_TH, weight_VH, target_T, loss=loss, **options)
        return stats, torch.autograd.grad(total, (hidden_TH, weight_VH))
    if mode.startswith("frozen"):
        gradient = mode == "frozen_entropy"
        stats = linear_logprob_entropy(
            hidden_TH, weight_VH.detach(), target_T, mode="frozen", entropy_gradient=gradient, **options
        )
        return stats, torch.autograd.grad(weighted(case, stats.logprob_T, stats.entropy_T), (hidden_TH,))
    if mode == "cache":
        options = {"cache_bytes": 2 * weight_VH.element_size() * len(weight_VH) * len(hidden_TH)} | options
    stats = linear_logprob_entropy(hidden_TH, weight_VH, target_T, mode=mode, **options)
    return stats, torch.autograd.grad(weighted(case, stats.logprob_T, stats.entropy_T), (hidden_TH, weight_VH))


def eager(case: Case, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Forward and backward with all logits, statistics in fp32: what trainers do."""
    logp_TV = (case.hidden_TH.to(dtype) @ case.weight_VH.to(dtype).T).float().log_softmax(1)
    logprob_T = logp_TV.gather(1, case.target_T[:, None])[:, 0]
    total = weighted(case, logprob_T, -(logp_TV.exp() * logp_TV).sum(1))
    return torch.autograd.grad(total, (case.hidden_TH, case.weight_VH))


def exact_rows(case: Case, rows: Tensor) -> dict[str, Tensor]:
    """Log-probability, entropy and hidden gradient of some rows, in fp64, eight rows at a time.

    "hidden_grad_frozen" is the gradient where the entropy is a constant.
    """
    weight_VH = case.weight_VH.detach().double()
    parts: dict[str, list[Tensor]] = {"logprob": [], "entropy": [], "hidden_grad": [], "hidden_grad_frozen": []}
    constant = case._replace(grad_entropy_T=torch.zeros_like(case.grad_entropy_T))
    for some in rows.split(8):
        logp_NV = (case.hidden_TH.detach()[some].double() @ weight_VH.T).log_softmax(1)
        p_NV = logp_NV.exp()
        entropy_N = -(p_NV * logp_NV).sum(1)
        parts["logprob"].append(logp_NV.gather(1, case.target_T[some, None])[:, 0])
        parts["entropy"].append(entropy_N)
        for name, of in (("hidden_grad", case), ("hidden_grad_frozen", constant)):
            parts[name].append(_dlogits(of, some, logp_NV, entropy_N, case.target_T[some, None]) @ weight_VH)
    return {name: torch.cat(values) for name, values in parts.items()}


def library_rows(case: Case, rows: Tensor) -> dict[str, Tensor]:
    """Log-probability and entropy of some rows from the library's product with fp32 output, reduced in fp64."""
    hidden_NH, weight_VH = case.hidden_TH.detach()[rows], case.weight_VH.detach()
    if hidden_NH.device.type == "cuda":
        logit_NV = torch.mm(hidden_NH, weight_VH.T, out_dtype=torch.float32)
    else:
        logit_NV = hidden_NH.float() @ weight_VH.float().T
    logp_NV = logit_NV.double().log_softmax(1)
    logprob_N = logp_NV.gather(1, case.target_T[rows, None])[:, 0]
    return {"logprob": logprob_N, "entropy": -(logp_NV.exp() * logp_NV).sum(1)}


def exact_weight_grad(case: Case, columns: Tensor, stats: TokenStats) -> Tensor:
    """The weight gradient of some tokens of the vocabulary, fp64, given logsumexp and entropy of all rows."""
    assert stats.lse_T is not None
    hidden_TH = case.hidden_TH.detach().double()
    logp_TN = hidden_TH @ case.weight_VH.detach()[columns].double().T - stats.lse_T.detach().double()[:, None]
    every = torch.arange(len(hidden_TH), device=hidden_TH.device)
    entropy_T = stats.entropy_T.detach().double()
    place_T = torch.full_like(case.target_T, -1)
    hit = case.target_T[:, None] == columns[None, :]
    place_T[hit.any(1)] = hit.int().argmax(1)[hit.any(1)]
    return _dlogits(case, every, logp_TN, entropy_T, place_T[:, None]).T @ hidden_TH


def _dlogits(case: Case, rows: Tensor, logp_NV: Tensor, entropy_N: Tensor, place_N1: Tensor) -> Tensor:
    """g (1[y] - p) - e p (log p + H): the target stands in column `place_N1`, or nowhere if that is -1."""
    g_N, e_N = case.grad_logprob_T[rows].double(), case.grad_entropy_T[rows].double()
    p_NV = logp_NV.exp()
    dz_NV = -p_NV * (g_N[:, None] + e_N[:, None] * (logp_NV + entropy_N[:, None]))
    return dz_NV.scatter_add_(1, place_N1.clamp(min=0), torch.where(place_N1 >= 0, g_N[:, None], 0.0))


def relative_error(actual: Tensor, exact: Tensor) -> float:
    """||actual - exact|| / ||exact||; 0 for two zeros."""
    scale = float(exact.norm())
    return float((actual.double() - exact).norm()) / scale if scale else float(actual.double().norm())


def store_error(exact: Tensor, dtype: torch.dtype) -> float:
    """What rounding the exact result once to `dtype` costs, as `relative_error` measures it."""
    return relative_error(exact.to(dtype), exact)
