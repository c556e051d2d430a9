"""The memory plan's temporaries of the optimizer and of rollouts against what a small model really allocates."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from entrocraft.train.config import Config, SamplingConfig
from entrocraft.train.config_model import TinyModelConfig
from entrocraft.train.config_parallel import ParallelConfig
from entrocraft.train.config_reader import load_config
from entrocraft.train.plan import make_plan
from entrocraft.train.plan_trace import Allocations
from entrocraft.train.policy import Policy
from entrocraft.train.run import _optimizer
from entrocraft.train.sampling import HuggingFaceEngine
from entrocraft.train.sharding import build_mesh, shard_model
from entrocraft.train.tiny_model import build_tiny_model


def planned(world, **settings):
    """Parts of each phase, by its name."""
    argv = [f"--{name.replace('__', '.')}={value}" for name, value in settings.items()]
    return {phase.name: dict(phase.parts) for phase in make_plan(load_config(argv), world).phases}


# A whole model, and a third of a sharded one: 259 rows of the embedding are the largest tensor.
@pytest.mark.parametrize("world", [1, 3])
def test_what_a_step_of_the_optimizer_makes(world):
    shape: dict[str, Any] = {"hidden_size": 32, "layers": 2, "heads": 4, "mlp_size": 68}
    settings = {f"model__tiny__{name}": size for name, size in shape.items()}
    plan = planned(world, parallel__param_dtype="float32", **settings)
    model, tokenizer = build_tiny_model(TinyModelConfig(**shape), 0)
    cpu = torch.device("cpu")
    try:
        if world > 1:
            dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world)
            shard_model(model, ParallelConfig(), build_mesh(cpu, world, None), torch.float32)
        optimizer = _optimizer(Config(), Policy(model, tokenizer, temperature=1.0, device=cpu))
        assert optimizer.defaults["foreach"] is False  # so it is on CUDA, where torch would choose otherwise
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        with Allocations() as seen:
            optimizer.step()
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    assert seen.peak == plan["optimizer"]["temporaries"] == 2 * 4 * -(-259 // world) * 32
    assert seen.alive == 0


# Each of the three moments that may be the fullest: the prompts' pass, attention of the last token, its draw.
@pytest.mark.parametrize(
    ("prompt", "response", "vocabulary", "fullest"),
    [(100, 6, 259, "forward pass"), (8, 40, 259, "attention"), (8, 6, 10000, "logits")],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_rollouts_take(prompt, response, vocabulary, fullest, dtype):
    shape: dict[str, Any] = {"hidden_size": 256, "layers": 2, "heads": 8, "mlp_size": 512, "vocabulary": vocabulary}
    settings = {f"model__tiny__{name}": size for name, size in shape.items()}
    parts = planned(
        1,
        **settings,
        device="cpu",
        parallel__param_dtype=str(dtype).removeprefix("torch."),
        data__max_prompt_tokens=prompt,
        sampling__max_response_tokens=response,
        batch__prompts_per_step=2,
        batch__samples_per_prompt=4,
    )["sample"]
    assert max(("forward pass", "attention", "logits"), key=lambda name: parts.get(name, 0)) == fullest
    model = build_tiny_model(TinyModelConfig(**shape), 0)[0].to(dtype)
    cached = []  # bytes of all keys and values after each pass

    def after(module, args, kwargs, output):
        layers = output.past_key_values.layers
        cached.append(sum(t.untyped_storage().nbytes() for layer in layers for t in (layer.keys, layer.values)))

    model.register_forward_hook(after, with_kwargs=True)
    # No token ends a response. One prompt is shorter, and padded.
    engine = HuggingFaceEngine(model, SamplingConfig(max_response_tokens=response), eos_ids=[vocabulary + 1], pad_id=0)
    with Allocations() as seen:
        rollouts = engine.sample([(5,) * prompt, (5,) * (prompt - 3)], 4, stream=(1,))
    assert rollouts.length_R.tolist() == [response] * 8
    assert parts["KV cache"] == (cached[0] if fullest == "forward pass" else cached[-1])
    made = sum(parts.get(name, 0) for name in ("KV cache", "forward pass", "attention", "logits"))
    assert made == pytest.approx(seen.peak, rel=0.05)
