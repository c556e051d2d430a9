"""Settings of the evaluation: on which problems, how they are sampled, what is reported, and when."""

import re
from dataclasses import dataclass, field

from entrocraft.train.config_check import require


@dataclass(frozen=True, kw_only=True)
class EvaluationSetConfig:
    """One set of held-out problems. What is left empty is as in `data`."""

    path: str
    """A JSONL or parquet file, a folder of them, or a data set of the hub, `owner/name`."""
    split: str = "test"
    """Which split of a folder or hub data set."""
    subset: str = ""
    """Which configuration of a hub data set."""
    revision: str = ""
    """Which revision of a hub data set."""
    prompt_field: str | None = None
    """Column that holds the problem's text."""
    answer_field: str | None = None
    """Column that holds the reference answer."""
    answer_pattern: str | None = None
    """Regular expression whose one group extracts the answer."""
    prompt_template: str | None = None
    """Text around the problem; `{prompt}` is replaced."""
    system: str = ""
    """System turn before each problem; empty: none, whatever `data.system` is."""
    samples: int | None = None
    """Responses per problem; empty: `evaluation.samples`."""
    limit: int | None = None
    """Use only the first so many problems; empty: all, whatever `data.limit` is."""

    def __post_init__(self) -> None:
        for name in ("samples", "limit"):
            value = getattr(self, name)
            require(value is None or value > 0, f"evaluation.sets: {name}", value, "a positive number, or nothing")


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """Held-out problems, sampled now and then."""

    every: int = 0
    """Steps between evaluations; 0: only after the last step, and where `at_prompts` says."""
    at_prompts: list[int] = field(default_factory=list)
    """Numbers of sampled training prompts after which to evaluate: at the first step at or above each, e.g.
    `[100000, 200000]`."""
    sets: dict[str, EvaluationSetConfig] = field(default_factory=dict)
    """Sets of problems by name: `{amc23: {path: math-ai/amc23, prompt_field: question}}`. Beside `data.eval`, if that
    is given too."""
    samples: int = 8
    """n: responses per problem. The mean of their scores is mean@n."""
    pass_at: list[int] = field(default_factory=list)
    """The k of the pass@k that are reported, each at most n; empty: 1, 2, 4, ... and n."""
    temperature: float = 1.0
    """Sampling temperature of the evaluation."""
    top_p: float = 1.0
    """Nucleus sampling; 1 is off."""
    top_k: int = 0
    """Sample among the k likeliest tokens; 0 is off."""
    max_response_tokens: int | None = None
    """Longest response; empty: `sampling.max_response_tokens`."""
    entropy: bool = True
    """Measure the entropy of the responses, nats per token: one forward pass over them."""
    rollouts_per_batch: int = 4096
    """Responses that are drawn and graded together; what `entrocraft eval` loses at most when it is stopped."""
    bootstrap: int = 1000
    """Resamples of the problems from which the 95 % intervals come; 0: no intervals."""
    saved_samples: int = 16
    """Responses written to `samples.jsonl` at each evaluation of each set, and as many rollouts every
    `saved_samples_every` steps; 0: none."""
    saved_samples_every: int = 10
    """Steps between the training rollouts written to `samples.jsonl`; 0: none of them."""

    def __post_init__(self) -> None:
        require(self.every >= 0, "evaluation.every", self.every, "0 or more")
        require(self.samples > 0, "evaluation.samples", self.samples, "a positive number")
        require(self.temperature > 0, "evaluation.temperature", self.temperature, "a number above 0")
        require(0 < self.top_p <= 1, "evaluation.top_p", self.top_p, "a number in (0, 1]")
        require(
            self.rollouts_per_batch > 0, "evaluation.rollouts_per_batch", self.rollouts_per_batch, "a positive number"
        )
        for name in ("top_k", "bootstrap", "saved_samples", "saved_samples_every"):
            require(getattr(self, name) >= 0, f"evaluation.{name}", getattr(self, name), "0 or more")
        require(
            self.max_response_tokens is None or self.max_response_tokens > 0,
            "evaluation.max_response_tokens",
            self.max_response_tokens,
            "a positive number, or nothing",
        )
        require(all(n > 0 for n in self.at_prompts), "evaluation.at_prompts", self.at_prompts, "positive numbers")
        fewest = min([self.samples, *(s.samples for s in self.sets.values() if s.samples is not None)])
        require(
            all(0 < k <= fewest for k in self.pass_at),
            "evaluation.pass_at",
            self.pass_at,
            f"numbers from 1 to {fewest}, the fewest samples of a set",
        )
        for name in self.sets:
            require(
                re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name) is not None,
                "evaluation.sets",
                name,
                "names of letters, digits, points, dashes and underscores, as they become names of metrics",
            )

    def due(self, step: int, before: int, now: int) -> bool:
        """Whether to evaluate after this step, which is not the run's last. `before` and `now`: training prompts that
        had been sampled before it, and with it."""
        if self.every and step % self.every == 0:
            return True
        return any(before < number <= now for number in self.at_prompts)


def ks(samples: int, pass_at: list[int]) -> list[int]:
    """The k of pass@k for n samples, rising: those asked for, or the powers of two and n itself."""
    return sorted({*pass_at} or {*(2**i for i in range(samples.bit_length()) if 2**i <= samples), samples})
