"""Two processes under torchrun, each with vLLM inside; and what they exported of a sharded model, served by vLLM."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from vllm_kit import ENGINES, PROMPTS, make_engine

from entrocraft.train.config import ModelConfig
from entrocraft.train.policy import Policy
from entrocraft.train.sampling import Response, assemble
from entrocraft.train.stored_policy import StoredPolicy
from entrocraft.train.vllm_engine import _ENVIRONMENT, vars_of

HERE = Path(__file__).parent


TOLERANCE = 5e-5


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    """The folder of what both ranks left."""
    folder = tmp_path_factory.mktemp("ranks")
    launcher = [sys.executable, "-P", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "PYTHONPATH": str(HERE), "PYTHONWARNINGS": "ignore"}
    command = [*launcher, str(HERE / "ranks.py"), str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return folder


def test_two_ranks_sample_from_their_own_weights(told):
    for rank in range(2):
        answer = json.loads((told / f"{rank}.json").read_text())
        assert max(answer["differences"]) < TOLERANCE
        assert answer["version"] == 2
        assert [tuple(prompt) for prompt in answer["prompts"]] == PROMPTS[2 * rank : 2 * rank + 2]
        assert answer["sum"] == 1


def greedy(folder):
    """vLLM's likeliest responses with the weights that it reads from the folder itself, and their log-probabilities."""
    for variable, value in _ENVIRONMENT.items():
        os.environ.setdefault(variable, value)
    import vllm

    llm = vllm.LLM(
        model=str(folder),
        skip_tokenizer_init=True,
        dtype="float32",
        max_model_len=64,
        gpu_memory_utilization=0.02,
        enforce_eager=True,
    )
    ENGINES.append(llm)
    setting = vllm.SamplingParams(temperature=0.0, max_tokens=12, logprobs=0, detokenize=False, ignore_eos=True)
    prompts = [vllm.TokensPrompt(prompt_token_ids=list(prompt)) for prompt in PROMPTS]
    outputs = [vars_of(output.outputs[0]) for output in llm.generate(prompts, setting, use_tqdm=False)]
    return assemble(PROMPTS, 1, [Response(found["token_ids"], found["logprobs"], False) for found in outputs], 0)


def test_what_shards_export_is_what_vllm_serves(told):
    """Before any publication: vLLM reads the safetensors as it would those of the hub."""
    cpu = torch.device("cpu")
    policy = Policy.load(ModelConfig(path=str(told / "exported")), temperature=1.0, device=cpu, seed=0)
    served = greedy(told / "exported")
    logprob_T = policy.score(served, 4096).logprob_T
    assert served.sampler_logprob_T is not None
    assert float((logprob_T - served.sampler_logprob_T).abs().max()) < TOLERANCE
    begun = Policy.load(ModelConfig(path=str(told / "begun")), temperature=1.0, device=cpu, seed=0)
    assert float((begun.score(served, 4096).logprob_T - logprob_T).abs().max()) > 1000 * TOLERANCE


def test_weights_are_published_from_their_files_without_a_model_in_memory(told):
    """As `entrocraft eval` does with vLLM where nothing is scored."""
    place, cpu = ModelConfig(path=str(told / "exported")), torch.device("cpu")
    stored = StoredPolicy(place, cpu)
    engine = make_engine(stored)
    engine.publish(0)
    rollouts = engine.sample(PROMPTS, 4, stream=(0, 1))
    whole = Policy.load(place, temperature=0.7, device=cpu, seed=0)
    assert rollouts.sampler_logprob_T is not None
    assert float((whole.score(rollouts, 4096).logprob_T - rollouts.sampler_logprob_T).abs().max()) < TOLERANCE
    assert stored.eos_ids == whole.eos_ids
    assert all(parameter.is_meta for parameter in stored.model.parameters())
