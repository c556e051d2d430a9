"""A whole optimizer update of a tiny model: this project's step, and TRL's GRPOTrainer on the same rollouts.

    pytest bench/bench_train_step.py
    python bench/suite_trl_step.py --head qwen3_4b --layers 4 --largest   # real sizes, on a GPU: a process each

Checked first: loss and norm of the gradient against plain fp64 torch, one rollout at a time.
"""

from __future__ import annotations

import functools
import statistics
from typing import Any

import pytest
import torch
from suite_cases import HEADS, Shape
from suite_choice import chosen, nobody
from suite_contest import CLOCK, Contender, Measured, compete, record
from suite_trl_step import Size, build, make_model, make_rollouts

NAMES = ("entrocraft", "trl")
SIZE = Size("tiny", layers=2, rollouts=8, prompt=16, response=32, microbatch=4)


def exact_update(size: Size, device: str) -> tuple[float, float]:
    """Loss and norm of the gradient on policy, in fp64: -mean over tokens of A r, where r = 1."""
    model = make_model(size, device).double()
    rollouts, advantage_R = make_rollouts(size)
    T, total = len(rollouts.token_T), 0.0
    for number, tokens in enumerate(rollouts.token_T.split(rollouts.length_R.tolist())):
        prompt = rollouts.prompts[int(rollouts.group_R[number])]
        ids = torch.cat([torch.tensor(prompt), tokens])[None].to(device)
        logp = model(input_ids=ids).logits[0, len(prompt) - 1 : -1].double().log_softmax(1)
        logprob = logp.gather(1, tokens[:, None].to(device))
        loss = -(float(advantage_R[number]) * (logprob - logprob.detach()).exp()).sum() / T
        loss.backward()
        total += float(loss.detach())
    norm = torch.nn.utils.get_total_norm([value.grad for value in model.parameters()])
    return total, float(norm)


def useful_operations(size: Size) -> float:
    """Six a token and weight: layers for every token, the head for response tokens. Attention itself is not counted,
    nor what padding or a recomputed head add."""
    rollouts, _ = make_rollouts(size)
    H, V = HEADS[size.head]
    layers = sum(value.numel() for value in make_model(size, "cpu").parameters()) - V * H
    response = len(rollouts.token_T)
    return 6.0 * (layers * (response + size.rollouts * size.prompt) + V * H * response)


@functools.lru_cache(maxsize=1)
def group(device: str, rounds: int, names: tuple[str, ...]) -> dict[str, Measured | str]:
    """Ours and TRL's. The first update is the one that is checked: the later ones start from other weights."""
    loss, norm = exact_update(SIZE, device)
    most = 1e-5 if device == "cpu" else 2e-2
    field = {}
    for name in names:
        update, _ = build(name, SIZE, device)
        first = update()
        errors = {"loss": abs(first[0] / loss - 1.0), "grad_norm": abs(first[1] / norm - 1.0)}
        settings = "packed micro-batches, fused head" if name == "entrocraft" else "GRPOTrainer, chunked head, padding"
        bounds = {"loss": most, "grad_norm": 10 * most}
        field[name] = Contender(functools.partial(_silent, update), settings, functools.partial(_known, errors), bounds)
    return compete(field, device, rounds)


def _silent(update: Any) -> None:
    update()  # its numbers change from update to update, and are no matter for a comparison of bits


def _known(errors: dict[str, float], made: None) -> dict[str, float]:
    return errors


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A benchmark for each contender."""
    config: Any = metafunc.config
    metafunc.parametrize("name", chosen(config, NAMES) or [nobody(config, 1, NAMES)])


@pytest.mark.benchmark(timer=CLOCK)
def bench_train_step(request: pytest.FixtureRequest, benchmark: Any, rates: Any, name: str) -> None:
    """One update of eight rollouts: forward, backward, clipping, AdamW."""
    config: Any = request.config
    device = config.getoption("device")
    if device == "cuda":
        pytest.importorskip("transformers")
        pytest.importorskip("trl")
    found = group(device, 1 if benchmark.disabled else config.getoption("bench_rounds"), chosen(config, NAMES))
    benchmark.group = "train step"
    info: dict[str, Any] = {"job": "train_step", "data": "random model", "repeats": None, **SIZE._asdict()}
    if isinstance(measured := found[name], Measured):
        H, V = HEADS[SIZE.head]
        rate, operations = rates[Shape(SIZE.rollouts * SIZE.response, H, V)], 1e-12 * useful_operations(SIZE)
        info |= {"useful_tflops": operations / statistics.median(measured.seconds), **rate}
        info |= {"floor_ms": 1e3 * operations / rate["gemm_tflops"]}
    record(benchmark, found[name], **info)
