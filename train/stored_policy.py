"""A policy whose weights stay in their files: all that a sampler with weights of its own needs of it.

For an evaluation with vLLM that does not score: 14 billion parameters in bfloat16 are 28 GB that vLLM holds already.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from entrocraft.train.config import ModelConfig
from entrocraft.train.loading import stored_tensors, without_weights
from entrocraft.train.parallel import Ranks
from entrocraft.train.policy import Policy


class StoredPolicy(Policy):
    """Tokenizer, configuration, end marks and weights of the model at `config.path`; it cannot score."""

    def __init__(self, config: ModelConfig, device: torch.device) -> None:
        self.model, self.tokenizer, self.files = without_weights(config)
        self.device, self.ranks, self.temperature = device, Ranks(), 1.0

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor as it is in its file, one after the other, on the device that they are published from."""
        for name, _, piece in stored_tensors(self.model, self.files):
            yield name, piece[:].to(self.device)
