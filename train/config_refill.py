"""Settings of what a step does about rollouts that teach nothing."""

import math
from dataclasses import dataclass
from typing import Literal

from entrocraft.train.config_check import require


@dataclass(frozen=True, kw_only=True)
class RefillConfig:
    """Groups without a signal, and sampling more where rollouts are rejected."""

    zero_variance: Literal["keep", "filter", "refill"] = "keep"
    """Prompts whose rollouts all got the same reward: `keep` them (they count in the loss's denominator), `filter` them
    out, or `refill`: replace them by further prompts. Reward and accuracy are reported of all that was sampled."""
    oversample: bool = False
    """Sample further prompts, in waves, until batch.prompts_per_step x samples_per_prompt rollouts are kept that have
    an advantage; then use exactly so many. Compare runs by tokens generated, not by steps."""
    max_waves: int = 3
    """Most waves of one step, the first included."""
    max_factor: float = 4.0
    """Most prompts of one step, as a multiple of batch.prompts_per_step."""

    def __post_init__(self) -> None:
        require(
            not (self.oversample and self.zero_variance == "refill"),
            "refill.zero_variance",
            self.zero_variance,
            "'keep' or 'filter' beside refill.oversample, which counts rollouts with an advantage and so replaces the "
            "others already",
        )
        require(self.max_waves > 0, "refill.max_waves", self.max_waves, "a positive number")
        require(1 <= self.max_factor < math.inf, "refill.max_factor", self.max_factor, "a finite number, 1 or more")
