"""A tiny policy, an engine on it, and a step of learning: what the tests of this folder share."""

import torch

from entrocraft.train.config import Config, DataConfig, SamplingConfig
from entrocraft.train.config_engine import EngineConfig
from entrocraft.train.config_lora import LoraConfig
from entrocraft.train.config_model import ModelConfig, TinyModelConfig
from entrocraft.train.config_parallel import ParallelConfig
from entrocraft.train.engines import build_engine
from entrocraft.train.loading import load
from entrocraft.train.packing import pack
from entrocraft.train.policy import Policy

# vLLM keeps some of its state once a process, and one engine's end ends it for all: none here ends before the process.
ENGINES = []
PROMPTS = [(5, 6, 7), (9,), (30, 31, 32, 33, 34), (5, 6, 8)]
TEMPERATURE = 0.7
ENDS = range(60, 90)  # so that about half of the responses end by themselves


def make_policy(*, tied, seed=0, lora=None):
    """A tiny Qwen3 with heads of 32 dimensions, the smallest that vLLM's CPU build knows, and opinions.

    lora: rank of adapters, which alone are trained then.
    """
    shape = TinyModelConfig(hidden_size=64, layers=2, heads=2, mlp_size=128, context=256, tied=tied)
    made = ModelConfig(tiny=shape), ParallelConfig(), LoraConfig(rank=lora)
    model, tokenizer = load(*made, device=torch.device("cpu"), size=1, seed=seed)
    with torch.no_grad():
        model.model.norm.weight.mul_(3.0)
    model.generation_config.eos_token_id = list(ENDS)
    return Policy(model, tokenizer, temperature=TEMPERATURE, device=torch.device("cpu"))


def make_engine(policy, **options):
    config = Config(
        engine=EngineConfig(**{"name": "vllm", "memory": 0.02} | options),
        sampling=SamplingConfig(max_response_tokens=16, temperature=TEMPERATURE),
        data=DataConfig(max_prompt_tokens=32),
    )
    ENGINES.append(build_engine(config, policy))
    return ENGINES[-1]


def learn(policy, rollouts, *, lr=0.05):
    """A real step of gradient descent that moves all weights."""
    stats = policy.score(rollouts, 4096)
    for batch in pack(rollouts, range(rollouts.R), 4096):
        (-policy.token_stats(batch, rollouts.token_T).logprob_T.mean()).backward()
    with torch.no_grad():
        for p in policy.model.parameters():
            p -= lr * p.grad / p.grad.norm() * p.norm()
            p.grad = None
    return stats


def odd(completion, answer, prompt):
    """A reward that an untrained model can get."""
    return float(len(completion) % 2)
