"""Everybody who computes a head's log-probabilities, behind one call: this project, plain torch, and the registry.

A rival is a small adapter: what to import, what it can and cannot do, the settings its authors advise (they are printed
beside its numbers), and the reason when it does not run here. Packages other than torch are in `rivals_packages.py`.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import importlib.util
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from suite_cases import Job, Operands, Shape
from torch import Tensor

from entrocraft.kernels import linear_logprob_entropy, linear_policy_loss

EVERYTHING = frozenset({"upstream", "entropy", "entropy_grad", "row_temperature"})
WORDS = {
    "upstream": "gradient of each token", "entropy": "entropy", "entropy_grad": "gradient of the entropy",
    "row_temperature": "temperature of each token",
}  # fmt: skip
KEEP_ALL = 1 << 40


class Answer(NamedTuple):
    """Log-probability and entropy of each token, or, of those that give no more, the mean negative log-probability;
    or gradients and all, of those that make them in the forward."""

    logprob_T: Tensor | None = None
    entropy_T: Tensor | None = None
    loss: Tensor | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Rival:
    """One way to compute a head."""

    name: str
    call: Callable[[Operands, Job], Answer]
    settings: str
    """What it was asked for beyond its operands, in words."""
    gives: frozenset[str] = EVERYTHING
    """What of a job's needs it can do."""
    packages: tuple[str, ...] = ()
    """Import names of what must be installed."""
    torch_names: tuple[str, ...] = ()
    """What it calls of torch, below `torch.nn`, that older versions lack."""
    gpu: bool = False
    """It has no path on a CPU."""
    capability: tuple[int, int] = (0, 0)
    """Least compute capability."""
    hidden_multiple: int = 1
    vocab_multiple: int = 1
    tokens_multiple: int = 1
    any_tokens: Callable[[Shape, str], bool] = lambda shape, device: False
    """Where, for a shape on a device, it takes any number of tokens all the same."""
    recomputes: bool = True
    """It computes the logits a second time for the backward."""
    skips_rows: bool = False
    """A row without an upstream gradient costs nothing in its backward."""
    honours_frozen: bool = True
    """It does not compute the weight's gradient where nobody asks for it."""
    jobs: frozenset[str] | None = None
    """Jobs it is measured on; None: all it can do."""
    logprob_error: float = 5e-2
    """Mean error of a log-probability, nats, beyond which it is not timed: bf16 logits of size 20 are off by 0.03."""
    gradient_error: float = 5e-2
    """Relative error of a gradient, likewise."""

    def does(self, name: str, job: Job) -> bool:
        """Whether the job is one for it."""
        return self.declines(name, job) is None

    def declines(self, name: str, job: Job) -> str | None:
        """Why the job is none for it; None if it is."""
        if lacking := sorted(job.needs - self.gives):
            return f"gives no {', '.join(WORDS[need] for need in lacking)}"
        if self.jobs is not None and name not in self.jobs:
            return f"is measured on {', '.join(sorted(self.jobs))} alone"
        return None

    def why_not(self, shape: Shape, device: str) -> str | None:
        """The reason why it does not run here; None if it does."""
        T, H, V = shape
        missing = [package for package in self.packages if importlib.util.find_spec(package) is None]
        if missing:
            return f"{', '.join(missing)} is not installed"
        for name in self.torch_names:
            if not _torch_has(name):
                return f"torch {torch.__version__.partition('+')[0]} has no torch.nn.{name}"
        if self.gpu and device != "cuda":
            return "it has no path on a CPU"
        if device == "cuda" and torch.cuda.get_device_capability() < self.capability:
            return f"it wants compute capability {self.capability[0]}.{self.capability[1]}"
        if H % self.hidden_multiple or V % self.vocab_multiple:
            return f"it wants H a multiple of {self.hidden_multiple} and V of {self.vocab_multiple}"
        if T % self.tokens_multiple and not self.any_tokens(shape, device):
            return f"it wants T a multiple of {self.tokens_multiple}"
        return None

    def version(self) -> str:
        """Of the package it comes from; torch's where there is none."""
        for package in self.packages or ("torch",):
            top = package.partition(".")[0]
            name = _distributions().get(top, [top])[0]
            return f"{name} {importlib.metadata.version(name)}"
        raise AssertionError("a rival without a package")

    def products(self, job: Job) -> float:
        """Products of 2 T V H operations that it makes for a job, forward and backward."""
        if not job.gradients:
            return 1.0
        gradients = job.gradients if self.honours_frozen else 2
        return 1.0 + (gradients + self.recomputes) * (1.0 - job.zero_rows if self.skips_rows else 1.0)


def _torch_has(name: str) -> bool:
    """Whether there is torch.nn.NAME."""
    module, _, last = name.rpartition(".")
    return hasattr(getattr(torch.nn, module) if module else torch.nn, last)


@functools.cache
def _distributions() -> Mapping[str, list[str]]:
    """Distributions by the name they are imported by; slow to list."""
    return importlib.metadata.packages_distributions()


def load(name: str) -> object:
    """The object at "package.module:name"; warnings of its import are its authors' affair."""
    module, _, attribute = name.partition(":")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found: object = importlib.import_module(module)
    for part in attribute.split("."):
        found = getattr(found, part)
    return found


def leaves(operands: Operands) -> tuple[Tensor, ...]:
    """The operands that want a gradient."""
    return tuple(leaf for leaf in operands.case[:2] if leaf.requires_grad)


def run(rival: Rival, operands: Operands, job: Job) -> tuple[Answer, tuple[Tensor, ...]]:
    """Forward and, where the job asks for it, backward: the answer, and the gradients of hidden and weight."""
    case = operands.case
    if not job.gradients:
        with torch.no_grad():
            return rival.call(operands, job), ()
    answer = rival.call(operands, job)
    if answer.loss is not None:
        total = answer.loss
    else:
        assert answer.logprob_T is not None
        factor = 1.0 if "upstream" in job.needs else -1.0
        total = factor * (case.grad_logprob_T * answer.logprob_T).sum()
        if job.entropy:
            assert answer.entropy_T is not None
            total = total + (case.grad_entropy_T * answer.entropy_T).sum()
    return answer, torch.autograd.grad(total, leaves(operands))


def ours(operands: Operands, job: Job, **options: Any) -> Answer:
    """This project's op, with options of `linear_logprob_entropy`."""
    case, temperature_T = operands
    stats = linear_logprob_entropy(
        *case[:3],
        temperature=1.0 if temperature_T is None else temperature_T,
        entropy_gradient=job.entropy,
        ignore_index=None,
        **options,
    )
    return Answer(stats.logprob_T, stats.entropy_T)


def _our_policy_loss(operands: Operands, job: Job) -> Answer:
    case, temperature_T = operands
    sign = 1.0 if "upstream" in job.needs else -1.0

    def loss(logprob_N: Tensor, entropy_N: Tensor, rows: slice) -> Tensor:
        share = sign * (case.grad_logprob_T[rows] * logprob_N).sum()
        return share + (case.grad_entropy_T[rows] * entropy_N).sum() if job.entropy else share

    total, stats = linear_policy_loss(
        *case[:3], loss=loss, temperature=1.0 if temperature_T is None else temperature_T, ignore_index=None
    )
    return Answer(stats.logprob_T, stats.entropy_T, total)


def _statistics(logit_TV: Tensor, target_T: Tensor, temperature_T: Tensor | None, entropy: bool) -> list[Tensor]:
    """fp32 statistics with all of [T, V] kept, as a trainer without a fused head computes them."""
    z_TV = logit_TV.float()
    logp_TV = (z_TV if temperature_T is None else z_TV / temperature_T[:, None]).log_softmax(1)
    found = [logp_TV.gather(1, target_T[:, None])[:, 0]]
    return [*found, -(logp_TV.exp() * logp_TV).sum(1)] if entropy else found


def _eager(operands: Operands, job: Job, *, dtype: torch.dtype | None = None) -> Answer:
    case, temperature_T = operands
    hidden_TH, weight_VH = (case.hidden_TH, case.weight_VH) if dtype is None else (x.to(dtype) for x in case[:2])
    return Answer(*_statistics(hidden_TH @ weight_VH.T, case.target_T, temperature_T, job.entropy))


@functools.cache
def _compiled() -> Callable[..., list[Tensor]]:
    def head(hidden_TH: Tensor, weight_VH: Tensor, target_T: Tensor, entropy: bool) -> list[Tensor]:
        return _statistics(hidden_TH @ weight_VH.T, target_T, None, entropy)

    return torch.compile(head, dynamic=False)


def _compile(operands: Operands, job: Job) -> Answer:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return Answer(*_compiled()(*operands.case[:3], job.entropy))


def _torch_linear(operands: Operands, job: Job) -> Answer:
    case, chunked = operands.case, torch.nn.LinearCrossEntropyOptions()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return Answer(loss=torch.nn.functional.linear_cross_entropy(*case[:3], reduction="mean", options=chunked))


OURS = (
    Rival(
        name="entrocraft", call=ours, settings="defaults: nothing kept, buffers of 256 MiB", skips_rows=True,
        logprob_error=1e-5, gradient_error=1e-2,
    ),
    Rival(
        name="entrocraft_cache", call=functools.partial(ours, cache_bytes=KEEP_ALL), recomputes=False,
        settings="cache_bytes without bound: bf16 exponentials kept, or a frozen head's factors", skips_rows=True,
        jobs=frozenset({"logprob", "both", "frozen", "half_zero"}), logprob_error=1e-5, gradient_error=1e-2,
    ),
    Rival(
        name="entrocraft_policy_loss", call=_our_policy_loss, settings="linear_policy_loss, buffers of 1 GiB",
        recomputes=False, skips_rows=True, jobs=frozenset({"logprob", "both", "half_zero", "mean_loss"}),
        logprob_error=1e-5, gradient_error=1e-2,
    ),
)  # fmt: skip
PLAIN = (
    Rival(
        name="eager_fp32", call=functools.partial(_eager, dtype=torch.float32), recomputes=False,
        settings="operands cast to fp32, logits fp32", logprob_error=1e-4,
    ),
    Rival(name="eager_bf16", call=_eager, settings="bf16 logits, fp32 log_softmax", recomputes=False),
    Rival(
        name="torch_compile", call=_compile, settings="torch.compile(dynamic=False) of eager with bf16 logits",
        gives=EVERYTHING - {"row_temperature"}, recomputes=False, jobs=frozenset({"statistics", "both"}),
    ),
    Rival(
        name="torch_linear_cross_entropy", call=_torch_linear, gives=frozenset(), recomputes=False,
        torch_names=("functional.linear_cross_entropy", "LinearCrossEntropyOptions"),
        settings="F.linear_cross_entropy, reduction mean, default LinearCrossEntropyOptions (chunks)",
        jobs=frozenset({"mean_loss"}),
    ),
)  # fmt: skip


def all_rivals() -> tuple[Rival, ...]:
    """Ours first, then torch's, then the packages'."""
    from rivals_packages import PACKAGES

    return (*OURS, *PLAIN, *PACKAGES)


# On a CPU these run wherever the `bench` extra is installed: a skip of one of them is a failure. torch 2.11, the oldest
# that this project takes, has no linear_cross_entropy yet.
ALWAYS = frozenset(
    {*(rival.name for rival in (*OURS, *PLAIN) if all(map(_torch_has, rival.torch_names))), "trl_chunked",
     "liger_scaled_ce"}
)  # fmt: skip
