"""Rivals from packages: TRL, Liger, cut-cross-entropy, verl, quack, flash-attention; restrictions are theirs."""

from __future__ import annotations

import functools
import importlib.util
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

from rivals import Answer, Rival, load
from suite_cases import Job, Operands

UPSTREAM = frozenset({"upstream"})
BOTH = frozenset({"upstream", "entropy", "entropy_grad"})


def _trl(operands: Operands, job: Job) -> Answer:
    function: Any = load("trl.kernels:ChunkedLogProbFunction")
    hidden_TH, weight_VH, target_T = operands.case[:3]
    outputs = ("entropy",) if job.entropy else ()
    return Answer(*function.apply(hidden_TH, weight_VH, None, target_T, 1.0, 8192, None, 1.0, outputs)[:2])


def _liger_scaled(operands: Operands, job: Job) -> Answer:
    function: Any = load("liger_kernel.ops:LigerFusedLinearScaledCrossEntropyFunction")
    found = function.apply(*operands.case[:3], return_entropy=job.entropy)
    return Answer(-found[0], found[1].float()) if job.entropy else Answer(-found)


def _liger_linear(operands: Operands, job: Job) -> Answer:
    function: Any = load("liger_kernel.transformers.functional:liger_fused_linear_cross_entropy")
    found = function(*operands.case[:3], reduction="mean")
    return Answer(loss=found[0] if isinstance(found, tuple) else found)


def _cce(operands: Operands, job: Job, *, filter_eps: str | None) -> Answer:
    function: Any = load("cut_cross_entropy:linear_cross_entropy")
    return Answer(-function(*operands.case[:3], reduction="none", filter_eps=filter_eps).float())


@functools.cache
def _verl_file(*path: str) -> ModuleType:
    """One file of verl, without the package, which imports Ray."""
    root = importlib.util.find_spec("verl")
    if root is None or not root.submodule_search_locations:
        raise ModuleNotFoundError("No module named 'verl'")
    file = Path(root.submodule_search_locations[0]).joinpath(*path)
    spec = importlib.util.spec_from_file_location("verl_" + file.stem, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _verl_torch(operands: Operands, job: Job) -> Answer:
    fused = _verl_file("utils", "experimental", "torch_functional.py").FusedLinearForPPO()
    logprob_T, entropy_T = fused(*operands.case[:3])
    return Answer(logprob_T, entropy_T.float())


@functools.cache
def _verl_triton_call() -> Any:
    """Its linear_cross_entropy, which imports its kernels when it is called. Where verl itself cannot be imported (its
    wheel was carried here without Ray), the packages on the way are entered without their own code."""
    where = importlib.util.find_spec("verl")
    try:
        return load("verl.utils.kernel.linear_cross_entropy:linear_cross_entropy")
    except ImportError:
        if where is None or not where.submodule_search_locations:
            raise
    root = Path(where.submodule_search_locations[0])
    for name in [name for name in sys.modules if name.partition(".")[0] == "verl"]:
        del sys.modules[name]  # what the import had loaded before it failed
    for inner in ((), ("utils",), ("utils", "kernel")):
        spec = ModuleSpec(".".join(("verl", *inner)), None, is_package=True)
        spec.submodule_search_locations = [str(root.joinpath(*inner))]
        sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    return load("verl.utils.kernel.linear_cross_entropy:linear_cross_entropy")


def _verl_triton(operands: Operands, job: Job) -> Answer:
    function = _verl_triton_call()
    return Answer(*function(*operands.case[:3], 1.0, "none"))


def _quack(operands: Operands, job: Job) -> Answer:
    function: Any = load("quack.linear_cross_entropy:chunked_linear_cross_entropy")
    return Answer(loss=function(*operands.case[:3], reduction="mean"))


def _flash(operands: Operands, job: Job) -> Answer:
    function: Any = load("flash_attn.ops.triton.cross_entropy:cross_entropy_loss")
    hidden_TH, weight_VH, target_T = operands.case[:3]
    return Answer(-function(hidden_TH @ weight_VH.T, target_T, inplace_backward=True)[0])


PACKAGES = (
    Rival(
        name="trl_chunked", call=_trl, packages=("trl",), gives=BOTH,
        settings="ChunkedLogProbFunction, its trainers' vocabulary chunk of 8,192",
    ),
    Rival(
        name="liger_scaled_ce", call=_liger_scaled, packages=("liger_kernel",), gives=BOTH,
        settings="fused linear scaled cross entropy: CuTe on compute capability 9.0, its torch fallback elsewhere",
        gradient_error=8e-2,  # its entropy is rounded to bf16 before the gradient is made of it
    ),
    Rival(
        name="liger_linear_ce", call=_liger_linear, packages=("liger_kernel",), gives=frozenset(), gpu=True,
        recomputes=False, settings="fused linear cross entropy, reduction mean, gradients in the forward",
        jobs=frozenset({"mean_loss"}),
    ),
    Rival(
        name="cce", call=functools.partial(_cce, filter_eps="high"), packages=("cut_cross_entropy",), gives=UPSTREAM,
        gpu=True, capability=(8, 0), settings="cut-cross-entropy, its default filter of small gradients",
        gradient_error=0.5,  # the filter drops them whatever their upstream gradient is; the table shows by how much
    ),
    Rival(
        name="cce_exact", call=functools.partial(_cce, filter_eps=None), packages=("cut_cross_entropy",),
        gives=UPSTREAM, gpu=True, capability=(8, 0), settings="cut-cross-entropy without its filter",
        gradient_error=0.1,
    ),
    Rival(
        name="verl_torch", call=_verl_torch, packages=("verl",), gives=BOTH,
        settings="FusedLinearForPPO, torch backend, chunks of 512 tokens", gradient_error=8e-2, honours_frozen=True,
    ),
    Rival(
        name="verl_triton", call=_verl_triton, packages=("verl",), gives=BOTH, gpu=True, hidden_multiple=128,
        settings="linear_cross_entropy, vocabulary splits of 9,504", honours_frozen=False, gradient_error=8e-2,
    ),
    Rival(
        name="quack", call=_quack, packages=("quack",), gives=frozenset(), gpu=True, capability=(9, 0),
        hidden_multiple=8, vocab_multiple=8, recomputes=False, jobs=frozenset({"mean_loss"}),
        settings="chunked_linear_cross_entropy, tuned, chunks of 4,096, scaled exponentials where they are supported",
    ),
    Rival(
        name="flash_attn_ce", call=_flash, packages=("flash_attn",), gives=UPSTREAM, gpu=True, recomputes=False,
        settings="bf16 logits, its Triton cross entropy with the gradient in place of the logits",
    ),
)  # fmt: skip
