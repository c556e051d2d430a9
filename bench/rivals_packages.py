"""Rivals from packages: TRL, Liger, cut-cross-entropy, verl, quack, flash-attention; restrictions are theirs."""

from __future__ import annotations

import functools
import importlib.util
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from rivals import Answer, Rival, load
from rivals_trl import chunked_logprob, chunked_setting
from suite_cases import Job, Operands, Shape

UPSTREAM = frozenset({"upstream"})
BOTH = frozenset({"upstream", "entropy", "entropy_grad"})


def _trl(operands: Operands, job: Job) -> Answer:
    return Answer(*chunked_logprob(*operands.case[:3], entropy=job.entropy))


def _liger_scaled(operands: Operands, job: Job) -> Answer:
    function: Any = load("liger_kernel.ops:LigerFusedLinearScaledCrossEntropyFunction")
    found = function.apply(*operands.case[:3], return_entropy=job.entropy)
    return Answer(-found[0], found[1].float()) if job.entropy else Answer(-found)


def _liger_linear(operands: Operands, job: Job, *, accum_dtype: torch.dtype | None = None) -> Answer:
    function: Any = load("liger_kernel.transformers.functional:liger_fused_linear_cross_entropy")
    return Answer(loss=function(*operands.case[:3], reduction="mean", accum_dtype=accum_dtype))


def _liger_tokens(operands: Operands, job: Job) -> Answer:
    function: Any = load("liger_kernel.transformers.functional:liger_fused_linear_cross_entropy")
    return Answer(-function(*operands.case[:3], reduction="none", accum_dtype=torch.float32).float())


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


def _quack_scaled(shape: Shape, device: str) -> bool:
    """Whether it takes the path of scaled exponentials, which pads the tokens; its other path asserts T % 8 == 0."""
    return device == "cuda" and torch.cuda.get_device_capability() == (9, 0) and shape.V % 128 == shape.H % 8 == 0


def _flash(operands: Operands, job: Job) -> Answer:
    function: Any = load("flash_attn.ops.triton.cross_entropy:cross_entropy_loss")
    hidden_TH, weight_VH, target_T = operands.case[:3]
    return Answer(-function(hidden_TH @ weight_VH.T, target_T, inplace_backward=True)[0])


PACKAGES = (
    Rival(
        name="trl_chunked", call=_trl, packages=("trl",), gives=BOTH,
        settings=chunked_setting(),
    ),
    Rival(
        name="liger_scaled_ce", call=_liger_scaled, packages=("liger_kernel",), gives=BOTH,
        settings="fused linear scaled cross entropy: CuTe on compute capability 9.0, its torch fallback elsewhere",
        honours_frozen=False,  # its fallback makes both gradients of a chunk and drops one; its kernels make both
        gradient_error=8e-2,  # its entropy is rounded to bf16 before the gradient is made of it
    ),
    Rival(
        name="liger_linear_ce", call=_liger_linear, packages=("liger_kernel",), gives=frozenset(), gpu=True,
        recomputes=False, settings="fused linear cross entropy, reduction mean, gradients in the forward",
        jobs=frozenset({"mean_loss"}),
    ),
    Rival(
        name="liger_linear_ce_fp32", call=functools.partial(_liger_linear, accum_dtype=torch.float32),
        packages=("liger_kernel",), gives=frozenset(), gpu=True, recomputes=False, jobs=frozenset({"mean_loss"}),
        settings="the same with accum_dtype fp32, as its authors advise where training is unstable",
    ),
    Rival(
        name="liger_linear_ce_tokens", call=_liger_tokens, packages=("liger_kernel",), gives=UPSTREAM, gpu=True,
        settings="fused linear cross entropy, reduction none, accum_dtype fp32, gradients in the backward",
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
        settings="FusedLinearForPPO, torch backend, chunks of 512 tokens", gradient_error=8e-2,
        honours_frozen=False,  # likewise
    ),
    Rival(
        name="verl_triton", call=_verl_triton, packages=("verl",), gives=BOTH, gpu=True, hidden_multiple=128,
        settings="linear_cross_entropy, vocabulary splits of 9,504", honours_frozen=False, gradient_error=8e-2,
    ),
    Rival(
        name="quack", call=_quack, packages=("quack",), gives=frozenset(), gpu=True, capability=(9, 0),
        hidden_multiple=8, vocab_multiple=8, tokens_multiple=8, any_tokens=_quack_scaled, recomputes=False,
        jobs=frozenset({"mean_loss"}),
        settings="chunked_linear_cross_entropy, tuned, chunks of 4,096, scaled exponentials where they are supported",
    ),
    Rival(
        name="flash_attn_ce", call=_flash, packages=("flash_attn",), gives=UPSTREAM, gpu=True, recomputes=False,
        settings="bf16 logits, its Triton cross entropy with the gradient in place of the logits",
    ),
)  # fmt: skip
