"""Settings of the policy's model."""

from dataclasses import dataclass
from typing import Literal

from entrocraft.train.config_check import require


@dataclass(frozen=True, kw_only=True)
class TinyModelConfig:
    """A byte-level Qwen3 built on the spot with random weights, for trying things without a download."""

    hidden_size: int = 96
    """Width of the residual stream."""
    layers: int = 3
    """Transformer blocks."""
    heads: int = 4
    """Query heads; the number of key-value heads is half of it."""
    mlp_size: int = 256
    """Width of the feed-forward layer."""
    context: int = 2048
    """Most tokens a sequence may have, prompt and response together."""
    tied: bool = True
    """Whether the LM head shares the embedding's weight."""
    vocabulary: int | None = None
    """Rows of the LM head: printable characters, and words that no text holds. Empty: 259, the bytes."""

    def __post_init__(self) -> None:
        require(
            self.vocabulary is None or self.vocabulary >= 200,
            "model.tiny.vocabulary",
            self.vocabulary,
            "at least 200, to hold all printable characters, or nothing",
        )
        for name in ("hidden_size", "layers", "heads", "mlp_size", "context"):
            require(getattr(self, name) > 0, f"model.tiny.{name}", getattr(self, name), "a positive number")
        require(
            self.heads % 2 == 0,
            "model.tiny.heads",
            self.heads,
            "an even number (two query heads share one key)",
        )
        require(
            self.hidden_size % (2 * self.heads) == 0,
            "model.tiny.hidden_size",
            self.hidden_size,
            f"a multiple of 2 x model.tiny.heads = {2 * self.heads}",
        )


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The policy that is trained."""

    path: str | None = None
    """Folder or hub id of a Hugging Face causal LM (safetensors). Leave empty to build `model.tiny`."""
    tiny: TinyModelConfig = TinyModelConfig()
    """Shape of the model that is built when `model.path` is empty."""
    trust_remote_code: bool = False
    """Whether code shipped with the model may run. Off: a downloaded model cannot execute anything here."""
    attention: Literal["auto", "sdpa", "eager", "flash_attention_2", "flash_attention_3"] = "auto"
    """Attention layers. `auto`: flash-attention where it is installed and the model computes in bfloat16 on CUDA, else
    torch's own (SDPA). Which one is in use is printed when a run starts."""
    liger: Literal["auto", "on", "off"] = "auto"
    """Liger's fused layers inside the model. `auto`: where liger-kernel is installed, on CUDA, for models it knows."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
