"""A clipped policy loss and its gradients from hidden states: in one pass, in two, eager, on TRL's op, in Liger's loss.

    pytest bench/bench_policy_loss.py [--heads qwen3_4b --tokens 16384 --bench-rounds 30]

PPO-clip without dual clip, mean over tokens; the policy has moved, so that some tokens are clipped, without a gradient.
Liger's chunked loss cannot have an entropy in it, and takes padded [B, L, H]: here all sequences are of one length.
"""

from __future__ import annotations

import functools
import importlib.util
import statistics
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from rivals import Answer, load
from suite_cases import JOBS, Operands, Shape, make_operands
from suite_choice import chosen, spread
from suite_contest import CLOCK, Contender, Measured, compete, record
from suite_errors import Truth
from torch import Tensor

from entrocraft import PolicyObjective
from entrocraft.kernels import linear_logprob_entropy, linear_policy_loss
from entrocraft.losses import PPOClip

SEQUENCE = 32  # tokens of each
Made = tuple[Tensor, Tensor, Tensor]  # loss, gradients of hidden and weight


class Batch(NamedTuple):
    """Operands of the head, one advantage a sequence, and log-probabilities of the policy that sampled."""

    operands: Operands
    advantage_R: Tensor
    old_logprob_T: Tensor

    def objective(self) -> PolicyObjective:
        """PPO-clip, mean over the T tokens."""
        T, R = len(self.old_logprob_T), len(self.advantage_R)
        return PolicyObjective(
            loss_fn=PPOClip(dual_clip=None),
            old_logprob_T=self.old_logprob_T,
            advantage_T=self.advantage_R.repeat_interleave(T // R),
            weight_T=torch.full_like(self.old_logprob_T, 1.0 / T),
        )


def make_batch(shape: Shape, device: str) -> Batch:
    """Ratios are 1, e^0.1, e^-0.1, e^0.5 and e^-0.5, of which the last two may be clipped. T must not be ragged."""
    if shape.T % SEQUENCE:
        raise ValueError(
            f"--tokens {shape.T}: expected a multiple of {SEQUENCE}, such as {shape.T // SEQUENCE * SEQUENCE}"
        )
    operands = make_operands(shape, JOBS["logprob"], "peaked", device=device)
    with torch.no_grad():
        now_T = linear_logprob_entropy(*operands.case[:3]).logprob_T
    moved_T = torch.tensor([0.0, 0.1, -0.1, 0.5, -0.5], device=device)[torch.arange(shape.T, device=device) % 5]
    advantage_R = torch.randn(shape.T // SEQUENCE, device=device)
    return Batch(operands, advantage_R, now_T - moved_T)


def _with_gradients(loss: Tensor, hidden_TH: Tensor, weight_VH: Tensor) -> Made:
    of_hidden_TH, of_weight_VH = torch.autograd.grad(loss, (hidden_TH, weight_VH))
    return loss, of_hidden_TH, of_weight_VH


def _one_pass(batch: Batch) -> Made:
    case = batch.operands.case
    loss, _ = linear_policy_loss(*case[:3], loss=batch.objective(), ignore_index=None)
    return _with_gradients(loss, case.hidden_TH, case.weight_VH)


def _on_logprobs(batch: Batch, call: Callable[..., Tensor]) -> Made:
    """The same loss of log-probabilities that come from elsewhere."""
    case = batch.operands.case
    logprob_T = call(*case[:3])
    loss = batch.objective()(logprob_T, torch.zeros_like(logprob_T), slice(None))
    return _with_gradients(loss, case.hidden_TH, case.weight_VH)


def _two_steps(hidden_TH: Tensor, weight_VH: Tensor, target_T: Tensor) -> Tensor:
    return linear_logprob_entropy(hidden_TH, weight_VH, target_T, ignore_index=None).logprob_T


def _eager(hidden_TH: Tensor, weight_VH: Tensor, target_T: Tensor, *, dtype: torch.dtype) -> Tensor:
    logit_TV = (hidden_TH.to(dtype) @ weight_VH.to(dtype).T).float()
    return logit_TV.log_softmax(1).gather(1, target_T[:, None])[:, 0]


def _trl(hidden_TH: Tensor, weight_VH: Tensor, target_T: Tensor) -> Tensor:
    function: Any = load("trl.kernels:ChunkedLogProbFunction")
    return function.apply(hidden_TH, weight_VH, None, target_T, 1.0, 8192, None, 1.0, ())[0]


def _liger(batch: Batch) -> Made:
    hidden_TH, weight_VH, target_T = batch.operands.case[:3]
    R, T = len(batch.advantage_R), len(target_T)
    kind: Any = load("liger_kernel.chunked_loss:LigerFusedLinearGRPOLoss")
    loss, _ = kind(
        beta=0.0, use_ref_model=False, loss_type="bnpo", compiled=hidden_TH.is_cuda, chunk_size=max(1, R // 8)
    )(
        hidden_TH.view(R, T // R, -1), weight_VH, target_T.view(R, T // R),
        torch.ones(R, T // R, device=hidden_TH.device, dtype=torch.int64), batch.advantage_R,
        old_per_token_logps=batch.old_logprob_T.view(R, T // R),
    )  # fmt: skip
    return _with_gradients(loss, hidden_TH, weight_VH)


# Call, settings, package, bound on relative errors, products.
CALLS: dict[str, tuple[Callable[[Batch], Made], str, str | None, float, int]] = {
    "entrocraft_policy_loss": (_one_pass, "linear_policy_loss, buffers of 1 GiB", None, 1e-2, 3),
    "entrocraft_two_steps": (
        functools.partial(_on_logprobs, call=_two_steps), "linear_logprob_entropy, defaults", None, 1e-2, 4
    ),
    "eager_fp32": (
        functools.partial(_on_logprobs, call=functools.partial(_eager, dtype=torch.float32)), "fp32 logits", None,
        5e-2, 3,
    ),
    "eager_bf16": (
        functools.partial(_on_logprobs, call=functools.partial(_eager, dtype=torch.bfloat16)), "bf16 logits", None,
        1.0, 3,
    ),
    "trl_chunked": (
        functools.partial(_on_logprobs, call=_trl), "ChunkedLogProbFunction, vocabulary chunk of 8,192", "trl", 1.0, 4
    ),
    "liger_chunked_grpo": (
        _liger, "bnpo, no reference, an eighth of the sequences a chunk; compiled on a GPU", "liger_kernel", 1.0, 4
    ),
}  # fmt: skip
# A bf16 logit of 20 is off by up to 0.06, and a ratio by as much: near a clip tokens change sides, and gradients with
# them. So the bound of those is wide, and the table shows what it came to.


@functools.lru_cache(maxsize=1)
def group(shape: Shape, device: str, rounds: int, names: tuple[str, ...]) -> dict[str, Measured | str]:
    """All contenders that are installed, on one batch."""
    batch = make_batch(shape, device)
    objective = batch.objective()
    with torch.no_grad():
        logprob_T = linear_logprob_entropy(*batch.operands.case[:3]).logprob_T
    leaf_T = logprob_T.clone().requires_grad_()
    loss = objective(leaf_T, torch.zeros_like(leaf_T), slice(None))
    (grad_T,) = torch.autograd.grad(loss, leaf_T)
    case = batch.operands.case._replace(grad_logprob_T=grad_T)
    truth, exact = Truth(Operands(case, None), JOBS["logprob"]), float(loss.detach())

    def errors(made: Made) -> dict[str, float]:
        return {"loss": abs(float(made[0]) / exact - 1.0), **truth.errors(Answer(), made[1:])}

    field = {
        name: Contender(
            functools.partial(call, batch),
            settings,
            errors,
            dict.fromkeys(("loss", "hidden_grad", "weight_grad"), bound),
        )
        for name, (call, settings, package, bound, _) in CALLS.items()
        if name in names and (package is None or importlib.util.find_spec(package))
    }
    return compete(field, device, rounds)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A benchmark for each head, T and contender."""
    spread(metafunc, CALLS)


@pytest.mark.benchmark(timer=CLOCK)
def bench_policy_loss(
    request: pytest.FixtureRequest, benchmark: Any, rates: Any, head: str, shape: Shape, name: str
) -> None:
    """Loss and gradients of hidden and weight."""
    config: Any = request.config
    device = config.getoption("device")
    rounds = 1 if benchmark.disabled else config.getoption("bench_rounds")
    found = group(shape, device, rounds, chosen(config, CALLS))
    if name not in found:
        (pytest.fail if device == "cpu" else pytest.skip)(f"{CALLS[name][2]} is not installed")
    benchmark.group = f"policy loss {head} T={shape.T} V={shape.V}"
    info: dict[str, Any] = {"head": head, **shape._asdict(), "job": "policy_loss", "data": "peaked"}
    if isinstance(measured := found[name], Measured):
        rate, operations = rates[shape], 1e-12 * shape.product_operations() / statistics.median(measured.seconds)
        info |= {"useful_tflops": 3 * operations, "executed_tflops": CALLS[name][4] * operations}
        info |= {"share_of_gemm": CALLS[name][4] * operations / rate["gemm_tflops"], **rate}
        info |= {"floor_ms": 3e-9 * shape.product_operations() / rate["gemm_tflops"], "useful_products": 3}
    record(benchmark, found[name], **info)
