"""Settings of the penalty for leaving a reference policy."""

import math
from dataclasses import dataclass
from typing import Literal

from entrocraft.train.config_check import require


@dataclass(frozen=True, kw_only=True)
class ReferenceConfig:
    """A penalty on KL(policy || reference), added to the loss with the same weights of tokens."""

    kl_coefficient: float = 0.0
    """What a nat of KL costs. 0: no reference is loaded."""
    kl: Literal["k1", "k2", "k3", "k1+", "k3+"] = "k3+"
    """Estimator from the sampled token (`entrocraft.kl`). `k1` alone has no gradient on average; `k1+` and `k3+` have
    that of the true KL."""
    kl_on: Literal["all", "kept"] = "all"
    """`all`: rejected rollouts are still run, for this penalty alone. `kept`: they are dropped before the forward
    pass. The denominators count all of them either way."""
    path: str | None = None
    """Folder or hub id of the reference. Empty: what the run began with, `model.path`; with LoRA the model without its
    adapter, which costs no memory."""
    offload: bool = False
    """Keep the reference in host memory while it is not scoring."""

    def __post_init__(self) -> None:
        require(
            0 <= self.kl_coefficient < math.inf,
            "reference.kl_coefficient",
            self.kl_coefficient,
            "a finite number, 0 or more",
        )
        require(
            self.path is None or self.kl_coefficient > 0,
            "reference.path",
            self.path,
            "nothing beside reference.kl_coefficient = 0, which uses no reference",
        )
