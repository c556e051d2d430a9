"""The policy: a Hugging Face causal LM, its tokenizer, and the fused head that scores tokens without their logits."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils.logging import disable_progress_bar

from entrocraft import Rollouts, TokenStats
from entrocraft.kernels import FusedHead
from entrocraft.train.config import ModelConfig
from entrocraft.train.packing import MicroBatch, pack
from entrocraft.train.tiny_model import build_tiny_model


def choose_device(name: str) -> torch.device:
    """`auto` is CUDA where there is one, else the CPU. Raises ValueError for a device that is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"device = {name!r}: expected 'auto', 'cpu' or 'cuda'") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device = {name!r}: no CUDA device here; use --device cpu, or run `entrocraft doctor`")
    return device


class Policy:
    """Scores tokens under the model at the sampling temperature."""

    # Any: the types that transformers declares for models and tokenizers are wider than what they return.
    def __init__(self, model: Any, tokenizer: Any, *, temperature: float, device: torch.device) -> None:
        self.model = model.to(device)
        self.tokenizer = tokenizer
        self.temperature = temperature
        self.device = device
        self.head = FusedHead(self.model)

    @classmethod
    def load(cls, config: ModelConfig, *, temperature: float, device: torch.device, seed: int) -> "Policy":
        """The model at `config.path` (safetensors only, no remote code unless asked), or the tiny one built from
        `seed`.

        Raises FileNotFoundError for a local path that does not exist; whatever transformers raises for a bad one.
        """
        if config.path is None:
            model, tokenizer = build_tiny_model(config.tiny, seed)
        else:
            disable_progress_bar()
            path, remote = str(Path(config.path).expanduser()), config.trust_remote_code
            if config.path.startswith((".", "/", "~")) and not Path(path).is_dir():
                raise FileNotFoundError(f"model.path = {config.path!r}: no such folder")
            try:
                tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=remote)
                model = AutoModelForCausalLM.from_pretrained(
                    path, dtype=torch.float32, use_safetensors=True, trust_remote_code=remote
                )
            except OSError as error:
                raise ValueError(
                    f"model.path = {config.path!r}: neither a folder with a model in safetensors nor a model of the "
                    f"hub that can be reached: {str(error).splitlines()[0]}"
                ) from error
        if config.gradient_checkpointing:
            model.gradient_checkpointing_enable()
        return cls(model, tokenizer, temperature=temperature, device=device)

    @property
    def eos_ids(self) -> list[int]:
        """Token ids that end a response: the tokenizer's, and those the model's generation settings add."""
        ids = {self.tokenizer.eos_token_id, *_as_list(getattr(self.model.generation_config, "eos_token_id", None))}
        return sorted(i for i in ids if i is not None)

    @property
    def pad_id(self) -> int:
        """Token id that fills the left of shorter prompts; masked, so its value never matters."""
        pad = self.tokenizer.pad_token_id
        return pad if pad is not None else self.eos_ids[0]

    @property
    def context(self) -> int:
        """Most tokens the model can hold, prompt and response together."""
        return int(self.model.config.max_position_embeddings)

    @property
    def vocab_size(self) -> int:
        """V, rows of the LM head."""
        return int(self.model.get_output_embeddings().weight.shape[0])

    @torch.no_grad()
    def check(self, prompt: Sequence[int]) -> None:
        """Makes sure, on one prompt, that this model may be scored as `token_stats` does it.

        Raises ValueError when it gives NaN or infinity, when its logits are not what the fused head computes, or when a
        sequence sees its neighbour in a packed row, as in a model that ignores position ids.
        """
        self.model.eval()
        ids = torch.tensor([prompt[:64]], device=self.device)
        n = ids.shape[1]
        position = torch.arange(n, device=self.device).repeat(2)[None]
        hidden = self.head.hidden(input_ids=ids.repeat(1, 2), position_ids=position)[0]
        if not bool(torch.isfinite(hidden).all()):
            raise ValueError(
                f"{type(self.model).__name__} gives hidden states that are not numbers: its weights are broken"
            )
        self.head.check(ids)
        error = float((hidden[n:] - hidden[:n]).abs().max() / hidden[:n].abs().max())
        if not error < 1e-3:
            raise ValueError(
                f"{type(self.model).__name__} does not keep packed sequences apart: the second copy of a prompt in a "
                f"row differs from the first by {error:.2g} of its size; it cannot be trained with packing"
            )

    def token_stats(self, batch: MicroBatch, token_T: Tensor, *, collision: bool = False) -> TokenStats:
        """Statistics of the N response tokens of a micro-batch, differentiable. `token_T` are the rollouts' tokens."""
        target_N = token_T[batch.token_N].to(self.device)
        batch = batch.to(self.device)
        return self.head(
            target_N,
            batch.source_N,
            input_ids=batch.input_BL,
            position_ids=batch.position_BL,
            temperature=self.temperature,
            collision=collision,
        )

    def stats_and_clamped_entropy(self, batch: MicroBatch, token_T: Tensor, share: float) -> tuple[TokenStats, Tensor]:
        """As `token_stats`, and the entropy of each row without the least likely `share` of the vocabulary (AEnt)."""
        target_N = token_T[batch.token_N].to(self.device)
        batch = batch.to(self.device)
        hidden_BLH = self.head.hidden(input_ids=batch.input_BL, position_ids=batch.position_BL)
        hidden_NH = hidden_BLH.flatten(0, -2).index_select(0, batch.source_N)
        stats = self.head.stats(hidden_NH, target_N, temperature=self.temperature)
        return stats, self.head.clamped_entropy(hidden_NH, share=share, temperature=self.temperature)

    @torch.no_grad()
    def score(self, rollouts: Rollouts, tokens_per_microbatch: int) -> TokenStats:
        """Statistics, collision sums included, of all T response tokens in the rollouts' own order, on the CPU."""
        self.model.eval()
        batches = pack(rollouts, range(rollouts.R), tokens_per_microbatch)
        parts = [self.token_stats(batch, rollouts.token_T, collision=True).to("cpu") for batch in batches]
        where_T = torch.argsort(torch.cat([batch.token_N for batch in batches]))
        return TokenStats.cat(parts).index(where_T)

    def save(self, folder: Path) -> None:
        """Writes a Hugging Face folder (safetensors and tokenizer) that `model.path`, vLLM and transformers load."""
        disable_progress_bar()
        self.model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)


def _as_list(value: int | list[int] | None) -> list[int | None]:
    return list(value) if isinstance(value, list) else [value]
