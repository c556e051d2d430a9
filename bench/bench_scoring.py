"""A whole model's scoring pass: log-probability and entropy of every response token, without gradients.

    pytest bench/bench_scoring.py [--heads qwen3_4b --tokens 8192]

A Qwen3 of two layers with random weights and the head that is asked for, in bf16; sequences of 128 tokens, all of which
are scored; a ragged last one is padded, and its padding does not count. Ours asks the model for hidden states and also
gives the collision sums that the controller needs.
"""

from __future__ import annotations

import functools
import importlib.util
import math
import statistics
from collections.abc import Callable
from typing import Any

import pytest
import torch
from rivals import load
from rivals_trl import chunked_logprob, chunked_setting
from suite_cases import Shape
from suite_choice import chosen, spread
from suite_contest import CLOCK, Contender, Measured, compete, record
from suite_errors import value_errors
from suite_rates import Work, derived
from torch import Tensor

from entrocraft.kernels import FusedHead

SEQUENCE = 128
Call = Callable[[Any, Tensor, Tensor], tuple[Tensor, Tensor]]


def make_model(shape: Shape, device: str) -> Any:
    """Two layers, random weights."""
    transformers: Any = pytest.importorskip("transformers")
    heads = max(2, shape.H // 128)
    config = transformers.Qwen3Config(
        vocab_size=shape.V, hidden_size=shape.H, num_hidden_layers=2, num_attention_heads=heads,
        num_key_value_heads=heads // 2, head_dim=shape.H // heads, intermediate_size=3 * shape.H,
        max_position_embeddings=4 * SEQUENCE, tie_word_embeddings=True, initializer_range=2.0 / math.sqrt(shape.H),
    )  # fmt: skip
    torch.manual_seed(0)
    return transformers.Qwen3ForCausalLM(config).to(device, torch.bfloat16).eval()


def make_batch(shape: Shape, device: str) -> tuple[Tensor, Tensor]:
    """Sequences of 128 tokens, or one of T, the last padded with zeros; the targets of all places, packed.

    Causal attention: what stands behind the T tokens does not change them.
    """
    length = min(SEQUENCE, shape.T)
    input_T = torch.randint(0, shape.V, (shape.T,), device=device)
    rows = -(-shape.T // length)
    input_BL = torch.nn.functional.pad(input_T, (0, rows * length - shape.T)).view(rows, length)
    return input_BL, input_BL.flatten().roll(-1)


@functools.cache
def weights(shape: Shape) -> int:
    """Of the layers and the head, which is the embedding too."""
    return sum(value.numel() for value in make_model(shape, "meta").parameters())


def _ours(model: Any, input_BL: Tensor, target_T: Tensor) -> tuple[Tensor, Tensor]:
    stats = FusedHead(model)(target_T, input_ids=input_BL, collision=True)
    return stats.logprob_T, stats.entropy_T


def _logits(model: Any, input_BL: Tensor, target_T: Tensor) -> tuple[Tensor, Tensor]:
    logp_TV = model(input_ids=input_BL).logits.flatten(0, 1).float().log_softmax(1)
    return logp_TV.gather(1, target_T[:, None])[:, 0], -(logp_TV.exp() * logp_TV).sum(1)


def _trl_rows(model: Any, input_BL: Tensor, target_T: Tensor) -> tuple[Tensor, Tensor]:
    one: Any = load("trl.trainer.utils:selective_log_softmax")
    entropy: Any = load("trl.trainer.utils:entropy_from_logits")
    logit_TV = model(input_ids=input_BL).logits.flatten(0, 1)
    return one(logit_TV, target_T), entropy(logit_TV)


def _trl_chunked(model: Any, input_BL: Tensor, target_T: Tensor) -> tuple[Tensor, Tensor]:
    hidden_TH = model.model(input_ids=input_BL).last_hidden_state.flatten(0, 1)
    logprob_T, entropy_T = chunked_logprob(hidden_TH, model.lm_head.weight, target_T, entropy=True)
    assert entropy_T is not None
    return logprob_T, entropy_T


CALLS: dict[str, tuple[Call, str, str | None, float]] = {  # call, settings, package, bound of the mean error in nats
    "entrocraft": (_ours, "FusedHead, collision sums too", None, 2e-5),
    "eager": (_logits, "the model's bf16 logits, fp32 log_softmax", None, 0.1),
    "trl_rows": (_trl_rows, "bf16 logits, selective_log_softmax and entropy_from_logits", "trl", 0.3),
    "trl_chunked": (_trl_chunked, chunked_setting(), "trl", 0.1),
}


@functools.lru_cache(maxsize=1)
@torch.no_grad()
def group(shape: Shape, device: str, rounds: int, names: tuple[str, ...]) -> dict[str, Measured | str]:
    """All contenders that are installed, on one model and one batch; the truth is the head in fp64 on its hidden."""
    model = make_model(shape, device)
    input_BL, target_T = make_batch(shape, device)
    some = torch.linspace(0, shape.T - 1, min(64, shape.T), device=device).long()  # the ragged end among them
    hidden_NH = model.model(input_ids=input_BL).last_hidden_state.flatten(0, 1)[some].double()
    logp_NV = (hidden_NH @ model.lm_head.weight.double().T).log_softmax(1)
    logprob_N = logp_NV.gather(1, target_T[some, None])[:, 0]
    entropy_N = -(logp_NV.exp() * logp_NV).sum(1)

    def errors(made: tuple[Tensor, Tensor]) -> dict[str, float]:
        found = value_errors("logprob", made[0][some], logprob_N)
        return found | value_errors("entropy", made[1][some], entropy_N)

    def scored(call: Call) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            logprob_T, entropy_T = call(model, input_BL, target_T)
        return logprob_T[: shape.T], entropy_T[: shape.T]

    field = {
        name: Contender(
            functools.partial(scored, call), settings, errors, {"logprob_mean": bound, "entropy_mean": bound}
        )
        for name, (call, settings, package, bound) in CALLS.items()
        if name in names and (package is None or importlib.util.find_spec(package))
    }
    return compete(field, device, rounds)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A benchmark for each head, T and contender."""
    spread(metafunc, CALLS)


@pytest.mark.benchmark(timer=CLOCK)
def bench_scoring(
    request: pytest.FixtureRequest, benchmark: Any, rates: Any, head: str, shape: Shape, name: str
) -> None:
    """One pass over all tokens."""
    config: Any = request.config
    device = config.getoption("device")
    rounds = 1 if benchmark.disabled else config.getoption("bench_rounds")
    found = group(shape, device, rounds, chosen(config, CALLS))
    if name not in found:
        (pytest.fail if device == "cpu" else pytest.skip)(f"{name}: {CALLS[name][2]} is not installed")
    benchmark.group = f"scoring {head} T={shape.T} V={shape.V}"
    info: dict[str, Any] = {"head": head, **shape._asdict(), "job": "scoring", "data": "random model"}
    if isinstance(measured := found[name], Measured):
        # Two operations a token and weight, the head's among them, for everybody; attention itself is not counted.
        # Every weight is read once.
        work = Work(2.0 * shape.T * weights(shape), 1.0, 1.0, 2 * weights(shape))
        info |= derived(work, statistics.median(measured.seconds), rates[shape])
    record(benchmark, found[name], **info)
