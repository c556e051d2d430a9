"""The demo's task and its warm start: a byte-level model that half knows how to write two numbers that add up to N.

The prompt is `NN=`, the right answers are all `a+b` with a + b = N, so entropy is worth something: a policy that has
collapsed still scores, but knows one answer a prompt. The warm start is ordinary supervised training on random correct
sums; towards its end half of them are wrong by a little, so that the policy starts diverse, and with much to learn.
Another task brings `Lessons` of its own.
"""

import hashlib
import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.progress import track
from torch.nn.functional import cross_entropy
from transformers.utils.logging import disable_progress_bar

from entrocraft.train.config_model import TinyModelConfig
from entrocraft.train.tiny_model import build_tiny_model

SMALLEST, LARGEST = 20, 99
STEPS, BATCH, LEARNING_RATE, BETAS = 900, 128, 5e-3, (0.9, 0.98)
NOISY_SHARE = 0.3
"""Last part of the warm start, in which half of the demonstrations are wrong."""
ERRORS = (-11, -10, -5, -2, -1, 1, 2, 5, 10, 11)
VERSION = 3
"""Raise it when anything here changes: it is part of the name of the cached model."""


@dataclass(frozen=True, kw_only=True)
class Lessons:
    """What a warm start teaches, and for how long."""

    key: str
    """Part of the name of the cached model: a new one whenever anything below changes its meaning."""
    demonstration: Callable[[random.Random, bool], str]
    """Prompt and answer in one, drawn from the generator; some of the noisy ones (True) are wrong."""
    prompt_tokens: int
    """Tokens of every prompt, on which nothing is learnt."""
    steps: int = STEPS
    batch: int = BATCH
    learning_rate: float = LEARNING_RATE
    """At the first step; it falls linearly to 0."""


def is_held_out(n: int) -> bool:
    """One number in five is kept from reinforcement; the warm start, like any pretraining, has seen all of them."""
    return n % 5 == 3


def write_problems(folder: Path) -> tuple[Path, Path]:
    """Writes `train.jsonl` and `held_out.jsonl`, one `{"prompt": "47=", "answer": "47"}` a line; returns both
    paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = folder / "train.jsonl", folder / "held_out.jsonl"
    for path, wanted in zip(paths, (False, True), strict=True):
        numbers = [n for n in range(SMALLEST, LARGEST + 1) if is_held_out(n) == wanted]
        path.write_text("".join(json.dumps({"prompt": f"{n}=", "answer": str(n)}) + "\n" for n in numbers))
    return paths


def _demonstration(rng: random.Random, noisy: bool) -> str:
    n = rng.randint(SMALLEST, LARGEST)
    total = n + rng.choice(ERRORS) if noisy and rng.random() < 0.5 else n
    a = rng.randint(0, total)
    return f"{n}={a}+{total - a}"


SUMS = Lessons(key=str(VERSION), demonstration=_demonstration, prompt_tokens=len("00="))


def _batch(texts: list[str], tokenizer: Any, prompt_length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids [B, L] and labels [B, L] of the next token; -100 where the next token is prompt or padding."""
    rows = [tokenizer.encode(text) for text in texts]  # ends with the end mark
    width = max(map(len, rows))
    tokens_BL = torch.full((len(rows), width), tokenizer.pad_token_id)
    for i, row in enumerate(rows):
        tokens_BL[i, : len(row)] = torch.tensor(row)
    labels_BL = tokens_BL[:, 1:].clone()
    labels_BL[labels_BL == tokenizer.pad_token_id] = -100
    labels_BL[:, : prompt_length - 1] = -100
    return tokens_BL[:, :-1], labels_BL


def warm_start(
    folder: Path,
    shape: TinyModelConfig,
    seed: int,
    *,
    steps: int | None = None,
    lessons: Lessons = SUMS,
    device: torch.device | None = None,
) -> Path:
    """Trains the model and writes it as a Hugging Face folder, unless a finished one is there; returns that folder.

    On the CPU, the default device, a function of its arguments: the random numbers come from `seed` alone. `steps`
    stands in for the lessons' own.
    """
    steps = lessons.steps if steps is None else steps
    digest = hashlib.sha256(f"{lessons.key} {shape} {seed} {steps}".encode()).hexdigest()[:12]
    place = folder / f"warm_start-seed{seed}-{digest}"
    if (place / "tokenizer_config.json").is_file():
        return place
    rng = random.Random(seed)
    model, tokenizer = build_tiny_model(shape, seed)
    device = device or torch.device("cpu")
    model.to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lessons.learning_rate, betas=BETAS)
    for step in track(range(steps), description="warm start (supervised)"):
        noisy = step >= (1 - NOISY_SHARE) * steps
        texts = [lessons.demonstration(rng, noisy) for _ in range(lessons.batch)]
        inputs_BL, labels_BL = (tensor.to(device) for tensor in _batch(texts, tokenizer, lessons.prompt_tokens))
        for group in optimizer.param_groups:
            group["lr"] = lessons.learning_rate * (1 - step / steps)
        logits_BLV = model(inputs_BL, use_cache=False).logits
        cross_entropy(logits_BLV.flatten(0, 1), labels_BL.flatten()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    aside = place.with_name(place.name + ".writing")
    disable_progress_bar()
    model.save_pretrained(aside)
    tokenizer.save_pretrained(aside)
    aside.rename(place)
    return place
