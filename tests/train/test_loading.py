"""Weights read tensor by tensor into a model on the meta device: the same as transformers loads, or a clear refusal."""

import dataclasses

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import AutoModelForCausalLM

from entrocraft.train.config import ModelConfig
from entrocraft.train.config_lora import LoraConfig
from entrocraft.train.config_model import TinyModelConfig
from entrocraft.train.config_parallel import ParallelConfig
from entrocraft.train.export import export, named_weights
from entrocraft.train.loading import load, load_sharded, own_rows
from entrocraft.train.parallel import Ranks
from entrocraft.train.plan_trace import Allocations
from entrocraft.train.tiny_model import build_tiny_model

CPU = torch.device("cpu")
SHAPE = TinyModelConfig(hidden_size=32, layers=2, heads=2, mlp_size=64, context=64)


def saved(folder, *, tied, file_bytes=1 << 30):
    model, tokenizer = build_tiny_model(dataclasses.replace(SHAPE, tied=tied), 0)
    export(model, folder, Ranks(), file_bytes=file_bytes)
    tokenizer.save_pretrained(folder)
    return model


@pytest.fixture
def sharded():
    """How this one process reads a folder as a rank would: through FSDP in a group of one."""
    with Ranks.joined(device=CPU, timeout_s=60.0, needed=True):
        mesh = init_device_mesh("cpu", (1,), mesh_dim_names=("shards",))

        def read(folder, lora=None):
            place = ModelConfig(path=str(folder))
            return load_sharded(place, ParallelConfig(), lora or LoraConfig(), mesh, torch.float32, CPU, 3)[0]

        yield read


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_files_are_read_and_written_as_transformers_does(tmp_path, sharded, tied):
    model = saved(tmp_path, tied=tied, file_bytes=40_000)  # several files and an index
    assert len(list(tmp_path.glob("model-*-of-*.safetensors"))) > 2
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path)
    ours = sharded(tmp_path)
    for (name, weight), their in zip(model.named_parameters(), theirs.parameters(), strict=True):
        assert torch.equal(weight, their), name
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in named_weights(ours))
    assert (ours.lm_head.weight is ours.model.embed_tokens.weight) == tied
    for name, buffer in model.named_buffers():  # rotary frequencies are in no file
        assert torch.equal(ours.get_buffer(name), buffer), name


def test_an_adapted_model_begins_as_it_was_whatever_loads_it(tmp_path, sharded):
    model = saved(tmp_path, tied=True)
    lora = LoraConfig(rank=4)
    whole = load(ModelConfig(path=str(tmp_path)), ParallelConfig(), lora, device=CPU, size=1, seed=3)[0]
    ours = dict(sharded(tmp_path, lora).named_parameters())
    for name, parameter in whole.named_parameters():
        assert torch.equal(ours[name].full_tensor(), parameter), name
        assert ours[name].requires_grad == parameter.requires_grad == (".lora_" in name)
    assert sum(bool(p.detach().any()) for name, p in ours.items() if ".lora_A." in name) == 2 * 7
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in named_weights(whole))


def test_a_rank_of_eight_holds_its_share_and_one_tensor_at_a_time(tmp_path):
    """Bytes of all storages while it loads; the file's own rows, which are the share again tensor by tensor, are not
    made by an operation of torch and so not among them."""
    build_tiny_model(SHAPE, 0)[1].save_pretrained(tmp_path)
    model = build_tiny_model(dataclasses.replace(SHAPE, layers=24), 0)[0]
    export(model, tmp_path, Ranks())
    sizes = [weight.nbytes for weight in model.parameters()]
    dist.init_process_group("fake", store=FakeStore(), rank=3, world_size=8)
    try:
        mesh = init_device_mesh("cpu", (8,), mesh_dim_names=("shards",))
        place = ModelConfig(path=str(tmp_path))
        with Allocations("cpu") as held:
            loaded, _ = load_sharded(place, ParallelConfig(), LoraConfig(), mesh, torch.float32, CPU, 3)
        own = sum(weight.to_local().nbytes for weight in loaded.parameters())
        rows = {name: weight.to_local() for name, weight in loaded.named_parameters()}
        for name, weight in model.named_parameters():
            assert torch.equal(rows[name], weight[own_rows(len(weight), mesh).start : own_rows(len(weight), mesh).stop])
    finally:
        dist.destroy_process_group()
    assert own == pytest.approx(sum(sizes) / 8, rel=0.02)
    assert own <= held.peak < own + max(sizes) + 0.05 * sum(sizes) < 0.5 * sum(sizes)


def test_files_that_do_not_fit_are_refused(tmp_path, sharded):
    saved(tmp_path, tied=False)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    short = {name: tensor for name, tensor in tensors.items() if name != "lm_head.weight"}
    save_file(short, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"no tensor for 1 of \d+ parameters, such as lm_head.weight"):
        sharded(tmp_path)
    save_file({**tensors, "lm_head.weight": torch.zeros(3, 32)}, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lm_head.weight has shape \(3, 32\) in the files; the model expects"):
        sharded(tmp_path)
    file.unlink()
    with pytest.raises(ValueError, match=r"model.path = .*: neither a folder with a model in safetensors"):
        sharded(tmp_path)
    with pytest.raises(ValueError, match=r"parallel.shard_ranks = 2: expected a divisor of the 1 processes"):
        load(ModelConfig(tiny=SHAPE), ParallelConfig(shard_ranks=2), device=CPU, size=1, seed=0)
