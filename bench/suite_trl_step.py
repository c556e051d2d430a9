"""A whole GRPO update, TRL's GRPOTrainer beside this project's step: time, peak memory, the largest batch that fits.

    python bench/suite_trl_step.py                                             # tiny, on a CPU
    python bench/suite_trl_step.py --head qwen3_4b --layers 4 --prompt 128 --response 512 --largest   # a GPU

Same architecture (a Qwen3 with random weights, the head's H and V, tied), same rollouts, both in bf16 on a GPU and fp32
on a CPU, AdamW of torch, no reference model, PPO-clip, mean over tokens, temperature 1. TRL at its best settings: its
chunked head, and on a GPU with Liger installed `use_liger_kernel` besides, as a contender of its own; its trainer pads.
Ours: packed micro-batches and the fused head. Both also with gradient checkpointing, and at the fastest of the
micro-batches that `--microbatch` names. Each contender runs in a process of its own, so that the memory of one is not
the other's; loss and gradient norm of the first update must agree, or the exit status is 1. `--largest` doubles the
rollouts of one micro-batch until memory gives out (on a CPU, or with `--limit-gb`, until that much is taken),
then halves the gap.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rivals import load
from suite_cases import HEADS
from suite_choice import positive
from suite_machine import machine
from suite_step_search import GROUP, Size, disagreements, limit_memory, search, sweep
from suite_watch import Stopwatch
from torch import Tensor

Update = Callable[[], tuple[float, float]]  # loss and norm of the gradient
CONTENDERS = (
    "entrocraft", "entrocraft_checkpointed", "trl", "trl_checkpointed", "trl_liger", "trl_liger_checkpointed",
)  # fmt: skip


def make_model(size: Size, device: str) -> Any:
    """The same weights in every process."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    H, V = HEADS[size.head]
    heads = max(2, H // 128)
    config = Qwen3Config(
        vocab_size=V, hidden_size=H, num_hidden_layers=size.layers, num_attention_heads=heads,
        num_key_value_heads=heads // 2, head_dim=H // heads, intermediate_size=3 * H, tie_word_embeddings=True,
        max_position_embeddings=size.prompt + size.response, initializer_range=1.0 / math.sqrt(H),
        pad_token_id=0, eos_token_id=1,
    )  # fmt: skip
    torch.manual_seed(0)
    model: Any = Qwen3ForCausalLM(config)
    return model.to(device, torch.bfloat16 if device == "cuda" else torch.float32)


def make_rollouts(size: Size) -> tuple[Any, Tensor]:
    """Responses of every length up to `response`, and advantages."""
    from entrocraft import Rollouts

    V, R = HEADS[size.head][1], size.rollouts
    generator = torch.Generator().manual_seed(1)
    length_R = torch.randint(max(1, size.response // 4), size.response + 1, (R,), generator=generator)
    length_R[0] = size.response
    T = int(length_R.sum())
    prompts = torch.randint(2, V, (math.ceil(R / GROUP), size.prompt), generator=generator)
    rollouts = Rollouts(
        token_T=torch.randint(2, V, (T,), generator=generator),
        rollout_T=torch.arange(R).repeat_interleave(length_R),
        mask_T=torch.ones(T, dtype=torch.bool),
        group_R=torch.arange(R) // GROUP,
        sample_R=torch.arange(R) % GROUP,
        prompts=tuple(tuple(row) for row in prompts.tolist()),
        truncated_R=length_R == size.response,
        weight_version=0,
    )
    return rollouts, torch.randn(R, generator=generator)


def our_update(size: Size, device: str, *, checkpointing: bool = False) -> tuple[Update, Any]:
    """One optimizer update of this project's step, on policy; returns the call and the model."""
    from entrocraft import PolicyObjective
    from entrocraft.losses import PPOClip
    from entrocraft.train.policy import Policy
    from entrocraft.train.step import Share, accumulate
    from entrocraft.train.tiny_model import ByT5Tokenizer

    model = make_model(size, device)
    if checkpointing:
        model.gradient_checkpointing_enable()
    rollouts, advantage_R = make_rollouts(size)
    policy = Policy(model, ByT5Tokenizer(extra_ids=0), temperature=1.0, device=torch.device(device))
    budget = size.microbatch * (size.prompt + size.response)
    old_logprob_T = policy.score(rollouts, budget).logprob_T
    T = len(rollouts.token_T)
    objective = PolicyObjective(
        loss_fn=PPOClip(dual_clip=None), old_logprob_T=old_logprob_T, weight_T=torch.full((T,), 1.0 / T),
        advantage_T=advantage_R[rollouts.rollout_T], lengths_R=rollouts.length_R.tolist(),
    )  # fmt: skip
    share = Share(rollouts=rollouts, objective=objective)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, weight_decay=0.0)

    def update() -> tuple[float, float]:
        model.train()
        optimizer.zero_grad(set_to_none=True)
        loss = accumulate(policy, share, budget)["loss"]
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return loss, float(norm)

    return update, model


def trl_update(size: Size, device: str, *, liger: bool, checkpointing: bool = False) -> tuple[Update, Any]:
    """The same update through GRPOTrainer's own compute_loss, micro-batch by micro-batch, as its loop does it."""
    from datasets import Dataset
    from torch.nn.utils.rnn import pad_sequence

    from entrocraft.train.tiny_model import ByT5Tokenizer

    settings: Any = load("trl:GRPOConfig")
    trainer_class: Any = load("trl:GRPOTrainer")
    model = make_model(size, device)
    rollouts, advantage_R = make_rollouts(size)
    steps = math.ceil(size.rollouts / size.microbatch)
    config = settings(
        output_dir=tempfile.mkdtemp(), use_cpu=device == "cpu", bf16=device == "cuda", report_to="none", beta=0.0,
        per_device_train_batch_size=size.microbatch, gradient_accumulation_steps=steps, num_generations=2,
        max_completion_length=size.response, loss_type="dapo",
        use_liger_kernel=liger, gradient_checkpointing=checkpointing, temperature=1.0,
    )  # fmt: skip
    trainer = trainer_class(
        model=model, processing_class=ByT5Tokenizer(extra_ids=0), args=config, reward_funcs=lambda **_: [0.0],
        train_dataset=Dataset.from_dict({"prompt": ["a"] * size.rollouts}),
    )  # fmt: skip
    if checkpointing:  # as its loop does before the first step
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=config.gradient_checkpointing_kwargs)
    trainer.current_gradient_accumulation_steps = steps
    tokens = rollouts.token_T.split(rollouts.length_R.tolist())
    items = torch.tensor(len(rollouts.token_T), device=device)
    batches = []
    for first in range(0, size.rollouts, size.microbatch):
        some = range(first, min(first + size.microbatch, size.rollouts))
        prompts = torch.tensor([rollouts.prompts[int(rollouts.group_R[i])] for i in some])
        batch = {
            "prompt_ids": prompts,
            "prompt_mask": torch.ones_like(prompts),
            "completion_ids": pad_sequence([tokens[i] for i in some], batch_first=True),
            "completion_mask": pad_sequence([torch.ones_like(tokens[i]) for i in some], batch_first=True),
            "advantages": advantage_R[list(some)],
        }
        batches.append({name: value.to(device) for name, value in batch.items()} | {"num_items_in_batch": items})
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, weight_decay=0.0)

    def update() -> tuple[float, float]:
        model.train()
        optimizer.zero_grad(set_to_none=True)
        total = 0.0
        for number, batch in enumerate(batches, start=1):
            trainer.accelerator.gradient_state._set_sync_gradients(number == len(batches))
            loss = trainer.compute_loss(trainer.model, batch)
            loss.backward()
            total += float(loss.detach())
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return total, float(norm)

    return update, model


def build(name: str, size: Size, device: str) -> tuple[Update, Any]:
    """The update of a contender, and its model."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        checkpointing = name.endswith("_checkpointed")
        if name.startswith("entrocraft"):
            return our_update(size, device, checkpointing=checkpointing)
        return trl_update(size, device, liger="liger" in name, checkpointing=checkpointing)


def measure(name: str, size: Size, device: str, rounds: int) -> dict[str, Any]:
    """Loss and gradient norm of the first update, median seconds, peak bytes beyond weights and optimizer."""
    update, model = build(name, size, device)
    loss, norm = update()
    watch = Stopwatch(device)
    weights = sum(value.nbytes for value in model.parameters())
    seconds = [watch.seconds(update) for _ in range(rounds)]
    found = {
        "loss": loss,
        "grad_norm": norm,
        "seconds": statistics.median(seconds),
        "rounds": rounds,
        "weight_bytes": weights,
    }
    # The gradients of the last update stand there already, and are made anew.
    return found | {"peak_bytes": watch.peak_bytes(update)}


def limited(given: argparse.Namespace, size: Size) -> dict[str, Any]:
    """What a process of its own does: measure, or only see whether two updates fit, within a limit."""
    if not given.fits:
        return measure(given.only, size, given.device, given.rounds)
    # A first update, however small, allocates what is needed once: threads, libraries, their pools.
    build(given.only, size._replace(rollouts=GROUP, microbatch=GROUP), given.device)[0]()
    update, _ = build(given.only, size, given.device)
    if given.limit_gb is not None:
        limit_memory(given.device, given.limit_gb)
    for _ in range(2):
        update()
    return {"fits": True}


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--head", choices=list(HEADS), default="tiny")
    for field, value in (("layers", 2), ("rollouts", 8), ("prompt", 16), ("response", 32)):
        parser.add_argument(f"--{field}", type=positive, default=value)
    parser.add_argument("--microbatch", type=positive, nargs="+", default=[4], help="several: the fastest of each")
    parser.add_argument("--rounds", type=positive, default=3)
    parser.add_argument("--processes", type=positive, default=1, help="of each: the median, and their range")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--only", choices=CONTENDERS, help="measure one, in this process, and print JSON")
    parser.add_argument("--fits", action="store_true", help="with --only: two updates, and nothing measured")
    parser.add_argument("--largest", action="store_true", help="also search for the largest batch")
    parser.add_argument(
        "--limit-gb",
        type=float,
        help="memory in that search, 10^9 bytes: on a CPU beyond libraries, the model and a small update",
    )
    parser.add_argument("--most", type=positive, default=4096, help="rollouts at which the search ends")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args(arguments)
    if given.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no GPU here; leave it out, or use --device cpu")
    if given.limit_gb is not None and not given.limit_gb > 0:
        parser.error(f"--limit-gb {given.limit_gb:g}: expected more than 0, such as 4")
    if given.largest and given.device == "cpu" and given.limit_gb is None:
        parser.error("--largest on a CPU needs a limit, such as --limit-gb 1: swap and other processes blur its own")
    return given


def main(arguments: list[str] | None = None) -> int:
    """Measure every contender that can run, print a table, write JSON; 1 if ours did not run or somebody disagrees."""
    given = _options(arguments)
    size = Size(given.head, given.layers, given.rollouts, given.prompt, given.response, given.microbatch[0])
    if given.only:
        print(json.dumps(limited(given, size)))
        return 0
    several = len(given.microbatch) > 1
    shown = {field: value for field, value in size._asdict().items() if field != "microbatch" or not several}
    results: dict[str, dict[str, Any]] = {}
    report: dict[str, Any] = {"machine": machine(given.device), "size": shown, "results": results}
    field = [name for name in CONTENDERS if "liger" not in name or given.device == "cuda"]
    results |= {name: {"reason": "Liger's kernels want a GPU"} for name in CONTENDERS if name not in field}
    for name, found in sweep(field, size, given.device, given.rounds, given.microbatch, given.processes):
        results[name] = found
        print(f"{name:24}", found.get("reason") or json.dumps(found), flush=True)
        _write(report, given.out)
    for name in results if given.largest else ():  # afterwards, so that times are taken close to one another
        if "reason" not in results[name]:
            results[name] |= search(name, size, given.device, given.most, given.limit_gb)
            print(f"{name:24} largest batch {results[name].get('largest_batch')}", flush=True)
            _write(report, given.out)
    wrong = disagreements(results, given.device)
    for line in wrong:
        print(f"error: first updates disagree: {line}", file=sys.stderr)
    return int(bool(wrong) or "reason" in results["entrocraft"])


def _write(report: dict[str, Any], out: Path | None) -> None:
    if out:
        out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
