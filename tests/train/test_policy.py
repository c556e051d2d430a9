"""The policy's own checks: what it may score, and what it refuses."""

import pytest
import torch
from transformers import Gemma2Config, Gemma2ForCausalLM, MambaConfig, MambaForCausalLM

from entrocraft.train.config import ModelConfig, TinyModelConfig
from entrocraft.train.policy import Policy, choose_device

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


def test_devices():
    assert choose_device("cpu") == torch.device("cpu")
    assert choose_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    with pytest.raises(ValueError, match=r"device = 'gpu': expected 'auto', 'cpu' or 'cuda'"):
        choose_device("gpu")
