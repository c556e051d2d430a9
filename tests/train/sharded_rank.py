"""The ranks of `test_sharding.py`: train every case on their shards and save what came of it.

`layout_rank.py` runs a world of one rank, then of two, then of four, whose processes are forked so that libraries are
imported once. The folder holds models and `batch.pt`. `results` is also what the test calls on a whole model, for
comparison.
"""

import multiprocessing
import os
import socket
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn import functional

from entrocraft import Decision, Rollouts
from entrocraft.train.checkpoint import CheckpointFolder
from entrocraft.train.config import BatchConfig, Config, LossConfig, ModelConfig, OptimizerConfig, SamplingConfig
from entrocraft.train.config_lora import LoraConfig
from entrocraft.train.config_parallel import ParallelConfig
from entrocraft.train.config_reference import ReferenceConfig
from entrocraft.train.control import build_method
from entrocraft.train.loading import load
from entrocraft.train.parallel import Ranks
from entrocraft.train.policy import Policy
from entrocraft.train.reference import Reference
from entrocraft.train.self_check import differences, some_rows
from entrocraft.train.sharding import full_tensor
from entrocraft.train.step import Learning, accumulate, make_share, update

CPU = torch.device("cpu")
# The loss where a case names no other, and what its methods have come to: the bonus, and EntroPIC's weight.
BONUS = {"method": "entropy_bonus", "method_options": {"coefficient": 0.01}}
STATE = {"coefficient": 0.01, "alpha": 0.4}
# What each case changes: the model, how it is sharded, the loss, tokens a micro-batch (a different number of passes on
# each rank) and the worlds it is worth running in.
CASES: dict[str, dict[str, Any]] = {
    "tied": {"model": "tied", "budget": 14},
    "untied": {"model": "untied", "budget": 40},
    "vocabulary": {"model": "untied", "parallel": {"vocab_parallel_head": True}, "budget": 40},
    "copies": {"model": "tied", "parallel": {"shard_ranks": 2}, "budget": 14, "worlds": (4,)},
    "copies_only": {"model": "untied", "parallel": {"shard_ranks": 1}, "budget": 512, "worlds": (2,)},
    "offload": {
        "model": "untied",
        "parallel": {"cpu_offload": True},
        "checkpointing": True,
        "budget": 40,
        "worlds": (1, 2),
    },
    "kept_gathered": {"model": "tied", "parallel": {"reshard_after_forward": False}, "budget": 512, "worlds": (2,)},
    "reference": {
        "model": "untied",
        "reference": {"kl_coefficient": 0.5, "path": "tied", "offload": True},
        "budget": 40,
        "worlds": (2,),
    },
    "reference_held": {
        "model": "untied",
        "reference": {"kl_coefficient": 0.5, "path": "tied"},
        "budget": 40,
        "worlds": (2,),
    },
    "compiled": {"model": "untied", "parallel": {"compile": "eager"}, "budget": 40, "worlds": (2,)},
    "adapters": {
        "model": "tied",
        "lora": {"rank": 4, "targets": ["q_proj", "down_proj"]},
        "reference": {"kl_coefficient": 0.5, "kl": "k3", "kl_on": "kept"},
        "budget": 40,
        "worlds": (2,),
    },
    # The denominators: kept rollouts of each prompt, and likely tokens (next to uniform, 1 / 259 is the middle).
    "eq5_entropic": {
        "model": "tied",
        "loss": {"aggregation": "eq5", "method": "entropic", "method_options": {"target": 5.0, "threshold": 0.0039}},
        "budget": 14,
        "worlds": (2, 4),
    },
    "gspo": {
        "model": "tied",
        "loss": {
            "aggregation": "seq_mean_token_mean",
            "policy": "gspo",
            "policy_options": {"clip_low": 0.05, "clip_high": 0.05},
        },
        "budget": 40,
        "worlds": (2, 4),
    },
    "bfloat16": {"model": "untied", "parallel": {"param_dtype": "bfloat16"}, "budget": 512, "worlds": (1, 2)},
    "vocabulary_bfloat16": {
        "model": "untied",
        "parallel": {"vocab_parallel_head": True, "param_dtype": "bfloat16"},
        "budget": 40,
        "worlds": (2,),
    },
}


EXPORTED = ("untied", "vocabulary", "adapters")
CHECKPOINTED = ("tied", "vocabulary", "adapters")


def cases(world: int) -> list[str]:
    """Names of the cases for so many ranks; 1 needs a group where nothing but mixed precision or offloading does."""
    default = (1, 2, 4)
    chosen = [name for name, case in CASES.items() if world in case.get("worlds", default)]
    return [name for name in chosen if world > 1 or name in ("bfloat16", "offload")]


def config(folder: Path, name: str, budget: int, *, whole: bool = False) -> Config:
    """Clipping of ratios and of the gradient both bind; two updates a step, twice. `whole`: without any sharding."""
    case = CASES[name]
    reference = dict(case.get("reference", {}))
    if "path" in reference:
        reference["path"] = str(folder / reference["path"])
    return Config(
        model=ModelConfig(path=str(folder / case["model"]), gradient_checkpointing=case.get("checkpointing", False)),
        parallel=ParallelConfig(**({} if whole else case.get("parallel", {}))),
        lora=LoraConfig(**case.get("lora", {})),
        reference=ReferenceConfig(**reference),
        batch=BatchConfig(prompts_per_step=4, samples_per_prompt=3, updates_per_step=2, tokens_per_microbatch=budget),
        sampling=SamplingConfig(max_response_tokens=9, temperature=0.9),
        loss=LossConfig(passes=2, **case.get("loss", BONUS)),
        optimizer=OptimizerConfig(lr=0.1, grad_clip=0.5),
    )


def load_policy(setting: Config, ranks: Ranks) -> Policy:
    """The case's policy, sharded as the setting says."""
    made, tokenizer = load(setting.model, setting.parallel, setting.lora, device=CPU, size=ranks.size, seed=3)
    return Policy(made, tokenizer, temperature=0.9, device=CPU, ranks=ranks)


def whole_tensors(model: nn.Module, *, grad: bool = False) -> dict[str, torch.Tensor]:
    """Parameters, or their gradients, gathered."""
    found = ((name, p.grad if grad else p.detach()) for name, p in model.named_parameters())
    return {name: full_tensor(tensor).clone() for name, tensor in found if tensor is not None}


def results(setting: Config, ranks: Ranks, batch: dict[str, Any], policy: Policy | None = None) -> dict[str, Any]:
    """Scores, one share's loss and gradient, and the weights after four SGD updates with clipped gradients."""
    policy = policy or load_policy(setting, ranks)
    rollouts, decision = Rollouts(**batch["rollouts"]), Decision(**batch["decision"])
    budget = setting.batch.tokens_per_microbatch
    aggregation = setting.loss.aggregation or "token_mean"
    learning = Learning(method=build_method(setting), state=STATE, aggregation=aggregation, config=setting, step=1)
    policy.check(rollouts.prompts[0])
    stats = policy.score(rollouts, budget)
    made: dict[str, Any] = {"scores": stats.as_dict(), "ends": policy.eos_ids}
    rows = some_rows(rollouts, ranks.rank, 8)
    made["self_check"] = differences(*policy.stats_and_reference(rows, rollouts.token_T))
    reference = Reference.load(setting, policy, ranks, CPU)
    if reference is not None:
        learning = replace(learning, penalty=reference.penalty(rollouts, stats, decision, budget))
    chosen_R = torch.ones(rollouts.R, dtype=torch.bool)
    shifted = batch["shift_T"] + stats.logprob_T  # ratios leave 1, and some are clipped
    share = make_share(learning, rollouts, type(stats)(**{**stats.as_dict(), "logprob_T": shifted}), decision, chosen_R)
    policy.model.train()
    made["sums"] = accumulate(policy, share, budget)
    made["gradients"] = whole_tensors(policy.model, grad=True)
    policy.model.zero_grad()
    trained = [parameter for parameter in policy.model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.1)
    made["metrics"] = update(policy, optimizer, rollouts, stats, decision, learning)
    made["weights"] = whole_tensors(policy.model)
    return made


def mixed_tensors_are_refused(policy: Policy) -> tuple[str, str]:
    """What happens to the head's sharded weight outside its registered method: in torch, and in the op."""
    hidden_TH = torch.zeros(2, policy.model.config.hidden_size)
    weight_VH = policy.model.get_output_embeddings().weight
    assert isinstance(weight_VH, DTensor)
    told = []
    for use in (
        lambda: functional.linear(hidden_TH, weight_VH),
        lambda: policy.head.stats(hidden_TH, torch.zeros(2, dtype=torch.int64)),
    ):
        try:
            use()
        except (RuntimeError, ValueError) as error:
            told.append(str(error))
    return told[0], told[1]


def generated(policy: Policy, folder: Path) -> dict[str, torch.Tensor]:
    """Logits of whole weights, which need no other rank."""
    ids = torch.arange(3, 12)[None]
    with policy.whole_weights(), torch.no_grad():
        logits = [policy.model(input_ids=ids, use_cache=False).logits for _ in range(policy.ranks.rank + 1)]
    policy.save(folder)
    return {"logits": logits[0]}


def adam(policy: Policy) -> torch.optim.Optimizer:
    """Whose state a checkpoint must bring back."""
    return torch.optim.AdamW([p for p in policy.model.parameters() if p.requires_grad], lr=0.01)


def saved_state(policy: Policy, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """Weights and second moments, gathered."""
    moments = {
        f"{name}.moment": full_tensor(optimizer.state[p]["exp_avg_sq"]).clone()
        for name, p in policy.model.named_parameters()
        if p.requires_grad
    }
    return whole_tensors(policy.model) | moments


def learn(policy: Policy, setting: Config, optimizer: torch.optim.Optimizer, batch: dict[str, Any]) -> dict[str, float]:
    """One step of updates; its metrics."""
    rollouts = Rollouts(**batch["rollouts"])
    learning = Learning(method=build_method(setting), state={}, aggregation="token_mean", config=setting, step=1)
    return update(policy, optimizer, rollouts, policy.score(rollouts, 40), Decision(**batch["decision"]), learning)


def resumed(setting: Config, ranks: Ranks, run: Path) -> dict[str, torch.Tensor]:
    """What the newest checkpoint in `run` brings back, at this number of ranks."""
    policy = load_policy(setting, ranks)
    optimizer = adam(policy)
    state = CheckpointFolder(run, keep=1, ranks=ranks).load_newest(policy.model, optimizer)
    assert state is not None
    assert state["step"] == 1
    return saved_state(policy, optimizer)


def refused(folder: Path, ranks: Ranks) -> list[str]:
    """What is said of ways to shard that cannot be."""
    told = []
    ways: list[tuple[str, dict[str, Any]]] = [
        ("tied", {"vocab_parallel_head": True}),
        ("untied", {"vocab_parallel_head": True, "shard_ranks": 1}),
        ("untied", {"shard_ranks": 3}),
    ]
    for model, parallel in ways:
        place = ModelConfig(path=str(folder / model))
        try:
            load(place, ParallelConfig(**parallel), device=CPU, size=ranks.size, seed=0)
        except ValueError as error:
            told.append(str(error))
    return told


def disagreement(ranks: Ranks) -> str:
    """What a rank is told when rank 1 has another number; equal ones are no trouble."""
    ranks.agree("a test", (torch.arange(3), "same", 0.5))
    try:
        ranks.agree("a test", (torch.arange(3), float(ranks.rank == 1)))
    except RuntimeError as error:
        return str(error)
    return ""


def main(folder: Path) -> None:
    """Every case of this world, then checkpoints: what another world wrote, read; and one of its own, written."""
    torch.set_num_threads(1)
    made: dict[str, Any] = {}
    batch = torch.load(folder / "batch.pt", weights_only=True)
    with Ranks.joined(device=CPU, timeout_s=20.0, needed=True) as ranks:
        made["disagreement"] = disagreement(ranks)
        if ranks.size > 1:
            made["refused"] = refused(folder, ranks)
        for name in cases(ranks.size):
            setting = config(folder, name, CASES[name]["budget"])
            policy = load_policy(setting, ranks)
            made[name] = results(setting, ranks, batch, policy)
            if name == "untied":
                made["held"] = sum(p.to_local().numel() for p in policy.model.parameters() if isinstance(p, DTensor))
                made["mixed"] = mixed_tensors_are_refused(policy)
            if name in EXPORTED:
                made[name] |= generated(policy, folder / f"{name}_{ranks.size}")
        for name in CHECKPOINTED if ranks.size > 1 else ():
            run, setting = folder / f"run_{name}", config(folder, name, 40)
            if (run / "checkpoints").exists():
                made[f"resumed_{name}"] = resumed(setting, ranks, run)
                continue
            policy = load_policy(setting, ranks)
            optimizer = adam(policy)
            learn(policy, setting, optimizer, batch)
            made[f"saved_{name}"] = saved_state(policy, optimizer)
            checkpoints = CheckpointFolder(run, keep=1, ranks=ranks, asynchronous=True)
            checkpoints.save(1, policy.model, optimizer, {})
            learn(policy, setting, optimizer, batch)  # while threads write, all ranks go on and talk to each other
            checkpoints.wait()
            made[f"moved_{name}"] = saved_state(policy, optimizer)
        torch.save(made, folder / f"rank{ranks.rank}_of_{ranks.size}.pt")


def run_world(folder: Path, world: int, target: Callable[[Path], None]) -> None:
    """Forks ranks that call `target(folder)` and waits for them; ends this process when one fails."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    os.environ |= {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    context = multiprocessing.get_context("fork")
    ranks = []
    for rank in range(world):
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        ranks.append(context.Process(target=target, args=(folder,)))
        ranks[-1].start()
    for rank in ranks:
        rank.join()
    if any(rank.exitcode for rank in ranks):
        sys.exit(f"a world of {world} ended with {[rank.exitcode for rank in ranks]}")
