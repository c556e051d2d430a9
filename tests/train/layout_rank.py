"""Every world of `test_sharding.py`: those of `sharded_rank.py`, then runs that go on where another layout stopped.

    python layout_rank.py FOLDER

Four ranks write checkpoints, two ranks read them and write theirs, and four read those. A layout is what
`parallel` says at a number of ranks: two copies of two shards, say, or shards in host memory. On a CPU that memory is
the device's own: what runs is FSDP2's way through it.
"""

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))  # started with -P

import sharded_rank
from sharded_rank import adam, config, learn, load_policy, run_world, whole_tensors

from entrocraft.train.checkpoint import CheckpointFolder
from entrocraft.train.config import Config
from entrocraft.train.config_parallel import ParallelConfig
from entrocraft.train.parallel import Ranks
from entrocraft.train.policy import Policy
from entrocraft.train.sharding import full_tensor

PLAIN: dict[str, Any] = {}
OFFLOAD: dict[str, Any] = {"cpu_offload": True}
COPIES: dict[str, Any] = {"shard_ranks": 2}
# What is written: the model, the ranks and their layout.
WRITTEN: dict[str, tuple[str, int, dict[str, Any]]] = {
    "copies": ("tied", 4, COPIES),
    "copies_offload": ("untied", 4, COPIES | OFFLOAD),
    "shards": ("untied", 2, PLAIN),
    "shards_offload": ("tied", 2, OFFLOAD),
}
# Who reads it. The test itself reads each in one process besides, whole.
READ: list[tuple[str, int, dict[str, Any]]] = [
    ("copies", 2, PLAIN),
    ("copies_offload", 2, {"shard_ranks": 1}),
    ("shards", 2, OFFLOAD),
    ("shards", 4, COPIES | OFFLOAD),
    ("shards_offload", 2, PLAIN),
    ("shards_offload", 4, COPIES),
]


def setting_of(folder: Path, name: str, layout: dict[str, Any]) -> Config:
    """The settings of what is written under this name, in any layout."""
    return replace(config(folder, WRITTEN[name][0], 40, whole=True), parallel=ParallelConfig(**layout))


def whole_state(policy: Policy, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """Weights, both moments and the number of steps of each, gathered."""
    state = whole_tensors(policy.model)
    for name, p in policy.model.named_parameters():
        for kind in ("exp_avg", "exp_avg_sq", "step"):
            state[f"{name}.{kind}"] = full_tensor(optimizer.state[p][kind]).clone()
    return state


def write(folder: Path, name: str, ranks: Ranks, batch: dict[str, Any]) -> dict[str, Any]:
    """Two steps, between which a checkpoint is written: what was saved, and what the run that was not interrupted
    came to."""
    setting = setting_of(folder, name, WRITTEN[name][2])
    policy = load_policy(setting, ranks)
    optimizer = adam(policy)
    learn(policy, setting, optimizer, batch)
    saved = whole_state(policy, optimizer)
    CheckpointFolder(folder / f"layout_{name}", keep=1, ranks=ranks).save(1, policy.model, optimizer, {})
    metrics = learn(policy, setting, optimizer, batch)
    return {"found": saved, "metrics": metrics, "after": whole_state(policy, optimizer)}


def read(folder: Path, name: str, layout: dict[str, Any], ranks: Ranks, batch: dict[str, Any]) -> dict[str, Any]:
    """The same in another layout, of what the checkpoint brought back."""
    setting = setting_of(folder, name, layout)
    policy = load_policy(setting, ranks)
    optimizer = adam(policy)
    state = CheckpointFolder(folder / f"layout_{name}", keep=1, ranks=ranks).load_newest(policy.model, optimizer)
    assert state is not None
    assert state["step"] == 1
    found = whole_state(policy, optimizer)
    metrics = learn(policy, setting, optimizer, batch)
    return {"found": found, "metrics": metrics, "after": whole_state(policy, optimizer)}


def layouts(folder: Path) -> None:
    """What this world writes, then what it reads and has not read."""
    torch.set_num_threads(1)
    batch = torch.load(folder / "batch.pt", weights_only=True)
    with Ranks.joined(device=sharded_rank.CPU, timeout_s=20.0, needed=True) as ranks:
        for name, (_, world, _) in WRITTEN.items():
            if world == ranks.size and not (folder / f"written_{name}.pt").exists():
                made = write(folder, name, ranks, batch)
                ranks.barrier()
                if ranks.main:
                    torch.save(made, folder / f"written_{name}.pt")
                ranks.barrier()
        for number, (name, world, layout) in enumerate(READ):
            if world == ranks.size and (folder / f"written_{name}.pt").exists():
                torch.save(read(folder, name, layout, ranks, batch), folder / f"read_{number}_rank{ranks.rank}.pt")


if __name__ == "__main__":
    place = Path(sys.argv[1])
    for size in (1, 2, 4):
        run_world(place, size, sharded_rank.main)
    for size in (4, 2, 4):
        run_world(place, size, layouts)
