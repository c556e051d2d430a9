"""Settings of low-rank adapters."""

from dataclasses import dataclass, field

from entrocraft.train.config_check import require


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """LoRA through peft: the model's own weights are frozen, and W + (alpha / rank) B A is what computes."""

    rank: int | None = None
    """Rank of the adapters; empty: all weights are trained."""
    alpha: int = 32
    """Scale of the adapters, divided by the rank."""
    dropout: float = 0.0
    """Dropout in front of an adapter; above 0 the policy that is trained is not the one that was sampled."""
    targets: list[str] = field(default_factory=list)
    """Ends of names of the layers that get one, such as [q_proj, v_proj]; empty: every linear layer but the head."""

    def __post_init__(self) -> None:
        require(self.rank is None or self.rank > 0, "lora.rank", self.rank, "a positive number, or nothing")
        require(self.alpha > 0, "lora.alpha", self.alpha, "a number above 0")
        require(0 <= self.dropout < 1, "lora.dropout", self.dropout, "a number in [0, 1)")
