"""Rollout engines: prompts in, `Rollouts` out."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList
from transformers.generation.logits_process import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from entrocraft import Rollouts
from entrocraft.train.config import SamplingConfig
from entrocraft.train.errors import NonFiniteError


class RolloutEngine(Protocol):
    """What the loop needs of anything that can generate."""

    def publish(self, version: int) -> dict[str, float]:
        """Makes the policy's present weights the ones that are sampled from, under this version number.

        Called by all ranks. Returns metrics. Raises PublicationError when they did not arrive whole.
        """
        ...

    def sample(
        self,
        prompts: Sequence[tuple[int, ...]],
        samples_per_prompt: int,
        *,
        stream: Sequence[int],
        temperature: float | None = None,
        settings: SamplingConfig | None = None,
        first_prompt: int = 0,
    ) -> Rollouts:
        """Draws `samples_per_prompt` responses to each prompt. Equal weights, prompts and `stream` give equal
        rollouts. `settings` stand in for the engine's own (evaluation). These prompts are number `first_prompt` and
        following of a batch that is sampled in parts: an engine that can, draws for each from (`stream`, its number),
        so that the parts do not matter."""
        ...

    def rest(self) -> None:
        """Gives back what only generation needs, until the next `publish`; not to be sampled from before it."""
        ...

    def close(self) -> None:
        """Lets go of everything."""
        ...


@dataclass(frozen=True, slots=True)
class Response:
    """One response as a sampler returns it: its tokens, end mark included, and their log-probabilities if it has
    them."""

    tokens: Sequence[int]
    logprobs: Sequence[float] | None
    ended: bool


def assemble(
    prompts: Sequence[tuple[int, ...]], samples_per_prompt: int, responses: Sequence[Response], version: int
) -> Rollouts:
    """The `Rollouts` of P x G responses, those of one prompt next to each other."""
    group_R = torch.arange(len(prompts)).repeat_interleave(samples_per_prompt)
    length_R = torch.tensor([len(response.tokens) for response in responses], dtype=torch.int64)
    token_T = torch.tensor([token for response in responses for token in response.tokens], dtype=torch.int64)
    logprobs = [value for response in responses for value in response.logprobs or ()]
    known = bool(responses) and responses[0].logprobs is not None
    return Rollouts(
        token_T=token_T,
        rollout_T=torch.arange(len(responses)).repeat_interleave(length_R),
        mask_T=torch.ones_like(token_T, dtype=torch.bool),
        group_R=group_R,
        sample_R=torch.arange(samples_per_prompt).repeat(len(prompts)),
        prompts=tuple(tuple(prompt) for prompt in prompts),
        truncated_R=torch.tensor([not response.ended for response in responses], dtype=torch.bool),
        weight_version=version,
        sampler_logprob_T=torch.tensor(logprobs, dtype=torch.float32) if known else None,
    )


def stream_seed(*stream: int) -> int:
    """A 63-bit seed from a list of integers, e.g. (run seed, purpose, step): independent streams, no state to save."""
    return int(np.random.SeedSequence(stream).generate_state(1, np.uint64)[0] >> 1)


class HuggingFaceEngine:
    """Generates with `transformers`' own `generate`, from the very module that is trained: nothing to copy or
    publish.

    Random numbers of a prompt are a function of (stream, its number in the batch) alone, whoever else is generated
    beside it. What remains of the company it keeps is rounding, by the padding of a shorter prompt; a token whose two
    best draws are closer than that may differ.

    Each token comes with its log-probability as it was drawn, which is not quite what scoring gives: a cache and
    16 bits round otherwise, and top-k or top-p draw from another distribution.
    """

    uses_policy = True
    """Sharded weights must be whole while this generates."""

    def __init__(self, model: Any, config: SamplingConfig, *, eos_ids: Sequence[int], pad_id: int) -> None:
        self.model = model
        self.config = config
        self.eos_ids = list(eos_ids)
        self.pad_id = pad_id
        self.version = 0
        if not self.eos_ids:
            raise ValueError("the tokenizer has no end-of-sequence token: no rollout could ever end; set eos_token")

    def publish(self, version: int) -> dict[str, float]:
        """Records the version; the weights are shared with the trainer."""
        self.version = version
        return {}

    def rest(self) -> None:
        """Keeps nothing between calls."""

    def close(self) -> None:
        """Holds nothing of its own."""

    def sample(
        self,
        prompts: Sequence[tuple[int, ...]],
        samples_per_prompt: int,
        *,
        stream: Sequence[int],
        temperature: float | None = None,
        settings: SamplingConfig | None = None,
        first_prompt: int = 0,
    ) -> Rollouts:
        """Draws R = P x G responses, prompt by prompt from the random stream (*stream, number of the prompt).

        `settings` stand in for the configured ones (evaluation), `temperature` for theirs. A response ends with its
        end mark, which is part of it, or is truncated at `max_response_tokens`.
        """
        if settings is not None:
            other = copy.copy(self)
            other.config = settings
            return other.sample(
                prompts, samples_per_prompt, stream=stream, temperature=temperature, first_prompt=first_prompt
            )
        rows = [prompt for prompt in prompts for _ in range(samples_per_prompt)]
        size = self.config.rollouts_per_batch
        was_training = self.model.training
        self.model.eval()
        with torch.no_grad():
            chunks = [
                self._generate(
                    rows[i : i + size],
                    self._drawing(
                        [first_prompt + r // samples_per_prompt for r in range(i, min(i + size, len(rows)))],
                        [s % samples_per_prompt for s in range(i, min(i + size, len(rows)))],
                        samples_per_prompt,
                        stream,
                        temperature or self.config.temperature,
                    ),
                )
                for i in range(0, len(rows), size)
            ]
        self.model.train(was_training)
        return assemble(prompts, samples_per_prompt, [each for chunk in chunks for each in chunk], self.version)

    def _drawing(
        self, prompts: list[int], samples: list[int], group: int, stream: Sequence[int], temperature: float
    ) -> tuple[LogitsProcessorList, "_Draw"]:
        """What turns logits into the token that is drawn, which it leaves with the largest of them; its last step."""
        steps: list[LogitsProcessor] = [TemperatureLogitsWarper(temperature)]
        if self.config.top_k:
            steps.append(TopKLogitsWarper(self.config.top_k))
        if self.config.top_p < 1.0:
            steps.append(TopPLogitsWarper(self.config.top_p))
        draw = _Draw(prompts, samples, group, stream, self.model.device, self.version)
        return LogitsProcessorList([*steps, draw]), draw

    def _generate(
        self, rows: Sequence[tuple[int, ...]], drawing: tuple[LogitsProcessorList, "_Draw"]
    ) -> list[Response]:
        processors, draw = drawing
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
            do_sample=False,  # the largest is taken, after `drawing`
            max_new_tokens=self.config.max_response_tokens,
            eos_token_id=self.eos_ids,
            pad_token_id=self.pad_id,
        )
        try:
            output_RL = self.model.generate(
                input_RL.to(device),
                attention_mask=mask_RL.to(device),
                generation_config=settings,
                logits_processor=processors,
            )
        finally:
            self.model.generation_config = own
        assert isinstance(output_RL, Tensor)
        response_RL = output_RL[:, width:].cpu()
        end_RL = torch.isin(response_RL, torch.tensor(self.eos_ids))
        length_R = torch.where(end_RL.any(1), end_RL.int().argmax(1) + 1, response_RL.shape[1])
        logprob_RL = torch.stack(draw.logprobs, 1).cpu()
        assert logprob_RL.shape == response_RL.shape, "one draw for each column of the responses"
        return [
            Response(token_L[:n].tolist(), logprob_L[:n].tolist(), bool(end_L[n - 1]))
            for token_L, logprob_L, end_L, n in zip(response_RL, logprob_RL, end_RL, length_R.tolist(), strict=True)
        ]


class _Draw(LogitsProcessor):
    """Adds Gumbel noise, after which the largest entry is a draw from softmax: token = argmax_v (z_v - log E_v).

    E_v are exponential, from a generator for each prompt, [G, V] a step; a batch that holds some of a prompt's samples
    draws for all and uses theirs.

    logprobs: log p [R] of each token drawn so far, nats, in the distribution it was drawn from: at its temperature,
    among what top-k and top-p leave, as the model computed it with its cache. It is what vLLM reports of itself.
    """

    def __init__(
        self,
        prompts: list[int],
        samples: list[int],
        group: int,
        stream: Sequence[int],
        device: torch.device,
        version: int,
    ) -> None:
        own = sorted(set(prompts))
        self.generators = [torch.Generator(device).manual_seed(stream_seed(*stream, prompt)) for prompt in own]
        place = {prompt: i for i, prompt in enumerate(own)}
        self.row_R = torch.tensor(
            [place[prompt] * group + sample for prompt, sample in zip(prompts, samples, strict=True)], device=device
        )
        self.group = group
        self.version = version
        self.logprobs: list[Tensor] = []

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        """scores [R, V] of the next token, perturbed. Raises NonFiniteError where they are no numbers."""
        if not bool(torch.isfinite(scores.amax(1)).all()):  # NaN, or nothing possible
            raise NonFiniteError(
                f"the policy of weight version {self.version} gives probabilities that are not numbers: its weights "
                "are broken, and no rollout can be drawn from it. Start from an earlier checkpoint's weights"
            )
        noise = torch.empty(len(self.generators), self.group, scores.shape[1], device=scores.device)
        for part, generator in zip(noise, self.generators, strict=True):
            part.exponential_(generator=generator)
        scores = scores.float()
        perturbed = scores - noise.flatten(0, 1)[self.row_R].clamp_(min=1e-30).log_()
        drawn_R1 = perturbed.argmax(1, keepdim=True)
        self.logprobs.append((scores.gather(1, drawn_R1) - scores.logsumexp(1, keepdim=True))[:, 0])
        return perturbed
