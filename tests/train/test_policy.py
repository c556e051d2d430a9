"""The policy's own checks: what it may score, and what it refuses."""

import dataclasses

import pytest
import torch
from torch.distributed.fsdp import FSDPModule
from transformers import Gemma2Config, Gemma2ForCausalLM, MambaConfig, MambaForCausalLM

from entrocraft.train.config import ModelConfig, SamplingConfig
from entrocraft.train.config_model import TinyModelConfig
from entrocraft.train.config_parallel import ParallelConfig
from entrocraft.train.layers import description, use_liger
from entrocraft.train.loading import load
from entrocraft.train.packing import pack
from entrocraft.train.parallel import Ranks
from entrocraft.train.policy import Policy, choose_device
from entrocraft.train.sampling import HuggingFaceEngine
from entrocraft.train.sharding import blocks
from entrocraft.train.tiny_model import build_tiny_model

CPU = torch.device("cpu")
PLAIN = {"parallel": ParallelConfig(), "device": CPU, "size": 1, "seed": 0}
SHAPE = TinyModelConfig(hidden_size=16, layers=1, heads=2, mlp_size=32, context=32)


class Tokens:
    """The two attributes that a policy asks of a tokenizer."""

    eos_token_id = 1
    pad_token_id = None


def test_a_packable_model_passes_with_and_without_softcap():
    Policy.load(ModelConfig(tiny=SHAPE), temperature=1.0, device=torch.device("cpu"), seed=0).check([5, 6, 7, 8])
    config = Gemma2Config(vocab_size=99, hidden_size=16, intermediate_size=32, num_hidden_layers=2, head_dim=8)
    config.num_attention_heads, config.num_key_value_heads = 2, 1
    capped = Gemma2ForCausalLM(config).eval()
    policy = Policy(capped, Tokens(), temperature=1.0, device=torch.device("cpu"))
    policy.check([5, 6, 7, 8])
    assert policy.head.softcap == 30.0
    assert (policy.eos_ids[0], policy.pad_id, policy.vocab_size) == (1, 1, 99)


def test_a_model_whose_neighbours_leak_is_refused():
    config = MambaConfig(vocab_size=99, hidden_size=16, num_hidden_layers=1, state_size=4, use_mambapy=False)
    recurrent = MambaForCausalLM(config).eval()
    policy = Policy(recurrent, Tokens(), temperature=1.0, device=torch.device("cpu"))
    with pytest.raises(ValueError, match=r"MambaForCausalLM does not keep packed sequences apart"):
        policy.check([5, 6, 7, 8])


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_no_answer_depends_on_padding_or_neighbours(attention):
    """Rollouts scored alone, with others in their row, and with padding after them; in rows, and as one row."""
    policy = Policy(*load(ModelConfig(tiny=SHAPE, attention=attention), **PLAIN), temperature=1.0, device=CPU)
    engine = HuggingFaceEngine(
        policy.model, SamplingConfig(max_response_tokens=9), eos_ids=[*policy.eos_ids, *range(60, 90)], pad_id=0
    )
    rollouts = engine.sample([(5, 6, 7), (9,), (30, 31, 32, 33, 34)], 4, stream=(3, 1))
    alone = [policy.score(rollouts.select(torch.arange(12) == r), 64).logprob_T for r in range(12)]
    for one_row in (False, True):
        policy.one_row = one_row
        for tokens in (14, 30, 512):
            packed = policy.score(rollouts, tokens).logprob_T
            assert float((packed - torch.cat(alone)).abs().max()) < 2e-6
    batch = pack(rollouts, range(12), 512)[0]
    leaky = dataclasses.replace(batch, position_BL=torch.arange(batch.input_BL.shape[1]).expand_as(batch.input_BL))
    right, wrong = (policy.token_stats(b, rollouts.token_T).logprob_T.detach() for b in (batch, leaky))
    assert float((wrong - right).abs().max()) > 1e-3  # a leak can be seen


def test_what_is_in_use_is_said_and_what_cannot_be_is_refused():
    policy = Policy(*load(ModelConfig(tiny=SHAPE), **PLAIN), temperature=1.0, device=CPU)
    told = dict(description(policy.model, policy.dtype, liger=False))
    assert told == {"attention": "torch's SDPA, sequences packed", "layers": "transformers' own, in float32"}
    eager = load(ModelConfig(tiny=SHAPE, attention="eager"), **PLAIN)[0]
    assert dict(description(eager, torch.float32, liger=False))["attention"].startswith("eager")
    with pytest.raises(ValueError, match=r"model.attention = 'flash_attention_2': it computes in bfloat16 on CUDA"):
        load(ModelConfig(tiny=SHAPE, attention="flash_attention_2"), **PLAIN)
    assert use_liger(policy, ModelConfig(tiny=SHAPE), [5, 6]) is False
    with pytest.raises(ValueError, match=r"model.liger = 'on': .*(not installed|need CUDA)"):
        use_liger(policy, ModelConfig(tiny=SHAPE, liger="on"), [5, 6])


@pytest.fixture
def sharded():
    """A deep model as the only rank of FSDP has it."""
    shape = dataclasses.replace(SHAPE, layers=5, tied=False)
    with Ranks.joined(device=CPU, timeout_s=20.0, needed=True):
        made = load(ModelConfig(tiny=shape), ParallelConfig(param_dtype="bfloat16"), device=CPU, size=1, seed=0)
        yield Policy(*made, temperature=0.5, device=CPU)


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
def test_no_look_at_the_model_gathers_it_whole(sharded):
    """At most the block that runs and the one fetched ahead are whole; afterwards nothing is."""

    def gathered(kind):
        states = {
            name: module._get_fsdp_state()._fsdp_param_groups
            for name, module in sharded.model.named_modules()
            if isinstance(module, FSDPModule)
        }
        groups = [group for name, own in states.items() if (".layers." in name) == kind for group in own]
        assert len(groups) == (5 if kind else 3)
        return sum(group.is_unsharded for group in groups)

    seen = []
    for block in blocks(sharded.model):
        block.get_submodule("mlp").register_forward_pre_hook(lambda *_: seen.append(gathered(True)))
    rollouts = HuggingFaceEngine(
        build_tiny_model(SHAPE, 0)[0], SamplingConfig(max_response_tokens=4), eos_ids=[1], pad_id=0
    ).sample([(5, 6, 7)], 2, stream=(0,))
    for look in (
        lambda: sharded.check([5, 6, 7, 8]),
        lambda: sharded.hidden_of([5, 6]),
        lambda: sharded.score(rollouts, 64),
    ):
        look()
        assert (gathered(True), gathered(False)) == (0, 0)
    assert len(seen) >= 5 * 5
    assert 1 <= max(seen) <= 2


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
def test_a_head_that_does_something_else_is_refused_in_shards_too(sharded):
    forward = sharded.model.lm_head.forward
    sharded.model.lm_head.forward = lambda hidden: 3.0 * forward(hidden)
    with pytest.raises(ValueError, match=r"changes its logits in a way that is not known here"):
        sharded.check([5, 6, 7, 8])


def test_compiled_blocks_say_the_same():
    prompt = [5, 6, 7, 8, 9]
    policy, compiled = (
        Policy(
            *load(ModelConfig(tiny=SHAPE), ParallelConfig(compile=backend), device=CPU, size=1, seed=0),
            temperature=1.0,
            device=CPU,
        )
        for backend in (None, "eager")
    )
    assert torch.equal(policy.hidden_of(prompt), compiled.hidden_of(prompt))


def test_devices():
    assert choose_device("cpu") == torch.device("cpu")
    assert choose_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    with pytest.raises(ValueError, match=r"device = 'gpu': expected 'auto', 'cpu' or 'cuda'"):
        choose_device("gpu")
