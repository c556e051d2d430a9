"""Rollout engines: prompts in, `Rollouts` out."""

import copy
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from transformers import GenerationConfig

from entrocraft import Rollouts
from entrocraft.train.config import SamplingConfig
from entrocraft.train.errors import NonFiniteError


class RolloutEngine(Protocol):
    """What the loop needs of anything that can generate."""

    def publish(self, version: int) -> None:
        """Makes the policy's present weights the ones that are sampled from, under this version number."""
        ...

    def sample(
        self,
        prompts: Sequence[tuple[int, ...]],
        samples_per_prompt: int,
        *,
        stream: Sequence[int],
        temperature: float | None = None,
        settings: SamplingConfig | None = None,
    ) -> Rollouts:
        """Draws `samples_per_prompt` responses to each prompt. Equal weights, prompts and `stream` give equal
        rollouts. `settings` stand in for the engine's own (evaluation)."""
        ...


def stream_seed(*stream: int) -> int:
    """A 63-bit seed from a list of integers, e.g. (run seed, purpose, step): independent streams, no state to save."""
    return int(np.random.SeedSequence(stream).generate_state(1, np.uint64)[0] >> 1)


class HuggingFaceEngine:
    """Generates with `transformers`' own `generate`, from the very module that is trained: nothing to copy or
    publish."""

    def __init__(self, model: Any, config: SamplingConfig, *, eos_ids: Sequence[int], pad_id: int) -> None:
        self.model = model
        self.config = config
        self.eos_ids = list(eos_ids)
        self.pad_id = pad_id
        self.version = 0
        if not self.eos_ids:
            raise ValueError("the tokenizer has no end-of-sequence token: no rollout could ever end; set eos_token")

    def publish(self, version: int) -> None:
        """Records the version; the weights are shared with the trainer."""
        self.version = version

    def sample(
        self,
        prompts: Sequence[tuple[int, ...]],
        samples_per_prompt: int,
        *,
        stream: Sequence[int],
        temperature: float | None = None,
        settings: SamplingConfig | None = None,
    ) -> Rollouts:
        """Draws R = P x G responses, with random numbers that are a function of `stream` alone.

        `settings` stand in for the configured ones (evaluation), `temperature` for theirs. A response ends with its
        end mark, which is part of it, or is truncated at `max_response_tokens`.
        """
        if settings is not None:
            other = copy.copy(self)
            other.config = settings
            return other.sample(prompts, samples_per_prompt, stream=stream, temperature=temperature)
        group_R = torch.arange(len(prompts)).repeat_interleave(samples_per_prompt)
        rows = [prompts[g] for g in group_R.tolist()]
        size = self.config.rollouts_per_batch
        was_training = self.model.training
        self.model.eval()
        with torch.random.fork_rng(), torch.no_grad():
            torch.manual_seed(stream_seed(*stream))
            chunks = [
                self._generate(rows[i : i + size], temperature or self.config.temperature)
                for i in range(0, len(rows), size)
            ]
        self.model.train(was_training)
        responses = [response for chunk in chunks for response in chunk]
        ended = torch.isin(torch.stack([response[-1] for response in responses]), torch.tensor(self.eos_ids))
        length_R = torch.tensor([len(response) for response in responses])
        token_T = torch.cat(responses)
        return Rollouts(
            token_T=token_T,
            rollout_T=torch.arange(len(responses)).repeat_interleave(length_R),
            mask_T=torch.ones_like(token_T, dtype=torch.bool),
            group_R=group_R,
            sample_R=torch.arange(samples_per_prompt).repeat(len(prompts)),
            prompts=tuple(tuple(prompt) for prompt in prompts),
            truncated_R=~ended,
            weight_version=self.version,
        )

    def _generate(self, rows: Sequence[tuple[int, ...]], temperature: float) -> list[Tensor]:
        width = max(len(row) for row in rows)
        input_RL = torch.full((len(rows), width), self.pad_id)
        mask_RL = torch.zeros(len(rows), width, dtype=torch.int64)
        for r, row in enumerate(rows):  # prompts end together, so that all responses start in one column
            input_RL[r, width - len(row) :] = torch.tensor(row)
            mask_RL[r, width - len(row) :] = 1
        device = self.model.device
        # `generate` fills what is not given from the model's own settings, such as a repetition penalty, with which
        # rollouts would come from another distribution than the one that is scored. So those are set aside.
        own = self.model.generation_config
        self.model.generation_config = GenerationConfig(eos_token_id=self.eos_ids, pad_token_id=self.pad_id)
        settings = GenerationConfig(
            do_sample=True,
            temperature=temperature,
            top_p=self.config.top_p,
            top_k=self.config.top_k,
            max_new_tokens=self.config.max_response_tokens,
            eos_token_id=self.eos_ids,
            pad_token_id=self.pad_id,
        )
        try:
            output_RL = self.model.generate(
                input_RL.to(device), attention_mask=mask_RL.to(device), generation_config=settings
            )
        except RuntimeError as error:
            if "probability tensor contains" not in str(error):
                raise
            raise NonFiniteError(
                f"the policy of weight version {self.version} gives probabilities that are not numbers: its weights "
                "are broken, and no rollout can be drawn from it. Start from an earlier checkpoint's weights"
            ) from None
        finally:
            self.model.generation_config = own
        assert isinstance(output_RL, Tensor)
        response_RL = output_RL[:, width:].cpu()
        end_RL = torch.isin(response_RL, torch.tensor(self.eos_ids))
        length_R = torch.where(end_RL.any(1), end_RL.int().argmax(1) + 1, response_RL.shape[1])
        return [response[:length] for response, length in zip(response_RL, length_R.tolist(), strict=True)]
