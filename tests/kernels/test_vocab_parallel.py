"""A vocabulary sharded over real processes equals the whole one: values, the same bits on every rank, and gradients."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from entrocraft.kernels import linear_logprob_entropy, linear_logprob_entropy_reference
from entrocraft.kernels.testing import assert_no_worse_than_torch

RANK_SCRIPT = Path(__file__).with_name("vocab_parallel_rank.py")
T, V, H = 23, 101, 12
EXTRA = {"collision": True, "varentropy": True, "argmax": True}
# Modes, options, and shards: an uneven last one, an empty one, padding inside the last and over all of it.
CASES: list[dict] = [
    {"options": EXTRA},
    {"options": {"softcap": 6.0, "temperature": torch.linspace(0.5, 1.5, T), **EXTRA}, "bias": True},
    {"options": {"mode": "cache", "cache_bytes": 9 * 260}},
    {"options": {"mode": "cache", "cache_bytes": 1 << 20, "softcap": 6.0}, "bias": True},
    {"options": {"mode": "frozen", "buffer_bytes": 9000}, "uneven": True},
    {"options": {"mode": "frozen", "softcap": 6.0}, "bias": True},
    {"options": {"buffer_bytes": 3000, **EXTRA}, "uneven": True},
    {"options": {"vocab_size": 90, **EXTRA}, "bias": True},
    {"options": {"vocab_size": 40}},
    {"options": {}, "dtensor": True},
    {"options": {"mode": "cache", "cache_bytes": 1 << 20}, "dtensor": True},
    {"options": {}, "dtype": torch.bfloat16},
    {"options": {"ignore_index": 7}, "dtype": torch.float64},
]


def _case(world: int, *, options, bias=False, uneven=False, dtensor=False, dtype=torch.float32) -> dict:
    rows = -(-V // world)
    bounds = [min(V, rank * rows) for rank in range(world)] + [V]
    if uneven:  # the second rank has nothing, the last most
        bounds = [0, 3] + [3] * (world - 2) + [V]
    target_T = torch.randint(0, options.get("vocab_size", V), (T,))
    target_T[3:7] = options.get("ignore_index", -100)
    return {
        "hidden_TH": (3 * torch.randn(T, H)).to(dtype),
        "weight_VH": torch.randn(V, H).to(dtype),
        "bias_V": torch.randn(V).to(dtype) if bias else None,
        "target_T": target_T,
        "upstream": torch.randn(3, T) * (torch.arange(T) % 4 > 0),
        "bounds": bounds,
        "dtensor": dtensor,
        "options": options,
    }


def _whole(case: dict, dtype: torch.dtype | None, op) -> dict:
    """The same on one device; the reference leaves padding out by not being given it."""
    options = dict(case["options"])
    size = options.get("vocab_size", V)
    frozen = options.get("mode") == "frozen"
    leaves = {"hidden": case["hidden_TH"], "weight": case["weight_VH"], "bias": case["bias_V"]}
    leaves = {name: leaf.to(dtype or leaf.dtype).clone() for name, leaf in leaves.items() if leaf is not None}
    needed = {name: leaf.requires_grad_() for name, leaf in leaves.items() if not frozen or name == "hidden"}
    if op is linear_logprob_entropy_reference:
        for name in ("vocab_size", "mode", "cache_bytes", "buffer_bytes"):
            options.pop(name, None)
    else:
        size = V
    bias_V = leaves["bias"][:size] if "bias" in leaves else None
    stats = op(leaves["hidden"], leaves["weight"][:size], case["target_T"], bias_V=bias_V, **options)
    total = (case["upstream"] * torch.stack([stats.logprob_T, stats.entropy_T, stats.lse_T])).sum()
    return {
        "stats": stats.as_dict(),
        "grads": dict(zip(needed, torch.autograd.grad(total, [*needed.values()]), strict=True)),
    }


@pytest.fixture(scope="module", params=[2, 4], ids=lambda world: f"{world}_ranks")
def ran(request, tmp_path_factory):
    """Every case, and what each of the ranks got for it."""
    world, folder = request.param, tmp_path_factory.mktemp("ranks")
    torch.manual_seed(5)
    cases = [_case(world, **case) for case in CASES]
    torch.save(cases, folder / "cases.pt")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    commands = [[sys.executable, "-P", str(RANK_SCRIPT), str(rank), str(world), str(folder)] for rank in range(world)]
    ranks = [subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) for command in commands]
    try:
        errors = [rank.communicate(timeout=200)[1] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0] * world, "\n".join(errors)[-3000:]
    return cases, list(zip(*(torch.load(folder / f"rank{rank}.pt") for rank in range(world)), strict=True))


@pytest.mark.parametrize("index", range(len(CASES)), ids=lambda index: str(CASES[index])[:60])
def test_shards_equal_the_whole(ran, index):
    case, ranks = ran[0][index], ran[1][index]
    one, exact = (_whole(case, dtype, linear_logprob_entropy_reference) for dtype in (None, torch.float64))
    low = case["hidden_TH"].dtype == torch.bfloat16
    for name, wanted in exact["stats"].items():
        for rank in ranks:
            assert torch.equal(rank["stats"][name], ranks[0]["stats"][name]), f"{name} differs between ranks"
        actual = ranks[0]["stats"][name]
        if wanted.dtype in (torch.int64, torch.bool):
            assert torch.equal(actual, wanted), name
        else:
            assert_no_worse_than_torch(actual, one["stats"][name], wanted, floor=3e-6, name=name)
    for rank in ranks:
        assert torch.equal(rank["grads"]["hidden"], ranks[0]["grads"]["hidden"])
    got = {"hidden": ranks[0]["grads"]["hidden"]}
    got |= {name: torch.cat([rank["grads"][name] for rank in ranks]) for name in ranks[0]["grads"] if name != "hidden"}
    wanted_names = set(exact["grads"]) - ({"bias"} if case["dtensor"] else set())
    assert set(got) == wanted_names
    for name, actual in got.items():
        wanted = exact["grads"][name]
        floor = float(wanted.abs().max()) * (2.0**-8 if low else 4e-6)
        assert_no_worse_than_torch(actual, one["grads"][name], wanted, floor=floor, name=name)
    size = case["options"].get("vocab_size", V)
    for name in set(got) - {"hidden"}:
        assert float(got[name][size:].abs().sum()) == 0.0, "padding has a gradient"


@pytest.mark.parametrize("mode", ["recompute", "cache", "frozen"])
def test_padding_without_a_group(mode):
    torch.manual_seed(6)
    case = _case(1, options={"vocab_size": 77, "mode": mode, "cache_bytes": 1 << 20, **EXTRA}, bias=True)
    actual, one, exact = (
        _whole(case, dtype, op)
        for dtype, op in (
            (None, linear_logprob_entropy),
            (None, linear_logprob_entropy_reference),
            (torch.float64, linear_logprob_entropy_reference),
        )
    )
    for name, wanted in exact["stats"].items():
        assert_no_worse_than_torch(actual["stats"][name], one["stats"][name], wanted, floor=3e-6, name=name)
    for name, wanted in exact["grads"].items():
        floor = 4e-6 * float(wanted.abs().max())
        assert_no_worse_than_torch(actual["grads"][name], one["grads"][name], wanted, floor=floor, name=name)
        if name != "hidden":
            assert float(actual["grads"][name][77:].abs().sum()) == 0.0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab_start": 3}, r"group is None and vocab_start is 3; expected both or neither"),
        ({"vocab_size": 0}, "vocab_size is 0; expected a positive number of tokens, at most the 5 rows"),
        ({"vocab_size": 6}, "vocab_size is 6; expected a positive number"),
        ({"vocab_size": 3, "target_T": torch.tensor([3])}, r"target_T\[0\] is 3, outside the vocabulary \[0, 3\)"),
    ],
    ids=str,
)
def test_a_place_that_cannot_be(changes, message):
    arguments = {"hidden_TH": torch.zeros(1, 4), "weight_VH": torch.zeros(5, 4), "target_T": torch.tensor([0])}
    with pytest.raises(ValueError, match=message):
        linear_logprob_entropy(**arguments | changes)


def test_a_dtensor_says_how_it_is_to_be_read(tmp_path):
    script = """
import sys, torch, torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from entrocraft.kernels import linear_logprob_entropy
dist.init_process_group("gloo", init_method="file://" + sys.argv[1], rank=0, world_size=1)
mesh = init_device_mesh("cpu", (1,))
for placement, options in ((Shard(0), {}), (Replicate(), {"group": dist.group.WORLD})):
    weight_VH = distribute_tensor(torch.zeros(5, 4), mesh, [placement])
    try:
        linear_logprob_entropy(torch.zeros(1, 4), weight_VH, torch.tensor([0]), **options)
    except ValueError as error:
        print(error)
dist.destroy_process_group()
"""
    run = subprocess.run(
        [sys.executable, "-P", "-c", script, str(tmp_path / "meet")],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    unsaid, whole = run.stdout.splitlines()
    assert "weight_VH is a DTensor" in unsaid
    assert "pass weight_VH.full_tensor()" in unsaid
    assert "expected (Shard(dim=0),) on a mesh of one dimension whose group is `group`" in whole
