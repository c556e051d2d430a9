"""Log-probability and entropy of logits that are there already: ours, eager, compiled, TRL's, flash-attention's.

    pytest bench/bench_logits_logprob.py [--heads qwen3_4b --tokens 2048]

Forward and backward of both. Bytes that must move: the logits read once forward and once backward, their gradient
written once.
"""

from __future__ import annotations

import functools
import importlib.util
import statistics
from collections.abc import Callable
from typing import Any

import pytest
import torch
from head_cases import relative_error
from rivals import load
from suite_cases import JOBS, Shape, make_operands
from suite_choice import chosen, spread
from suite_contest import CLOCK, Contender, Measured, compete, record
from suite_errors import value_errors
from torch import Tensor

from entrocraft.kernels import logits_logprob_entropy, logits_logprob_entropy_reference

Call = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def _ours(logit_TV: Tensor, target_T: Tensor) -> tuple[Tensor, Tensor]:
    stats = logits_logprob_entropy(logit_TV, target_T, ignore_index=None)
    return stats.logprob_T, stats.entropy_T


def _eager(logit_TV: Tensor, target_T: Tensor) -> tuple[Tensor, Tensor]:
    logp_TV = logit_TV.float().log_softmax(1)
    return logp_TV.gather(1, target_T[:, None])[:, 0], -(logp_TV.exp() * logp_TV).sum(1)


@functools.cache
def _compiled() -> Call:
    return torch.compile(_eager, dynamic=False)


def _trl(logit_TV: Tensor, target_T: Tensor) -> tuple[Tensor, Tensor]:
    both: Any = load("trl.kernels:selective_log_softmax_and_entropy")
    if logit_TV.device.type == "cuda":
        return both(logit_TV, target_T)
    one: Any = load("trl.trainer.utils:selective_log_softmax")
    entropy: Any = load("trl.trainer.utils:entropy_from_logits")
    return one(logit_TV, target_T), entropy(logit_TV)


CALLS: dict[str, tuple[Call, str, str | None, float]] = {  # call, settings, package, bound of the mean error
    "entrocraft": (_ours, "defaults", None, 1e-5),
    "eager": (_eager, "fp32 log_softmax of the logits", None, 1e-5),
    "torch_compile": (lambda *a: _compiled()(*a), "torch.compile(dynamic=False) of eager", None, 1e-5),
    "trl": (_trl, "its fused kernel on a GPU; selective_log_softmax and entropy_from_logits on a CPU", "trl", 0.2),
}


def _case(shape: Shape, device: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    case, _ = make_operands(shape, JOBS["both"], "peaked", device=device)
    with torch.no_grad():
        logit_TV = case.hidden_TH @ case.weight_VH.T
    return logit_TV.requires_grad_(), case.target_T, case.grad_logprob_T, case.grad_entropy_T


@functools.lru_cache(maxsize=1)
def group(shape: Shape, device: str, rounds: int, names: tuple[str, ...]) -> dict[str, Measured | str]:
    """All contenders that are installed, on one set of bf16 logits."""
    logit_TV, target_T, up_T, of_entropy_T = _case(shape, device)
    rows = slice(0, 64)
    exact_NV = logit_TV.detach()[rows].double().requires_grad_()
    exact = logits_logprob_entropy_reference(exact_NV, target_T[rows])
    total = (up_T[rows] * exact.logprob_T).sum() + (of_entropy_T[rows] * exact.entropy_T).sum()
    (exact_grad_NV,) = torch.autograd.grad(total, exact_NV)

    def run(call: Call) -> tuple[Tensor, Tensor, Tensor]:
        logprob_T, entropy_T = call(logit_TV, target_T)
        total = (up_T * logprob_T.float()).sum() + (of_entropy_T * entropy_T.float()).sum()
        return logprob_T, entropy_T, torch.autograd.grad(total, logit_TV)[0]

    def errors(made: tuple[Tensor, Tensor, Tensor]) -> dict[str, float]:
        logprob_N, entropy_N, grad_NV = (value.detach()[rows] for value in made)
        found = value_errors(logprob_N, exact.logprob_T, entropy_N, exact.entropy_T)
        return found | {"logits_grad": relative_error(grad_NV, exact_grad_NV)}

    field = {}
    for name, (call, settings, package, bound) in CALLS.items():
        if name in names and (package is None or importlib.util.find_spec(package)):
            limits = {"logprob_mean": bound, "entropy_mean": bound, "logits_grad": 1e-2 if bound < 0.1 else 0.2}
            field[name] = Contender(functools.partial(run, call), settings, errors, limits)
    return compete(field, device, rounds)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A benchmark for each head, T and contender."""
    spread(metafunc, CALLS)


@pytest.mark.benchmark(timer=CLOCK)
def bench_logits_logprob(
    request: pytest.FixtureRequest, benchmark: Any, rates: Any, head: str, shape: Shape, name: str
) -> None:
    """Forward and backward of log-probability and entropy, from bf16 logits."""
    config: Any = request.config
    device = config.getoption("device")
    rounds = 1 if benchmark.disabled else config.getoption("bench_rounds")
    found = group(shape, device, rounds, chosen(config, CALLS))
    if name not in found:
        (pytest.fail if device == "cpu" else pytest.skip)(f"{CALLS[name][2]} is not installed")
    benchmark.group = f"logits {head} T={shape.T} V={shape.V}"
    info: dict[str, Any] = {"head": head, **shape._asdict(), "job": "logits", "data": "peaked"}
    moved = 3 * 2 * shape.T * shape.V
    if isinstance(measured := found[name], Measured):
        info |= {"gbs": 1e-9 * moved / statistics.median(measured.seconds), "moved_bytes": moved}
        info |= {"floor_ms": 1e-6 * moved / rates[shape]["copy_gbs"], **rates[shape]}
    record(benchmark, found[name], **info)
