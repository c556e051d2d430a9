"""A clipped policy loss and its gradients from hidden states: in one pass, in two, eager, on TRL's op, in Liger's loss.

    pytest bench/bench_policy_loss.py [--heads qwen3_4b --tokens 16384 --bench-rounds 30]

PPO-clip without dual clip, mean over tokens; the policy has moved, so that some tokens are clipped, without a gradient.
Rollouts are of 32 tokens, the last as long as what is left. Liger's chunked loss cannot have an entropy in it, gives no
log-probabilities, and takes padded [B, L, H].
"""

from __future__ import annotations

import functools
import importlib.util
import statistics
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from rivals import Answer, leaves, load
from rivals_trl import chunked_logprob, chunked_setting
from suite_cases import JOBS, Operands, Shape, make_operands
from suite_choice import chosen, spread
from suite_contest import CLOCK, Contender, Measured, compete, record
from suite_errors import Truth
from suite_rates import Work, derived
from torch import Tensor
from torch.nn.functional import pad

from entrocraft import PolicyObjective
from entrocraft.kernels import linear_logprob_entropy, linear_policy_loss
from entrocraft.losses import PPOClip

SEQUENCE = 32  # tokens of each rollout but the last
PRODUCTS = 3  # that nobody can do without
Made = tuple[Tensor, Answer, tuple[Tensor, ...]]  # loss, what else it gives, gradients of hidden and weight


class Batch(NamedTuple):
    """Operands of the head, one advantage a rollout, and log-probabilities of the policy that sampled."""

    operands: Operands
    rollout_T: Tensor
    advantage_R: Tensor
    old_logprob_T: Tensor

    def objective(self) -> PolicyObjective:
        """PPO-clip, mean over the T tokens."""
        return PolicyObjective(
            loss_fn=PPOClip(dual_clip=None),
            old_logprob_T=self.old_logprob_T,
            advantage_T=self.advantage_R[self.rollout_T],
            weight_T=torch.full_like(self.old_logprob_T, 1.0 / len(self.old_logprob_T)),
        )


def make_batch(shape: Shape, device: str) -> Batch:
    """Ratios are 1, e^0.1, e^-0.1, e^0.5 and e^-0.5, of which the last two may be clipped."""
    operands = make_operands(shape, JOBS["logprob"], "peaked", device=device)
    with torch.no_grad():
        now_T = linear_logprob_entropy(*operands.case[:3]).logprob_T
    place_T = torch.arange(shape.T, device=device)
    moved_T = torch.tensor([0.0, 0.1, -0.1, 0.5, -0.5], device=device)[place_T % 5]
    rollout_T = place_T // SEQUENCE
    return Batch(operands, rollout_T, torch.randn(int(rollout_T[-1]) + 1, device=device), now_T - moved_T)


def _with_gradients(batch: Batch, loss: Tensor, answer: Answer) -> Made:
    gradients = torch.autograd.grad(loss, leaves(batch.operands))
    given = (None if value is None else value.detach() for value in answer)
    return loss.detach(), Answer(*given), gradients


def _one_pass(batch: Batch) -> Made:
    loss, stats = linear_policy_loss(*batch.operands.case[:3], loss=batch.objective(), ignore_index=None)
    return _with_gradients(batch, loss, Answer(stats.logprob_T, stats.entropy_T))


def _on_logprobs(batch: Batch, call: Callable[..., Answer]) -> Made:
    """The same loss of log-probabilities that come from elsewhere."""
    answer = call(*batch.operands.case[:3])
    assert answer.logprob_T is not None
    loss = batch.objective()(answer.logprob_T, torch.zeros_like(answer.logprob_T), slice(None))
    return _with_gradients(batch, loss, answer)


def _two_steps(hidden_TH: Tensor, weight_VH: Tensor, target_T: Tensor) -> Answer:
    stats = linear_logprob_entropy(hidden_TH, weight_VH, target_T, ignore_index=None)
    return Answer(stats.logprob_T, stats.entropy_T)


def _eager(hidden_TH: Tensor, weight_VH: Tensor, target_T: Tensor, *, dtype: torch.dtype) -> Answer:
    logit_TV = (hidden_TH.to(dtype) @ weight_VH.to(dtype).T).float()
    return Answer(logit_TV.log_softmax(1).gather(1, target_T[:, None])[:, 0])


def _trl(hidden_TH: Tensor, weight_VH: Tensor, target_T: Tensor) -> Answer:
    return Answer(*chunked_logprob(hidden_TH, weight_VH, target_T, entropy=False))


def _liger(batch: Batch) -> Made:
    hidden_TH, weight_VH, target_T = batch.operands.case[:3]
    R, T = len(batch.advantage_R), len(target_T)
    left = R * SEQUENCE - T

    def rows(value_T: Tensor) -> Tensor:
        """[R, SEQUENCE, ...], the last rollout padded with zeros."""
        padded_T = pad(value_T, (0, 0) * (value_T.ndim - 1) + (0, left)) if left else value_T
        return padded_T.view(R, SEQUENCE, *value_T.shape[1:])

    kind: Any = load("liger_kernel.chunked_loss:LigerFusedLinearGRPOLoss")
    chunk = max(1, R // 8)
    options = {"beta": 0.0, "use_ref_model": False, "loss_type": "bnpo", "compiled": hidden_TH.is_cuda}
    loss, _ = kind(chunk_size=chunk, **options)(
        rows(hidden_TH), weight_VH, rows(target_T), rows(torch.ones_like(target_T)), batch.advantage_R,
        old_per_token_logps=rows(batch.old_logprob_T),
    )  # fmt: skip
    return _with_gradients(batch, loss, Answer())


class Call(NamedTuple):
    """One way to the same loss."""

    make: Callable[[Batch], Made]
    settings: str
    package: str | None
    products: int
    """Of 2 T V H operations, forward and backward."""
    value_error: float
    """Most of the log-probabilities' mean error in nats, and of the loss in mean sizes of an advantage."""
    gradient_error: float
    """Most of a gradient's relative error."""


# A bf16 logit of 20 is off by up to 0.06, and a ratio by as much: near a clip a token changes sides, and its gradient
# comes or goes. Measured: losses off by 0.008 at most, gradients by 0.02 to 0.06. A row of the 64 that are looked at
# adds 0.15 when it changes sides, so the bound leaves room for three or four; gradients of nothing are off by 1.
ROUNDED = {"value_error": 5e-2, "gradient_error": 0.3}
CALLS: dict[str, Call] = {
    "entrocraft_policy_loss": Call(_one_pass, "linear_policy_loss, buffers of 1 GiB", None, 3, 1e-5, 1e-2),
    "entrocraft_two_steps": Call(
        functools.partial(_on_logprobs, call=_two_steps), "linear_logprob_entropy, defaults", None, 4, 1e-5, 1e-2
    ),
    "eager_fp32": Call(
        functools.partial(_on_logprobs, call=functools.partial(_eager, dtype=torch.float32)),
        "fp32 logits", None, 3, 1e-4, 1e-2,
    ),
    "eager_bf16": Call(
        functools.partial(_on_logprobs, call=functools.partial(_eager, dtype=torch.bfloat16)),
        "bf16 logits", None, 3, **ROUNDED,
    ),
    "trl_chunked": Call(functools.partial(_on_logprobs, call=_trl), chunked_setting(), "trl", 4, **ROUNDED),
    "liger_chunked_grpo": Call(
        _liger, "bnpo, no reference, an eighth of the sequences a chunk; compiled on a GPU", "liger_kernel", 4,
        **ROUNDED,
    ),
}  # fmt: skip


def limits(call: Call) -> dict[str, float]:
    """Errors beyond which it is not timed."""
    value, gradient = call.value_error, call.gradient_error
    most = {"loss": value, "logprob_mean": value, "entropy_mean": 3 * value}
    return most | {"hidden_grad": gradient, "weight_grad": gradient}


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
    size = float(batch.advantage_R[batch.rollout_T].abs().mean())  # terms of the loss may cancel

    def errors(made: Made) -> dict[str, float]:
        return {"loss": abs(float(made[0]) - exact) / size, **truth.errors(*made[1:])}

    field = {
        name: Contender(functools.partial(call.make, batch), call.settings, errors, limits(call))
        for name, call in CALLS.items()
        if name in names and (call.package is None or importlib.util.find_spec(call.package))
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
        (pytest.fail if device == "cpu" else pytest.skip)(f"{name}: {CALLS[name].package} is not installed")
    benchmark.group = f"policy loss {head} T={shape.T} V={shape.V}"
    info: dict[str, Any] = {"head": head, **shape._asdict(), "job": "policy_loss", "data": "peaked"}
    if isinstance(measured := found[name], Measured):
        work = Work(shape.product_operations(), PRODUCTS, CALLS[name].products, 2 * shape.operand_bytes())
        info |= derived(work, statistics.median(measured.seconds), rates[shape])
    record(benchmark, found[name], **info)
