"""Real processes with gloo: shards train as one process does, whichever way they are cut, saved and read back."""

import fcntl
import importlib.util
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from entrocraft.train.config import SamplingConfig
from entrocraft.train.config_model import TinyModelConfig
from entrocraft.train.parallel import Ranks, balanced
from entrocraft.train.policy import Policy
from entrocraft.train.sampling import HuggingFaceEngine
from entrocraft.train.tiny_model import build_tiny_model

pytestmark = pytest.mark.runs

SCRIPT = Path(__file__).with_name("layout_rank.py")
_spec = importlib.util.spec_from_file_location("layout_rank", SCRIPT)
assert _spec is not None
assert _spec.loader is not None
layout_rank = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(layout_rank)
sharded_rank = layout_rank.sharded_rank

PROMPTS = [(5, 6, 7), (9, 10), (30, 31, 32, 33), (8,)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where models, a batch and what every rank of 1, 2 and 4 got are: made once, also for several test processes."""
    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent
    place, done = shared / "shards", shared / "shards.done"
    with (shared / "shards.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not done.exists():
            make_models_and_batch(place)
            run_worlds(place)
            done.touch()
    return place


def make_models_and_batch(place):
    """Two models on disk, and a batch of ragged rollouts with a decision that rejects some."""
    place.mkdir(exist_ok=True)
    for name in ("tied", "untied"):
        shape = TinyModelConfig(hidden_size=32, layers=2, heads=2, mlp_size=64, context=64, tied=name == "tied")
        model, tokenizer = build_tiny_model(shape, 0)
        model.generation_config.eos_token_id = [1, 7]
        model.save_pretrained(place / name)
        tokenizer.save_pretrained(place / name)
    policy = Policy(model, tokenizer, temperature=0.9, device=torch.device("cpu"))
    engine = HuggingFaceEngine(
        policy.model, SamplingConfig(max_response_tokens=9, temperature=0.9), eos_ids=range(3, 40), pad_id=0
    )
    rollouts = engine.sample(PROMPTS, 3, stream=(0,))
    torch.manual_seed(1)
    keep_R = torch.arange(12) % 5 != 2
    names = ("token_T", "rollout_T", "mask_T", "group_R", "sample_R", "prompts", "truncated_R", "weight_version")
    batch = {
        "rollouts": {name: getattr(rollouts, name) for name in names},
        "shift_T": 0.3 * torch.randn(rollouts.T),
        "decision": {
            "keep_T": keep_R[rollouts.rollout_T],
            "keep_R": keep_R,
            "advantage_R": torch.randn(12),
            "direction": 0,
            "bypassed": False,
            "reason": "",
            "metrics": {},
        },
    }
    torch.save(batch, place / "batch.pt")


def run_worlds(place):
    """One rank, then two, then four; then other layouts. The later ones read the checkpoints of the first."""
    command = [sys.executable, "-P", str(SCRIPT), str(place)]
    done = subprocess.run(
        command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=400
    )
    assert done.returncode == 0, done.stderr[-5000:]


@pytest.fixture(scope="module")
def worlds(folder):
    """What every rank of 1, 2 and 4 got."""
    return {
        world: [torch.load(folder / f"rank{rank}_of_{world}.pt", weights_only=True) for rank in range(world)]
        for world in (1, 2, 4)
    }


@pytest.fixture(scope="module")
def alone(folder):
    """The same by a whole model in one process, for each case."""
    batch = torch.load(folder / "batch.pt", weights_only=True)
    made = {}
    for name in sharded_rank.CASES:
        made[name] = sharded_rank.results(sharded_rank.config(folder, name, 512, whole=True), Ranks(), batch)
    return made


def apart(actual, expected):
    """Largest difference, relative to the largest number of the tensor."""
    difference = float((actual - expected).abs().max())
    return difference / float(expected.abs().max()) if difference else 0.0


def apart_together(actual, expected):
    """Norm of the differences of all tensors together, relative to the norm of all tensors."""
    differences, sizes = ([float(one.norm()) for one in ones] for ones in (
        [value - expected[key] for key, value in actual.items()], expected.values()))  # fmt: skip
    return math.hypot(*differences) / math.hypot(*sizes)


ALL = [(world, name) for world in (1, 2, 4) for name in sharded_rank.cases(world)]


@pytest.mark.parametrize(("world", "name"), ALL, ids=lambda value: str(value))
def test_ranks_equal_one_process(worlds, alone, world, name):
    expected, ranks = alone[name], [made[name] for made in worlds[world]]
    # bfloat16 has 8 bits, and a few hundred of its products are in every number.
    low = name.endswith("bfloat16")
    # Where a gradient is what is left of terms of both signs, single entries of fp32 sums are a few roundings apart;
    # how many depends on the processor. All together are within 1e-6.
    near, far = (3e-2, 0.2) if low else (1e-6, 4e-6)
    for made in ranks:
        for kind, limit in (("scores", near), ("gradients", far), ("weights", near)):
            assert made[kind].keys() == expected[kind].keys()
            for key, value in made[kind].items():
                assert value.dtype == torch.float32
                assert apart(value, expected[kind][key]) <= limit, f"{kind} {key}"
                assert torch.equal(value, ranks[0][kind][key]), f"{kind} {key} differs between ranks"
            assert apart_together(made[kind], expected[kind]) <= near, kind
        assert made["metrics"] == ranks[0]["metrics"]
        assert made["ends"] == expected["ends"] == [1, 7]
        # From gathered logits of the same hidden rows, which in bfloat16 were rounded before both.
        assert max(made["self_check"].values()) < (1e-3 if low else 1e-5), made["self_check"]
        for kind in ("sums", "metrics"):
            for key, value in expected[kind].items():
                if not low or key in ("tokens", "updates", "updates_empty"):
                    assert made[kind][key] == pytest.approx(value, rel=1e-6, abs=1e-7), key
    clipped = (expected["sums"]["low"] + expected["sums"]["high"]) / expected["sums"]["tokens"]
    assert 0.02 < clipped < 0.9
    assert expected["metrics"]["grad_norm"] > 2 * 0.5  # the limit
    assert expected["metrics"]["updates"] == 4


@pytest.mark.parametrize(
    ("name", "without"),
    [
        ("eq5_entropic", {"method": "plain", "method_options": {}}),
        ("eq5_entropic", {"aggregation": "kept_tokens"}),
        ("gspo", {"policy": "ppo_clip", "policy_options": {}}),
        ("gspo", {"aggregation": "token_mean"}),
    ],
    ids=["entropic", "eq5", "gspo", "seq_mean_token_mean"],
)
def test_what_a_case_is_named_for_is_in_its_gradient(folder, alone, name, without):
    setting = sharded_rank.config(folder, name, 512, whole=True)
    setting = replace(setting, loss=replace(setting.loss, **without))
    batch = torch.load(folder / "batch.pt", weights_only=True)
    gradients = sharded_rank.results(setting, Ranks(), batch)["gradients"]
    assert all(apart(value, alone[name]["gradients"][key]) > 0.02 for key, value in gradients.items())


def test_a_sharded_head_is_never_multiplied_by_a_plain_tensor(worlds):
    """verl 0.9.1 fails there: 'got mixed torch.Tensor and DTensor'. Every case above went through the same head."""
    for world in (2, 4):
        for made in worlds[world]:
            in_torch, in_op = made["mixed"]
            assert "got mixed torch.Tensor and DTensor" in in_torch
            assert "weight_VH is a DTensor" in in_op


def test_each_rank_holds_its_share(worlds, alone):
    whole = sum(weight.numel() for weight in alone["untied"]["weights"].values())
    for world in (2, 4):
        held = [made["held"] for made in worlds[world]]
        assert sum(held) == whole
        assert max(held) < 1.02 * whole / world


def test_ranks_that_disagree_are_told_which(worlds):
    for world in (2, 4):
        for made in worlds[world]:
            assert "the ranks do not agree on a test: ranks [1] differ from rank 0" in made["disagreement"]


def test_what_cannot_be_sharded_is_refused(worlds):
    for world in (2, 4):
        tied, copies, three = worlds[world][0]["refused"]
        assert "vocab_parallel_head: this model's head is tied to its embedding" in tied
        assert "does not go with parallel.shard_ranks" in copies
        assert f"parallel.shard_ranks = 3: expected a divisor of the {world} processes" in three


def test_whole_weights_generate_and_are_exported(worlds, folder):
    for world, name in ((2, "untied"), (4, "untied"), (2, "vocabulary"), (4, "vocabulary"), (2, "adapters")):
        there = folder / f"{name}_{world}"
        model = AutoModelForCausalLM.from_pretrained(there).eval()
        expected = worlds[world][0][name]["weights"]
        if name != "adapters":  # they are merged
            assert all(torch.equal(value, expected[key]) for key, value in model.named_parameters())
        with torch.no_grad():
            logits = model(input_ids=torch.arange(3, 12)[None], use_cache=False).logits
        for made in worlds[world]:
            assert apart(made[name]["logits"], logits) <= 1e-6


@pytest.mark.parametrize("name", sharded_rank.CHECKPOINTED)
def test_a_checkpoint_of_two_ranks_goes_on_at_four_and_at_one(worlds, folder, name):
    saved = worlds[2][0][f"saved_{name}"]
    at_one = sharded_rank.resumed(sharded_rank.config(folder, name, 40, whole=True), Ranks(), folder / f"run_{name}")
    for found in (*(made[f"resumed_{name}"] for made in worlds[4]), at_one):
        assert found.keys() == saved.keys()
        for key, value in saved.items():
            assert torch.equal(found[key], value), key
    assert any(float(value.max()) > 0 for key, value in saved.items() if key.endswith("moment"))
    assert any(not torch.equal(value, saved[key]) for key, value in worlds[2][0][f"moved_{name}"].items())


@pytest.fixture(scope="module")
def read_whole(folder):
    """Every checkpoint of another layout, and the step after it, in this one process."""
    batch = torch.load(folder / "batch.pt", weights_only=True)
    return {name: layout_rank.read(folder, name, {}, Ranks(), batch) for name in layout_rank.WRITTEN}


READ = [*enumerate(layout_rank.READ), *((None, (name, 1, {})) for name in layout_rank.WRITTEN)]


@pytest.mark.parametrize(
    ("number", "what"), READ, ids=[f"{name}-{world}{''.join(f'-{k}' for k in how)}" for _, (name, world, how) in READ]
)
def test_a_run_goes_on_in_another_layout(folder, read_whole, number, what):
    """HSDP to FSDP2 and back, offloaded to host memory and not: every bit comes back, and the next step is that of the
    run that was not interrupted, but for the order of sums: 3e-6 is some units in the last place of squared gradients.
    """
    name, world, layout = what
    _, writers, written_layout = layout_rank.WRITTEN[name]
    written = torch.load(folder / f"written_{name}.pt", weights_only=True)
    files = [folder / f"read_{number}_rank{rank}.pt" for rank in range(world)]
    ranks = [read_whole[name]] if number is None else [torch.load(file, weights_only=True) for file in files]
    same_sums = world == writers and layout.get("shard_ranks") == written_layout.get("shard_ranks")
    near = 0.0 if same_sums else 1e-6
    for made in ranks:
        assert made["found"].keys() == made["after"].keys() == written["found"].keys()
        for key, value in written["found"].items():
            assert torch.equal(made["found"][key], value), key
        for key, value in written["after"].items():
            assert apart(made["after"][key], value) <= 3 * near, key
        assert made["metrics"].keys() == written["metrics"].keys()
        for key, value in written["metrics"].items():
            assert made["metrics"][key] == pytest.approx(value, rel=near, abs=0.0 if same_sums else 1e-9), key
    steps = {float(value) for key, value in written["found"].items() if key.endswith(".step")}
    assert steps == {4.0}
    assert written["metrics"]["updates"] == 4
    for key, value in written["found"].items():
        moved = apart(written["after"][key], value)
        assert moved > 1e-3, f"{key} moved by {moved}"  # the step that is compared was one


def test_lengths_are_balanced():
    torch.manual_seed(2)
    costs = torch.randint(1, 4000, (64,)).tolist()
    lists = balanced(costs, 4)
    assert sorted(i for chosen in lists for i in chosen) == list(range(64))
    totals = [sum(costs[i] for i in chosen) for chosen in lists]
    assert max(totals) - min(totals) < 0.02 * max(totals)
    assert balanced([5], 3) == [[0], [], []]
