"""How fast the phases of a step go, how much of the device's arithmetic they use, and how much memory they take.

Operations are the model's own, whatever is recomputed on the way (as MFU is meant): for n tokens of sequences of length
L_i, of which N reach the head, with B parameters in the blocks,

    forward     2 B n  +  2 layers heads width sum_i L_i^2  +  2 V H N
    update      three times that: forward, and two products backward for each

(attention is causal: half of 4 layers heads width L^2). Speeds are of all ranks together, TFLOP/s and MFU of one.
"""

import os
import resource
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from entrocraft import Rollouts
from entrocraft.train.packing import sequence_lengths
from entrocraft.train.sharding import blocks

# Dense bf16 tensor-core FLOP/s, from NVIDIA's data sheets, by what a device's name holds. The first that fits.
PEAKS = (
    ("GB200", 2500e12),
    ("B200", 2250e12),
    ("H100 NVL", 835e12),
    ("H100 PCIe", 756e12),
    ("H100", 989e12),
    ("H200", 989e12),
    ("H800", 989e12),
    ("A100", 312e12),
    ("L40S", 362e12),
    ("RTX 4090", 165e12),
)


def peak_flops(device: torch.device) -> float | None:
    """What the device could do in bf16; None where that is not known, as on a CPU."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAKS if part in name), None)


@dataclass(frozen=True, slots=True)
class Work:
    """Sequences that went through the model: their tokens, the sum of their squared lengths, and head rows."""

    tokens: int = 0
    squares: int = 0
    rows: int = 0

    NAMES: ClassVar = ("update_tokens", "update_squares", "update_rows")
    """Metrics of an update that say the same."""

    def as_dict(self) -> dict[str, float]:
        """By those names."""
        return dict(zip(Work.NAMES, map(float, (self.tokens, self.squares, self.rows)), strict=True))

    @staticmethod
    def taken_from(row: dict[str, Any]) -> "Work":
        """The reverse; takes the sum of squares, which is of no use to a reader, out of the metrics."""
        tokens, squares, rows = (row.pop(name) if name == "update_squares" else row[name] for name in Work.NAMES)
        return Work(int(tokens), int(squares), int(rows))

    @staticmethod
    def of(rollouts: Rollouts, chosen: Sequence[int]) -> "Work":
        """The rollouts with the indices `chosen`, prompt and response, once through."""
        lengths, response_R = sequence_lengths(rollouts, chosen), rollouts.length_R.tolist()
        return Work(sum(lengths), sum(n * n for n in lengths), sum(response_R[r] for r in chosen))


@dataclass(frozen=True, slots=True)
class ModelCost:
    """What a token costs."""

    blocks: int
    """Parameters in the blocks."""
    attention: int
    """layers x heads x width."""
    head: int
    """V x H."""

    @staticmethod
    def of(model: Any) -> "ModelCost":
        """Of a Hugging Face causal LM, sharded or not."""
        config = model.config.get_text_config(decoder=True)
        layers = list(blocks(model))
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return ModelCost(
            sum(parameter.numel() for block in layers for parameter in block.parameters()),
            len(layers) * config.num_attention_heads * width,
            model.get_output_embeddings().weight.numel(),
        )

    def forward(self, work: Work) -> float:
        """Operations of a forward pass."""
        return 2.0 * (self.blocks * work.tokens + self.attention * work.squares + self.head * work.rows)


@dataclass(slots=True)
class Lap:
    """What a phase of a step took so far: seconds, tokens, this rank's operations, and GB at its worst."""

    seconds: float = 0.0
    tokens: int = 0
    operations: float = 0.0
    memory: float = 0.0


class Clock:
    """Time, work and memory of the phases of a step, from its construction on.

    model: whose cost counts; without it there are seconds alone. ranks: how many share the work.
    """

    def __init__(self, model: Any = None, *, device: torch.device | None = None, ranks: int = 1) -> None:
        self.cost = None if model is None else ModelCost.of(model)
        self.device, self.ranks = device or torch.device("cpu"), ranks
        self.peak = peak_flops(self.device)
        self.laps: dict[str, Lap] = {}
        self._watch_memory()
        self.started = self.last = time.perf_counter()

    def lap(self, phase: str, *, tokens: int = 0, forward: Work | None = None, passes: int = 1) -> None:
        """Ends a phase, which began where the one before it ended. One that comes again is added to what it was.

        tokens: what its speed is counted in. forward: what went through the model, `passes` times the work of a forward
        pass (3 with the backward pass).
        """
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        now = time.perf_counter()
        lap = self.laps.setdefault(phase, Lap())
        lap.seconds += now - self.last
        lap.tokens += tokens
        if forward is not None and self.cost is not None:
            lap.operations += passes * self.cost.forward(forward) / self.ranks
        lap.memory = max(lap.memory, self._memory() / 1e9)
        self.last = now
        self._watch_memory()

    def metrics(self, tokens: int) -> dict[str, float]:
        """All of it by phase; seconds and response tokens per second of the whole step; GB, the most of any phase."""
        found: dict[str, float] = {}
        for phase, lap in self.laps.items():
            found[f"seconds_{phase}"] = lap.seconds
            if lap.tokens:
                found[f"tokens_per_second_{phase}"] = lap.tokens / lap.seconds
            if lap.operations:
                found[f"tflops_{phase}"] = lap.operations / lap.seconds / 1e12
                if self.peak is not None:
                    found[f"mfu_{phase}"] = lap.operations / lap.seconds / self.peak
            found[f"memory_{phase}"] = lap.memory
        seconds = self.last - self.started
        most = max((lap.memory for lap in self.laps.values()), default=0.0)
        return {**found, "seconds": seconds, "tokens_per_second": tokens / seconds, "memory": most}

    def _watch_memory(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)

    def _memory(self) -> int:
        """CUDA: the most that tensors took in this phase. CPU: what the process has at its end."""
        return torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else resident_bytes()


def resident_bytes() -> int:
    """Memory of this process that is in RAM now; the most there ever was where the system does not tell."""
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
