"""The memory plan: every tensor it counts against those a small model really allocates, one by one; totals by hand."""

import json
import math
from collections import Counter
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from rich.console import Console

import entrocraft.train
from entrocraft.train import plan_command
from entrocraft.train.config import Config, ModelConfig
from entrocraft.train.config_lora import LoraConfig
from entrocraft.train.config_model import TinyModelConfig
from entrocraft.train.config_parallel import ParallelConfig
from entrocraft.train.config_reader import load_config
from entrocraft.train.model_shapes import SHAPES, meta_model, model_shape
from entrocraft.train.packing import MicroBatch
from entrocraft.train.plan import GB, RESERVE, make_plan
from entrocraft.train.plan_sizes import Known, held_tensors
from entrocraft.train.plan_trace import MASKED, VARLEN, listing_saved, packed_inputs, trace, trace_blocks
from entrocraft.train.policy import Policy
from entrocraft.train.sharding import build_mesh, shard_model
from entrocraft.train.tiny_model import build_tiny_model

CONFIGS = Path(entrocraft.train.__file__).parent / "configs"
# Odd numbers of rows nowhere divisible by 3, so that shards of different sizes are seen.
SMALL = TinyModelConfig(hidden_size=32, layers=2, heads=4, mlp_size=68, context=64)


def small(*, tied: bool = True, layers: int = 2) -> TinyModelConfig:
    return TinyModelConfig(hidden_size=32, layers=layers, heads=4, mlp_size=68, context=64, tied=tied)


def learn_once(model, tokenizer):
    """One real update of a whole model; its optimizer."""
    policy = Policy(model, tokenizer, temperature=1.0, device=torch.device("cpu"))
    ids = torch.randint(3, 200, (2, 16))
    source = torch.arange(20)
    batch = MicroBatch(input_BL=ids, position_BL=torch.arange(16).expand(2, 16), source_N=source, token_N=source)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    policy.token_stats(batch, torch.randint(3, 200, (20,))).logprob_T.sum().backward()
    optimizer.step()
    return optimizer


def really_held(model, optimizer):
    """What a rank has allocated: (kind, name, shape, bytes), local parts of what is sharded."""

    def local(tensor):
        return tensor.to_local() if hasattr(tensor, "to_local") else tensor

    found = set()
    for name, parameter in model.named_parameters():
        whole = {"weights": (name, parameter.detach()), "gradients": (name, parameter.grad)}
        if parameter.requires_grad:
            state = optimizer.state[parameter]
            moments = [("optimizer", (f"{name}.{key}", value)) for key, value in state.items()]
        else:
            whole.pop("gradients")
            moments = []
        for kind, (full_name, tensor) in [*whole.items(), *moments]:
            part = local(tensor)
            found.add((kind, full_name, tuple(part.shape), part.untyped_storage().nbytes()))
    return found


def counted(model, shards):
    return {(held.kind, held.name, held.shape, held.nbytes) for held in held_tensors(model, shards)}


@pytest.mark.parametrize("tied", [True, False])
def test_every_tensor_that_a_rank_keeps(tied):
    shape = small(tied=tied)
    model, tokenizer = build_tiny_model(shape, 0)
    optimizer = learn_once(model, tokenizer)
    planned = meta_model(model_shape(ModelConfig(tiny=shape))[0])
    assert counted(planned, 1) == really_held(model, optimizer)
    assert len(counted(planned, 1)) == 5 * len(list(model.named_parameters()))


@pytest.fixture
def third_of_a_run():
    """This process as the first of three, whose messages go nowhere: enough to see how tensors are cut."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=3)
    yield build_mesh(torch.device("cpu"), 3, None)
    dist.destroy_process_group()


@pytest.mark.parametrize("tied", [True, False])
def test_every_tensor_of_a_shard(third_of_a_run, tied):
    shape = small(tied=tied)
    model, _ = build_tiny_model(shape, 0)
    shard_model(model, ParallelConfig(), third_of_a_run, torch.float32)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    optimizer.step()
    planned = meta_model(model_shape(ModelConfig(tiny=shape))[0])
    really = really_held(model, optimizer)
    assert counted(planned, 3) == really
    embedding = next(size for kind, name, size, _ in really if (kind, name) == ("weights", "model.embed_tokens.weight"))
    assert embedding == (math.ceil(259 / 3), 32)


# SDPA with the mask of packed sequences, and eager attention; recomputed or not; in the dtype of CPU and of CUDA runs.
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize(("really", "planned"), [("sdpa", MASKED), ("eager", "eager")])
def test_every_tensor_that_is_kept_for_the_backward_pass(really, planned, recompute, dtype):
    shape = small()
    lists, traces = [], []
    for model, kind, device in (
        (build_tiny_model(shape, 0)[0], really, "cpu"),
        (meta_model(model_shape(ModelConfig(tiny=shape))[0]), planned, "meta"),
    ):
        for parameter in model.parameters():
            parameter.data = parameter.data.to(dtype)
        model.set_attn_implementation(kind)
        if recompute:
            model.gradient_checkpointing_enable()
        model.train()
        inputs = packed_inputs(3, 16, device=device)
        with listing_saved(model) as saved:
            hidden = model.base_model(**inputs).last_hidden_state
            hidden.backward(torch.empty_like(hidden))
        lists.append(saved)
        traces.append(trace(model, inputs))
    assert Counter(lists[1]) == Counter(lists[0])  # the order within an operation is its own
    assert len(lists[0]) > (3 if recompute else 40)
    measured, predicted = traces
    assert (predicted.kept, predicted.output) == (measured.kept, measured.output)
    # Eager kernels of the CPU allocate a little on their own, such as a gradient of the mask's type.
    assert predicted.score == pytest.approx(measured.score, rel=0.02)
    assert predicted.backward == pytest.approx(measured.backward, rel=0.02)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("kind", [MASKED, VARLEN])
def test_a_deep_model_is_two_short_ones_and_arithmetic(kind, recompute):
    model = meta_model(model_shape(ModelConfig(tiny=small(layers=7)))[0])
    model.set_attn_implementation(kind)
    if recompute:
        model.gradient_checkpointing_enable()
    inputs = packed_inputs(2, 32)
    assert trace_blocks(model, inputs) == trace(model, inputs)
    assert len(model.model.layers) == 7


def test_published_shapes_have_the_published_number_of_parameters():
    """As the files' own index gives them: bytes of all tensors, by two."""
    published = {
        "Qwen/Qwen3-4B-Base": 4_022_468_096,
        "Qwen/Qwen3-8B-Base": 8_190_735_360,
        "Qwen/Qwen3-14B-Base": 14_768_307_200,
        "meta-llama/Llama-3.1-8B-Instruct": 8_030_261_248,
    }
    for name, parameters in published.items():
        model = meta_model(model_shape(ModelConfig(path=name))[0])
        assert sum(parameter.numel() for parameter in model.parameters()) == parameters
    assert set(published) <= set(SHAPES)


def test_every_recipe_can_be_planned_here():
    """Offline, on 8 GPUs of 80 GB; recipes that a plan does not tell apart are planned once."""
    known, plans = Known(), {}
    for path in sorted(CONFIGS.rglob("*.yaml")):
        config = load_config([f"--config={path}"])
        key = repr((config.model, config.batch, config.sampling, config.data.max_prompt_tokens, config.engine))
        key += repr((config.reference, config.lora, config.parallel))
        if key in plans:
            continue
        plan = plans[key] = make_plan(config, 8, known=known)
        assert plan.peak == max(phase.peak for phase in plan.phases) > 0
        assert plan.activations["with"] < plan.activations["without"] or config.model.path is None
        if config.model.path == "Qwen/Qwen3-4B-Base":
            update = next(phase for phase in plan.phases if phase.name == "update").parts
            resident = {name: update[name] for name in ("weights", "optimizer", "gradients")}
            assert sum(resident.values()) / 2**30 == pytest.approx(16 * plan.parameters / 8 / 2**30, rel=1e-3)
    assert len(plans) >= 6


def test_parts_by_hand():
    """Qwen3-4B in bfloat16 on one GPU: 64 GB of fp32 weights, moments and gradients, as everyone counts them."""
    config = load_config(["--model.path=Qwen/Qwen3-4B-Base", "--model.gradient_checkpointing=true"])
    plan = make_plan(config, 1)
    update = next(phase for phase in plan.phases if phase.name == "update").parts
    n, V, H = 4_022_468_096, 151_936, 2560
    assert [update[name] // 1000 for name in ("weights", "gradients")] == [4 * n // 1000] * 2
    assert update["optimizer"] == pytest.approx(8 * n, rel=1e-6)
    block = (n - V * H - H) // 36
    assert update["gathered weights"] == 2 * (V * H + H + 2 * block)
    assert update["head gradient"] == 2 * V * H
    # A layer keeps its input [B, L, H] alone when the rest is recomputed.
    tokens = plan.rows * plan.length
    assert plan.activations["with"] == pytest.approx(36 * 2 * tokens * H, rel=0.15)
    sample = plan.phases[0].parts
    layer = 2 * 2 * 8 * 128 * 256 * plan.length  # keys and values of 8 heads of 128, 256 rollouts; the last is not fed
    assert sample["KV cache"] == 36 * layer
    assert sample["attention"] == 4 * layer  # repeated for 32 heads of the query
    assert not plan.fits(80 * GB)
    eight = make_plan(config, 8)
    assert {part: update[part] / size for part, size in eight.phases[2].parts.items() if part == "weights"} == {
        "weights": pytest.approx(8.0, rel=1e-3)
    }


@pytest.mark.parametrize(
    ("change", "phase", "smaller"),
    [
        (["--batch.tokens_per_microbatch=4096"], "update", "activations"),
        (["--parallel.cpu_offload=true"], "update", "weights"),
        (["--sampling.rollouts_per_batch=8"], "sample", "KV cache"),
        (["--engine.name=vllm_server"], "sample", "KV cache"),
    ],
)
def test_settings_lower_what_they_are_for(change, phase, smaller):
    base = ["--model.tiny.layers=2", "--data.max_prompt_tokens=100", "--sampling.max_response_tokens=400"]
    parallel = ["--parallel.param_dtype=bfloat16"]
    before, after = (make_plan(load_config([*base, *parallel, *extra]), 4) for extra in ([], change))
    parts = [next(p for p in plan.phases if p.name == phase).parts for plan in (before, after)]
    assert parts[1].get(smaller, 0) < parts[0][smaller]


def test_adapters_have_the_only_gradients():
    config = Config(model=ModelConfig(tiny=SMALL), lora=LoraConfig(rank=4))
    plan = make_plan(config)
    assert 0 < plan.trained < plan.parameters / 2
    update = next(phase for phase in plan.phases if phase.name == "update").parts
    assert update["gradients"] == 4 * plan.trained
    made_by_adam = next(phase for phase in plan.phases if phase.name == "optimizer").parts["temporaries"]
    assert made_by_adam <= 4 * plan.trained  # frozen weights have no part in it


def test_command(capsys, tmp_path):
    """JSON whose advice, followed, makes the plan fit; a table with the same numbers."""
    argv = ["--plan", "--plan-json", "--world-size", "2", "--config", str(CONFIGS / "paper" / "grpo.yaml")]
    argv += ["--engine.name", "hf"]
    assert plan_command.wanted(argv)
    assert plan_command.main(argv) == 3
    answer = json.loads(capsys.readouterr().out)
    assert not answer["fits"]
    assert answer["peak"] + RESERVE > 80 * GB
    best = next(change for change in answer["advice"] if change["fits"])
    name, value = best["change"].split(" = ")
    assert plan_command.main([*argv, f"--{name}", value]) == 0
    followed = json.loads(capsys.readouterr().out)
    assert followed["peak"] == best["peak"]
    console = Console(record=True, width=140)
    assert plan_command.main([*argv[:1], *argv[2:], f"--{name}", value], console) == 0
    text = console.export_text()
    assert f"{followed['peak'] / GB:.1f}" in text
    assert "fits into 80.0 GB" in text


def test_shapes_that_are_given(tmp_path):
    file = tmp_path / "config.json"
    file.write_text(json.dumps({"model_type": "llama"} | {k: v for k, v in SHAPES["Qwen/Qwen3-4B"].items() if k in (
        "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "vocab_size",
    )} | {"num_hidden_layers": 2}))  # fmt: skip
    by_file = make_plan(Config(), shape=str(file))
    assert make_plan(Config(), shape=file.read_text()).phases == by_file.phases
    assert by_file.dtype == "bfloat16"
    for wrong, message in (("{}", "model_type"), ("{", "not valid JSON"), ("nowhere.json", "expected a config.json")):
        with pytest.raises(ValueError, match=message):
            make_plan(Config(), shape=wrong)
    with pytest.raises(ValueError, match=r"--world-size 0"):
        make_plan(Config(), 0)
    with pytest.raises(ValueError, match=r"batch.tokens_per_microbatch = 8: .* at least 2047"):
        make_plan(load_config(["--batch.tokens_per_microbatch=8"]))
