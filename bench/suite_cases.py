"""What the suite measures: named heads, jobs, and operands as random or as peaked as asked for."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from typing import NamedTuple

import torch
from head_cases import Case
from torch import Tensor

# H, V. "gpt_oss" has a vocabulary that no tile divides and a hidden size that 128 does not.
HEADS = {
    "tiny": (32, 512),
    "small": (128, 8_192),
    "cpu": (1_024, 151_936),
    "qwen3_4b": (2_560, 151_936),
    "qwen3_8b": (4_096, 151_936),
    "llama31_8b": (4_096, 128_256),
    "gemma3_4b": (2_560, 262_144),
    "gpt_oss": (2_880, 201_088),
    "llama3_70b": (8_192, 128_256),
}
DATA = ("peaked", "random")
# Triton's interpreter multiplies the raw bits of bf16 numbers; fp32 is what it gets right.
DTYPE = torch.float32 if os.environ.get("TRITON_INTERPRET") == "1" else torch.bfloat16
TOP_LOGIT, MARGIN = 25.0, 3.0  # nats: the peak's logit, and how far the noise's log-sum-exp stays below it


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What a caller wants of a head."""

    title: str
    needs: frozenset[str] = frozenset()
    """Of a contender: "entropy", "entropy_grad", "upstream" (a gradient of each token), "row_temperature"."""
    gradients: int = 2
    """0: none; 1: of hidden, the head is frozen; 2: of hidden and weight."""
    entropy: bool = False
    """The entropy is wanted, and where there are gradients its gradient too."""
    zero_rows: float = 0.0
    """Share of rows, at random, whose upstream gradient is zero."""
    row_temperature: bool = False

    def useful_products(self) -> float:
        """Products of 2 T V H operations that nobody can do without, keeping all that fits nowhere."""
        return 1.0 + self.gradients * (1.0 - self.zero_rows)


def _job(title: str, needs: str = "", **more: int | float | bool) -> Job:
    return Job(title=title, needs=frozenset(needs.split()), **more)  # pyright: ignore[reportArgumentType]


JOBS = {
    "statistics": _job("log-probability and entropy, no gradient", "entropy", gradients=0, entropy=True),
    "logprob": _job("gradient of the log-probability", "upstream"),
    "both": _job("gradients of log-probability and entropy", "upstream entropy entropy_grad", entropy=True),
    "frozen": _job("log-probability, frozen head", "upstream", gradients=1),
    "half_zero": _job("log-probability, half of the rows without a gradient", "upstream", zero_rows=0.5),
    "tenth_live": _job("log-probability, 90 % of the rows without a gradient", "upstream", zero_rows=0.9),
    "row_temperature": _job("log-probability, a temperature a token", "upstream row_temperature", row_temperature=True),
    "mean_loss": _job("mean loss, one upstream gradient for all"),
}


class Shape(NamedTuple):
    """T tokens, H hidden, V vocabulary."""

    T: int
    H: int
    V: int

    def product_operations(self) -> float:
        """Operations of one matrix product of the head."""
        return 2.0 * self.T * self.V * self.H

    def operand_bytes(self, itemsize: int = 2) -> int:
        """hidden and weight."""
        return itemsize * self.H * (self.T + self.V)


def shapes(heads: list[str], tokens: list[int], vocab: list[int]) -> list[tuple[str, Shape]]:
    """Every head with every T, and with every V instead of its own where there are any."""
    return [(head, Shape(T, HEADS[head][0], V)) for head in heads for V in vocab or [HEADS[head][1]] for T in tokens]


class Operands(NamedTuple):
    """A case, and the temperature of each token (None: 1)."""

    case: Case
    temperature_T: Tensor | None


def make_operands(shape: Shape, job: Job, data: str, *, device: str, dtype: torch.dtype = DTYPE) -> Operands:
    """The same for the same arguments.

    peaked: weight ~ N(0, 1/H), hidden = 25 weight[y] + noise, whose spread puts the log-sum-exp of all other tokens
    3 nats below 25: mean entropy 0.3 to 1.5 nats, mean top logit 18 to 30, for V of 2,000 to 262,144 and H >= 64. Half
    of the targets are another token than the peak. random: logits ~ N(0, 1), nearly uniform; what published numbers are
    mostly of.

    Raises:
        ValueError: unknown data.
    """
    if data not in DATA:
        raise ValueError(f"data is {data!r}; expected one of {', '.join(DATA)}")
    T, H, V = shape
    torch.manual_seed(T + V + H)
    weight_VH = torch.randn(V, H, device=device).div_(H**0.5)
    target_T = torch.randint(0, V, (T,), device=device)
    hidden_TH = torch.randn(T, H, device=device)
    if data == "peaked":
        spread = 2.0 * (TOP_LOGIT - MARGIN - math.log(V)) - TOP_LOGIT**2 / H
        hidden_TH.mul_(math.sqrt(max(spread, 0.0))).add_(weight_VH[target_T], alpha=TOP_LOGIT)
        target_T[::2] = torch.randint(0, V, (len(target_T[::2]),), device=device)
    live_T = torch.rand(T, device=device) >= job.zero_rows
    up_T = torch.randn(T, device=device) * live_T / T
    if "upstream" not in job.needs and job.gradients:
        up_T = torch.full((T,), 1.0 / T, device=device)
    case = Case(
        hidden_TH.to(dtype).requires_grad_(job.gradients > 0),
        weight_VH.to(dtype).requires_grad_(job.gradients > 1),
        target_T,
        up_T,
        torch.randn(T, device=device) * live_T / T if job.entropy else torch.zeros(T, device=device),
    )
    temperature_T = torch.rand(T, device=device).add_(0.5) if job.row_temperature else None
    return Operands(case, temperature_T)
