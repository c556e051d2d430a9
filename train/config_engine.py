"""Settings of how rollouts are drawn, by what, and of how far the sampler may be from the policy that learns."""

from dataclasses import dataclass
from typing import Literal

from entrocraft.train.config_check import require


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """How rollouts are drawn from the policy."""

    max_response_tokens: int = 1024
    """Longest response; a rollout that reaches it without an end mark is truncated."""
    temperature: float = 1.0
    """Logits are divided by it, in sampling and in scoring alike. Entropy is measured at this temperature."""
    top_p: float = 1.0
    """Nucleus sampling; 1 is off, as training needs the whole distribution."""
    top_k: int = 0
    """Sample among the k likeliest tokens; 0 is off."""
    rollouts_per_batch: int = 256
    """Rollouts generated at once (memory of the key-value cache)."""

    def __post_init__(self) -> None:
        require(
            self.max_response_tokens > 0,
            "sampling.max_response_tokens",
            self.max_response_tokens,
            "a positive number",
        )
        require(
            self.temperature > 0,
            "sampling.temperature",
            self.temperature,
            "a number above 0 (greedy decoding cannot be trained on)",
        )
        require(0 < self.top_p <= 1, "sampling.top_p", self.top_p, "a number in (0, 1]")
        require(self.top_k >= 0, "sampling.top_k", self.top_k, "0 or more")
        require(
            self.rollouts_per_batch > 0,
            "sampling.rollouts_per_batch",
            self.rollouts_per_batch,
            "a positive number",
        )


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """What generates the rollouts, and how it gets the policy's weights."""

    name: Literal["hf", "vllm", "vllm_server"] = "hf"
    """`hf`: transformers' generate, on the trained module itself. `vllm`: vLLM in this process, one a rank, sharing its
    device. `vllm_server`: a server started by `entrocraft serve`, on devices of its own."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """`vllm`: type of its weights; `auto` is bfloat16 on CUDA and float32 on the CPU."""
    memory: float = 0.5
    """`vllm`: share of the device's memory for its weights and its key-value cache."""
    eager: bool = False
    """`vllm`: without CUDA graphs: starts sooner, generates more slowly."""
    sleep: Literal["auto", "on", "off"] = "auto"
    """`vllm`: give weights and cache back while the policy learns, get them again with the next weights. `auto`: on
    CUDA, unless `engine.overlap`."""
    seeded: bool = True
    """vLLM: every rollout has a seed of its own, so that equal weights give equal rollouts. Off is a little faster."""
    url: str = "http://127.0.0.1:8000"
    """`vllm_server`: where it listens. Only over a network you trust: who reaches it can change its weights."""
    connections: int = 64
    """`vllm_server`: most prompts under way at once, from each rank."""
    transfer_dir: str = "/dev/shm"
    """`vllm_server`: folder that rank 0 writes weights to and the server reads them from; on one machine, memory is
    fastest."""
    transfer_mib: int = 1024
    """vLLM: MiB of weights that are under way at once."""
    check: Literal["held", "received"] = "held"
    """What is compared after each publication. `held`: what arrived, and what the sampler's parameters hold after it
    was loaded. `received`: what arrived alone, for formats that change values on loading, such as FP8."""
    start_timeout_s: float = 900.0
    """Seconds until a vLLM engine must be ready."""
    publish_timeout_s: float = 300.0
    """Seconds a publication of weights may take."""
    sample_timeout_s: float = 3600.0
    """Seconds a batch of rollouts may take."""
    overlap: bool = False
    """Draw the next step's rollouts while this step's are learnt from: they are one version of the weights older, which
    the importance weights correct for. Not with `hf`."""

    def __post_init__(self) -> None:
        require(0 < self.memory < 1, "engine.memory", self.memory, "a share between 0 and 1")
        for name in ("connections", "transfer_mib", "start_timeout_s", "publish_timeout_s", "sample_timeout_s"):
            require(getattr(self, name) > 0, f"engine.{name}", getattr(self, name), "a number above 0")
        require(
            not (self.overlap and self.name == "hf"),
            "engine.overlap",
            self.overlap,
            "false beside engine.name = 'hf', which samples from the very weights that are being changed",
        )
        require(
            not (self.overlap and self.sleep == "on"),
            "engine.sleep",
            self.sleep,
            "'auto' or 'off' beside engine.overlap: it generates while the policy learns",
        )
        require(
            self.url.startswith(("http://", "https://")), "engine.url", self.url, "an address such as http://host:8000"
        )


@dataclass(frozen=True, kw_only=True)
class ImportanceConfig:
    """Weights that correct for a sampler whose probabilities are not the policy's: `entrocraft.importance`."""

    correct: bool = True
    """Multiply each token's loss by its weight. In float32 with `engine.name: hf` the weights are 1 within rounding."""
    level: Literal["token", "sequence", "geometric"] = "token"
    """Ratio of a token, of a whole rollout, or the geometric mean over a rollout."""
    action: Literal["truncate", "mask", "reject"] = "truncate"
    """What is done with ratios beyond the bounds: cut to the upper one, dropped, or dropped with all others at 1."""
    low: float = 0.0
    """Lower bound of the ratio, for `mask` and `reject`."""
    high: float = 2.0
    """Upper bound of the ratio."""
    normalise: bool = False
    """Divide by the mean weight, so that the step keeps its size."""


@dataclass(frozen=True, kw_only=True)
class MismatchConfig:
    """When the distance between the sampler's and the policy's log-probabilities is news."""

    alarm_factor: float = 4.0
    """Alarm when the mean absolute difference of a step is so many times its median over the last 20 steps."""
    alarm_floor: float = 0.02
    """No alarm below this difference, nats."""
    stop: float | None = 1.0
    """Stop the run when the mean absolute difference, nats, exceeds this: the sampler is not the policy. Empty:
    never."""

    def __post_init__(self) -> None:
        require(self.alarm_factor > 1, "mismatch.alarm_factor", self.alarm_factor, "a number above 1")
        require(self.alarm_floor >= 0, "mismatch.alarm_floor", self.alarm_floor, "0 or more")
        require(self.stop is None or self.stop > 0, "mismatch.stop", self.stop, "a number of nats above 0, or nothing")
