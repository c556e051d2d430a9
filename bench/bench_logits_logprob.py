"""Log-probability and entropy of logits that are there already: ours, eager, compiled, TRL's, flash-attention's.

    pytest bench/bench_logits_logprob.py [--heads qwen3_4b --tokens 2048]

Forward and backward, of both and, as flash-attention's cross entropy gives no entropy, of the log-probability alone.
Bytes that must move: the logits read once forward and once backward, their gradient written once.
"""

from __future__ import annotations

import functools
import importlib.util
import statistics
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from head_cases import relative_error
from rivals import Answer, load
from suite_cases import JOBS, Shape, make_operands, shapes
from suite_choice import chosen, nobody
from suite_contest import CLOCK, Contender, Measured, compete, record
from suite_errors import value_errors
from torch import Tensor

from entrocraft.kernels import logits_logprob_entropy, logits_logprob_entropy_reference


def _ours(logit_TV: Tensor, target_T: Tensor, entropy: bool) -> Answer:
    stats = logits_logprob_entropy(logit_TV, target_T, ignore_index=None)
    return Answer(stats.logprob_T, stats.entropy_T if entropy else None)


def _eager(logit_TV: Tensor, target_T: Tensor, entropy: bool) -> Answer:
    logp_TV = logit_TV.float().log_softmax(1)
    logprob_T = logp_TV.gather(1, target_T[:, None])[:, 0]
    return Answer(logprob_T, -(logp_TV.exp() * logp_TV).sum(1) if entropy else None)


@functools.cache
def _compiled() -> Callable[[Tensor, Tensor, bool], Answer]:
    return torch.compile(_eager, dynamic=False)


def _trl(logit_TV: Tensor, target_T: Tensor, entropy: bool) -> Answer:
    if logit_TV.device.type == "cuda" and entropy:
        both: Any = load("trl.kernels:selective_log_softmax_and_entropy")
        return Answer(*both(logit_TV, target_T))
    one: Any = load("trl.trainer.utils:selective_log_softmax")
    other: Any = load("trl.trainer.utils:entropy_from_logits")
    return Answer(one(logit_TV, target_T), other(logit_TV) if entropy else None)


def _flash(logit_TV: Tensor, target_T: Tensor, entropy: bool) -> Answer:
    function: Any = load("flash_attn.ops.triton.cross_entropy:cross_entropy_loss")
    return Answer(-function(logit_TV, target_T)[0])


class Call(NamedTuple):
    """One way to the same statistics."""

    make: Callable[[Tensor, Tensor, bool], Answer]
    settings: str
    package: str | None
    error: float
    """Most of the mean error, nats."""
    jobs: tuple[str, ...] = ("both", "logprob")
    gpu: bool = False
    """It has no path on a CPU."""

    def why_not(self, device: str) -> str | None:
        """The reason why it does not run here; None if it does."""
        if self.package is not None and importlib.util.find_spec(self.package) is None:
            return f"{self.package} is not installed"
        return "it has no path on a CPU" if self.gpu and device != "cuda" else None


CALLS = {
    "entrocraft": Call(_ours, "defaults", None, 1e-5),
    "eager": Call(_eager, "fp32 log_softmax of the logits", None, 1e-5),
    "torch_compile": Call(
        lambda *given: _compiled()(*given), "torch.compile(dynamic=False) of eager", None, 1e-5, ("both",)
    ),
    "trl": Call(
        _trl, "its fused kernel on a GPU; selective_log_softmax and entropy_from_logits on a CPU or without entropy",
        "trl", 0.2,
    ),
    "flash_attn_ce": Call(
        _flash, "its Triton cross entropy, the logits left as they are", "flash_attn", 1e-5, ("logprob",), True
    ),
}  # fmt: skip


def _case(shape: Shape, device: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    case, _ = make_operands(shape, JOBS["both"], "peaked", device=device)
    with torch.no_grad():
        logit_TV = case.hidden_TH @ case.weight_VH.T
    return logit_TV.requires_grad_(), case.target_T, case.grad_logprob_T, case.grad_entropy_T


@functools.lru_cache(maxsize=1)
def group(shape: Shape, job: str, device: str, rounds: int, names: tuple[str, ...]) -> dict[str, Measured | str]:
    """All contenders that run here, on one set of bf16 logits."""
    logit_TV, target_T, up_T, of_entropy_T = _case(shape, device)
    rows, entropy = slice(0, 64), job == "both"

    def total(answer: Answer, some: slice) -> Tensor:
        assert answer.logprob_T is not None
        share = (up_T[some] * answer.logprob_T.float()).sum()
        return share if answer.entropy_T is None else share + (of_entropy_T[some] * answer.entropy_T.float()).sum()

    exact_NV = logit_TV.detach()[rows].double().requires_grad_()
    stats = logits_logprob_entropy_reference(exact_NV, target_T[rows])
    summed = (up_T[rows] * stats.logprob_T).sum()
    summed = summed + (of_entropy_T[rows] * stats.entropy_T).sum() if entropy else summed
    (exact_grad_NV,) = torch.autograd.grad(summed, exact_NV)

    def run(call: Call) -> tuple[Answer, Tensor]:
        answer = call.make(logit_TV, target_T, entropy)
        (grad_TV,) = torch.autograd.grad(total(answer, slice(None)), logit_TV)
        return Answer(*(None if value is None else value.detach() for value in answer)), grad_TV

    def errors(made: tuple[Answer, Tensor]) -> dict[str, float]:
        (logprob_T, entropy_T, _), grad_TV = made
        assert logprob_T is not None
        found = value_errors("logprob", logprob_T[rows], stats.logprob_T)
        found |= value_errors("entropy", entropy_T[rows], stats.entropy_T) if entropy_T is not None else {}
        return found | {"logits_grad": relative_error(grad_TV[rows], exact_grad_NV)}

    def contender(call: Call) -> Contender:
        gradient = 1e-2 if call.error < 0.1 else 0.2
        limits = {"logprob_mean": call.error, "entropy_mean": call.error, "logits_grad": gradient}
        return Contender(functools.partial(run, call), call.settings, errors, limits)

    field = {
        name: contender(call)
        for name, call in CALLS.items()
        if name in names and job in call.jobs and not call.why_not(device)
    }
    return compete(field, device, rounds)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A benchmark for each head, T, job and chosen contender."""
    config: Any = metafunc.config
    sizes = shapes(*map(config.getoption, ("heads", "tokens", "vocab")))
    cases = [
        pytest.param(head, shape, job, name, id=f"{head}-T{shape.T}-V{shape.V}-{job}-{name}")
        for head, shape in sizes
        for job in ("both", "logprob")
        for name in chosen(config, CALLS)
        if job in CALLS[name].jobs
    ]
    metafunc.parametrize(("head", "shape", "job", "name"), cases or [nobody(config, 4, CALLS)])


@pytest.mark.benchmark(timer=CLOCK)
def bench_logits_logprob(
    request: pytest.FixtureRequest, benchmark: Any, rates: Any, head: str, shape: Shape, job: str, name: str
) -> None:
    """Forward and backward from bf16 logits."""
    config: Any = request.config
    device = config.getoption("device")
    reason = CALLS[name].why_not(device)
    if reason is not None:
        (pytest.skip if CALLS[name].gpu or device == "cuda" else pytest.fail)(f"{name}: {reason}")
    rounds = 1 if benchmark.disabled else config.getoption("bench_rounds")
    found = group(shape, job, device, rounds, chosen(config, CALLS))
    benchmark.group = f"logits {head} T={shape.T} V={shape.V} {job}"
    info: dict[str, Any] = {"head": head, **shape._asdict(), "job": f"logits {job}", "data": "peaked"}
    moved = 3 * 2 * shape.T * shape.V
    if isinstance(measured := found[name], Measured):
        info |= {"gbs": 1e-9 * moved / statistics.median(measured.seconds), "moved_bytes": moved}
        info |= {"floor_ms": 1e-6 * moved / rates[shape]["copy_gbs"], **rates[shape]}
    record(benchmark, found[name], **info)
