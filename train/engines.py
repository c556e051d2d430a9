"""Builds the configured rollout engine on a policy."""

import importlib.util

from entrocraft.train.config import Config
from entrocraft.train.evaluation import sampling_settings
from entrocraft.train.policy import Policy
from entrocraft.train.sampling import HuggingFaceEngine, RolloutEngine


def build_engine(config: Config, policy: Policy) -> RolloutEngine:
    """The engine `config.engine` names. vLLM is imported here, and only when it is asked for.

    Raises ValueError when vLLM is not installed, or has no kernel for the model.
    """
    engine = config.engine
    if engine.name == "hf":
        return HuggingFaceEngine(policy.model, config.sampling, eos_ids=policy.eos_ids, pad_id=policy.pad_id)
    from entrocraft.train.vllm_engine import SampledModel, VLLMEngine

    model = SampledModel(
        config=policy.model.config,
        architecture=_architecture(policy),
        weights=policy.weights,
        eos_ids=policy.eos_ids,
        device=policy.device,
        context=sampled_context(config, policy.context),
        seed=config.seed,
    )
    if engine.name == "vllm_server":
        from entrocraft.train.vllm_server import VLLMServerEngine

        return VLLMServerEngine(model, engine, config.sampling)
    if importlib.util.find_spec("vllm") is None:
        raise ValueError(
            "engine.name = 'vllm': vLLM is not installed; pip install 'entrocraft[vllm]', or use --engine.name hf"
        )
    return VLLMEngine(model, engine, config.sampling)


def sampled_context(config: Config, most: int) -> int:
    """Tokens of the longest prompt and response that are sampled, in training or evaluation; `most` the model holds."""
    longest = max(config.sampling.max_response_tokens, sampling_settings(config).max_response_tokens)
    return min(most, config.data.max_prompt_tokens + longest)


def _architecture(policy: Policy) -> str:
    named = getattr(policy.model.config, "architectures", None)
    return named[0] if named else type(policy.model).__name__.removeprefix("FSDP")  # the name of a sharded class
