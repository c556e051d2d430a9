"""One rank of two, under torchrun: first a model sharded over both is exported; then an engine of its own, weights of
its own, rollouts of its own prompts.

python -m torch.distributed.run --nproc-per-node 2 ranks.py FOLDER
"""

import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from vllm_kit import PROMPTS, learn, make_engine, make_policy

from entrocraft.train.config import ModelConfig
from entrocraft.train.config_parallel import ParallelConfig
from entrocraft.train.loading import load
from entrocraft.train.parallel import Ranks
from entrocraft.train.policy import Policy

torch.set_num_threads(1)
dist.init_process_group("gloo")
rank = dist.get_rank()
folder = Path(sys.argv[1])
if rank == 0:
    make_policy(tied=False, seed=2).save(folder / "begun")
dist.barrier()
ranks = Ranks(rank, 2, dist.group.WORLD)
model, tokenizer = load(
    ModelConfig(path=str(folder / "begun")), ParallelConfig(), device=torch.device("cpu"), size=2, seed=3
)
with torch.no_grad():
    for parameter in model.parameters():  # it has learnt something
        parameter.mul_(1.1).add_(0.01)
Policy(model, tokenizer, temperature=1.0, device=torch.device("cpu"), ranks=ranks).save(folder / "exported")
policy = make_policy(tied=rank == 1)  # unlike each other: whatever they shared would show
engine = make_engine(policy)
differences = []
for version in range(3):
    engine.publish(version)
    rollouts = engine.sample(PROMPTS[2 * rank : 2 * rank + 2], 4, stream=(0, version, rank))
    differences.append(float((policy.score(rollouts, 4096).logprob_T - rollouts.sampler_logprob_T).abs().max()))
    learn(policy, rollouts)
told = torch.tensor([float(rank)])
dist.all_reduce(told)  # the trainer's own group is still whole
engine.close()
answer = {
    "differences": differences,
    "version": rollouts.weight_version,
    "prompts": rollouts.prompts,
    "sum": told.item(),
    "local_rank": os.environ["LOCAL_RANK"],
}
(folder / f"{rank}.json").write_text(json.dumps(answer))
dist.barrier()
dist.destroy_process_group()
