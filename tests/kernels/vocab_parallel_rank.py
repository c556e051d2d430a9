"""One rank of `test_vocab_parallel.py`: runs every case on its shard and saves what it got.

    python vocab_parallel_rank.py RANK WORLD FOLDER

The folder holds `cases.pt`, a list of cases, and is where the ranks meet.
"""

import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from entrocraft.kernels import linear_logprob_entropy


def run(case: dict, rank: int) -> dict:
    """Statistics, and the gradients of hidden and of this rank's rows."""
    first, last = case["bounds"][rank], case["bounds"][rank + 1]
    hidden_TH = case["hidden_TH"].clone().requires_grad_()
    frozen = case["options"].get("mode") == "frozen"
    bias_V = case["bias_V"]
    if case["dtensor"]:
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        weight_VH = distribute_tensor(case["weight_VH"], mesh, [Shard(0)]).requires_grad_(not frozen)
        place, bias_V = {}, None
    else:
        weight_VH = case["weight_VH"][first:last].clone().requires_grad_(not frozen)
        bias_V = None if bias_V is None else bias_V[first:last].clone().requires_grad_(not frozen)
        place = {"vocab_start": first}
    stats = linear_logprob_entropy(
        hidden_TH, weight_VH, case["target_T"], bias_V=bias_V, group=dist.group.WORLD, **place, **case["options"]
    )
    upstream = case["upstream"]
    (upstream * torch.stack([stats.logprob_T, stats.entropy_T, stats.lse_T])).sum().backward()
    grads = {"hidden": hidden_TH.grad}
    if not frozen:
        gradient: Any = weight_VH.grad
        grads["weight"] = gradient.to_local() if case["dtensor"] else gradient
        if bias_V is not None:
            grads["bias"] = bias_V.grad
    return {"stats": {name: field.detach() for name, field in stats.as_dict().items()}, "grads": grads}


def main(rank: int, world: int, folder: Path) -> None:
    """Meet the other ranks and run every case."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder / 'meet'}", rank=rank, world_size=world)
    results = [run(case, rank) for case in torch.load(folder / "cases.pt")]
    torch.save(results, folder / f"rank{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
