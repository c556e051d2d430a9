"""Which device a process works on, and what is on it when a run goes on."""

import pytest
import torch

from entrocraft.train.config import Config
from entrocraft.train.config_engine import EngineConfig
from entrocraft.train.config_evaluation import EvaluationConfig
from entrocraft.train.config_model import ModelConfig, TinyModelConfig
from entrocraft.train.eval_command import load_policy
from entrocraft.train.parallel import local_device
from entrocraft.train.tiny_model import build_tiny_model


@pytest.fixture
def current(monkeypatch):
    """Devices that were made the current one."""
    made = []
    monkeypatch.setattr(torch.cuda, "set_device", made.append)
    return made


@pytest.mark.parametrize(
    ("name", "rank", "expected"),
    [("cuda", None, "cuda:0"), ("cuda", "3", "cuda:3"), ("cuda:2", None, "cuda:2"), ("cpu", "3", "cpu")],
)
def test_a_gpu_has_a_number_and_is_the_current_one(current, monkeypatch, name, rank, expected):
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    if rank is not None:
        monkeypatch.setenv("LOCAL_RANK", rank)
    device = local_device(torch.device(name))
    assert device == torch.device(expected)
    assert current == ([device] if device.type == "cuda" else [])


def test_one_gpu_for_several_processes_is_refused(current, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "8")
    with pytest.raises(ValueError, match="device = 'cuda:1': 8 processes cannot share one GPU"):
        local_device(torch.device("cuda:1"))
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert local_device(torch.device("cuda:1")).index == 1
    assert len(current) == 1


def test_an_evaluation_publishes_from_a_gpu_with_a_number(current, monkeypatch, tmp_path):
    """vLLM's thread takes it for its own, which `cuda` alone cannot be."""
    model, tokenizer = build_tiny_model(TinyModelConfig(hidden_size=16, layers=1, heads=2, mlp_size=32), 0)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    policy = load_policy(
        Config(
            model=ModelConfig(path=str(tmp_path)),
            engine=EngineConfig(name="vllm"),
            evaluation=EvaluationConfig(entropy=False),
        )
    )
    assert policy.device == torch.device("cuda", 0)
    assert current == [policy.device]
