"""Settings of saving, of going on, and of what a run checks about itself."""

from dataclasses import dataclass

from entrocraft.train.config_check import require


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """Saving and resuming."""

    every: int = 50
    """Steps between checkpoints; one is always written at the end and on Ctrl-C."""
    keep: int = 2
    """Newest checkpoints kept."""
    best: str = ""
    """Metric whose best checkpoint is kept besides, such as `eval_accuracy`; with a minus in front (`-eval_entropy`),
    less is better. Only steps that have both it and a checkpoint count. Empty: none."""
    asynchronous: bool = False
    """Write in the background, from a copy in host memory (weights and optimizer once more). A failure stops the run
    after the step in which it shows."""

    def __post_init__(self) -> None:
        require(self.every > 0, "checkpoint.every", self.every, "a positive number")
        require(self.keep > 0, "checkpoint.keep", self.keep, "a positive number")
        require(self.best != "-", "checkpoint.best", self.best, "the name of a metric, with or without a minus")


@dataclass(frozen=True, kw_only=True)
class SelfCheckConfig:
    """The fused op against plain logits, on a few tokens, while training."""

    every: int = 50
    """Steps between checks, the first step included; 0: none."""
    rows: int = 16
    """Response tokens of one rollout that each rank checks, spread evenly over it."""
    tolerance: float = 1e-3
    """Largest difference, in nats, of log-probability, entropy and log-sum-exp; beyond it the run stops. Differences of
    rounding are near 1e-5, in bfloat16 too, as sums are kept in float32."""

    def __post_init__(self) -> None:
        require(self.every >= 0, "self_check.every", self.every, "0 or more")
        require(self.rows > 0, "self_check.rows", self.rows, "a positive number")
        require(self.tolerance > 0, "self_check.tolerance", self.tolerance, "a number of nats above 0")
