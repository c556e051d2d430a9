"""What is asked of vLLM for one prompt, and what its answer means; the same in this process and over HTTP."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from entrocraft.train.config_engine import SamplingConfig
from entrocraft.train.errors import NonFiniteError
from entrocraft.train.sampling import Response, stream_seed


def request_options(
    sampling: SamplingConfig,
    *,
    temperature: float | None,
    eos_ids: Sequence[int],
    samples: int,
    stream: Sequence[int] | None,
) -> dict[str, Any]:
    """vLLM's sampling parameters of one prompt. `stream` decides the random numbers; None leaves them to vLLM."""
    return {
        "n": samples,
        "temperature": temperature or sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "max_tokens": sampling.max_response_tokens,
        "stop_token_ids": list(eos_ids),
        "logprobs": 0,  # of the sampled token alone
        "seed": None if stream is None else stream_seed(*stream),
        "detokenize": False,
    }


def responses_of(choices: Sequence[Mapping[str, Any]], version: int) -> list[Response]:
    """The responses of vLLM's choices, in order.

    Raises NonFiniteError for a log-probability that is not finite.
    """
    responses = []
    for choice in choices:
        if not all(map(math.isfinite, choice["logprobs"])):
            raise NonFiniteError(
                f"the sampler gives log-probabilities that are not numbers with weight version {version}: the weights "
                "are broken, and no rollout can be drawn from them. Start from an earlier checkpoint's weights"
            )
        responses.append(Response(choice["token_ids"], choice["logprobs"], choice["finish_reason"] == "stop"))
    return responses
