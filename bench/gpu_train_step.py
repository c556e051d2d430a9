"""A training step of Qwen3-4B's shape on one GPU: speed, arithmetic used, memory against the plan, what still fits.

    python bench/gpu_train_step.py --out results/                                  # on a GPU, ten minutes a part
    python bench/gpu_train_step.py --out /tmp/o --size tiny --parts whole rank_of_8  # on a CPU, seconds

A machine with torch and transformers that can fetch nothing is carried the rest: `pip install --target carried
"jsonargparse[signatures]" pebble math-verify matplotlib rich` here; there `ln -s "$PWD/entrocraft" carried/`, since the
root itself holds a folder `kernels` that hides Hugging Face's, and `PYTHONPATH=carried`.

Weights are random and sequences full: 4,096 tokens, a quarter of them prompt. Every part runs in a process of its own
and through the trainer's own code (`Policy.score`, FSDP2, the fused head, AdamW).

whole       One process holds everything. fp32 weights, gradients and Adam's moments of 4 B parameters take 64 GB.
rank_of_8   One of eight ranks: FSDP2 cuts and gathers as with eight, over a process group whose messages go nowhere.
            Sizes and lifetimes of all tensors are real; communication takes no time, and values mean nothing.
largest     The most tokens in a micro-batch that fit on such a rank into 80 and into 141 GB.
demo        The demo of the CPU, end to end, on this device.
demo_gpu    The same task with 50 M parameters and a vocabulary of 151,936: warm start, then `none`, `soft`, `budget`.
"""

import argparse
import json
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule

from entrocraft import Rollouts
from entrocraft.train.config import Config, ModelConfig
from entrocraft.train.config_reader import load_config
from entrocraft.train.demo import provenance
from entrocraft.train.model_shapes import SHAPES, meta_model, model_shape
from entrocraft.train.packing import pack
from entrocraft.train.parallel import Ranks
from entrocraft.train.plan import make_plan
from entrocraft.train.policy import Policy
from entrocraft.train.sharding import build_mesh, clip_gradients, shard_model
from entrocraft.train.throughput import ModelCost, Work, peak_flops, resident_bytes

ROOT = Path(__file__).resolve().parent.parent
QWEN3_4B = SHAPES["Qwen/Qwen3-4B-Base"]
TINY = QWEN3_4B | {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4, "head_dim": 16,
    "num_key_value_heads": 2, "vocab_size": 1000,
}  # fmt: skip
# (shape, tokens of a sequence, sequences in a micro-batch)
SIZES = {"qwen3_4b": (QWEN3_4B, 4096, 4), "tiny": (TINY, 64, 2)}
LIMITS_GB = (80, 141)
MOST_SEQUENCES = 256
"""How far `largest` searches."""
PARTS = ("whole", "rank_of_8", "largest", "demo", "demo_gpu")
PART_SECONDS = 580


def settings(size: str, sequences: int, device: str) -> Config:
    """The run that is measured, as the plan is asked about it."""
    _, length, _ = SIZES[size]
    return load_config(
        [
            *(f"--device={device}", "--parallel.param_dtype=bfloat16", "--model.gradient_checkpointing=true"),
            *(f"--data.max_prompt_tokens={length // 4}", f"--sampling.max_response_tokens={length - length // 4 + 1}"),
            f"--batch.tokens_per_microbatch={sequences * length}",
        ]
    )


def sequences_of(count: int, length: int, vocabulary: int) -> Rollouts:
    """`count` rollouts, each of `length` tokens that are fed."""
    prompt, response = length // 4, length - length // 4 + 1
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(vocabulary, (count * response,), generator=generator)
    prompts = torch.randint(vocabulary, (count, prompt), generator=generator).tolist()
    return Rollouts(
        token_T=tokens,
        rollout_T=torch.arange(count).repeat_interleave(response),
        mask_T=torch.ones_like(tokens, dtype=torch.bool),
        group_R=torch.arange(count),
        sample_R=torch.zeros(count, dtype=torch.int64),
        prompts=tuple(map(tuple, prompts)),
        truncated_R=torch.zeros(count, dtype=torch.bool),
        weight_version=0,
        sampler_logprob_T=None,
    )


class Step:
    """A policy on some ranks, of which this process is the first, and what is timed of it."""

    def __init__(self, size: str, device: torch.device, ranks: int) -> None:
        shape, self.length, self.sequences = SIZES[size]
        self.size, self.device, self.ranks = size, device, ranks
        torch.manual_seed(0)
        model = meta_model(model_shape(ModelConfig(), json.dumps(shape))[0])
        model.gradient_checkpointing_enable()
        config = settings(size, self.sequences, device.type)
        shard_model(model, config.parallel, build_mesh(device, ranks, None), torch.bfloat16)
        model.to_empty(device=device)
        model.tie_weights()
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter.to_local(), std=0.02)
        for module in model.modules():  # rotary frequencies are in no parameter
            if hasattr(module, "inv_freq"):
                module.inv_freq = 1.0 / 1e6 ** (
                    torch.arange(len(module.inv_freq), device=device) / len(module.inv_freq)
                )
        self.policy = Policy(model, None, temperature=1.0, device=device)
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, foreach=False)  # as the trainer's
        self.cost = ModelCost.of(model)

    def batch(self, sequences: int) -> Rollouts:
        """A micro-batch full of sequences."""
        return sequences_of(sequences, self.length, self.policy.vocab_size)

    def score(self, rollouts: Rollouts) -> None:
        """As at the start of a training step."""
        self.policy.score(rollouts, rollouts.R * self.length)

    def update(self, rollouts: Rollouts) -> None:
        """Two micro-batches, as the second finds gradients of the first, and a step of the optimizer."""
        self.policy.model.train()
        for _ in range(2):
            for batch in pack(rollouts, range(rollouts.R), rollouts.R * self.length):
                self.policy.token_stats(batch, rollouts.token_T).logprob_T.mean().backward()
        clip_gradients(self.policy.model, 1.0, self.policy.ranks)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def measured(self, name: str, rollouts: Rollouts, *, rounds: int) -> dict[str, Any]:
        """Seconds, tokens per second, MFU and peak of `score` or `update`, after one round to warm up."""
        run, forwards = (self.score, 1) if name == "score" else (self.update, 2 * 3)
        run(rollouts)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        taken = []
        for _ in range(rounds):
            begun = time.perf_counter()
            run(rollouts)
            if self.device.type == "cuda":
                torch.cuda.synchronize()
            taken.append(time.perf_counter() - begun)
        seconds = sorted(taken)[len(taken) // 2]
        work = Work.of(rollouts, range(rollouts.R))
        flops, peak = forwards * self.cost.forward(work), peak_flops(self.device)
        return {
            "seconds": seconds,
            "tokens_per_second": work.tokens * (1 if name == "score" else 2) / seconds,
            "tflops": flops / seconds / 1e12,
            "mfu": None if peak is None else flops / seconds / peak,
            "peak_gb": self._peak() / 1e9,
        }

    def _peak(self) -> int:
        return torch.cuda.max_memory_allocated() if self.device.type == "cuda" else resident_bytes()

    def predicted(self, sequences: int) -> dict[str, float]:
        """GB of the same phases by the plan."""
        config = settings(self.size, sequences, self.device.type)
        plan = make_plan(config, self.ranks, shape=json.dumps(SIZES[self.size][0]))
        return {phase.name: phase.peak / 1e9 for phase in plan.phases if phase.name in ("score", "update")}


@contextmanager
def joined(ranks: int, device: torch.device) -> Iterator[None]:
    """This process's group: real for one rank; for more, one that lets all messages fall."""
    if ranks == 1:
        with Ranks.joined(device=device, timeout_s=60, needed=True):
            yield
        return
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
    try:
        yield
    finally:
        dist.destroy_process_group()


def of_a_rank(size: str, device: torch.device, ranks: int, rounds: int) -> dict[str, Any]:
    """Both phases, measured and predicted."""
    with joined(ranks, device):
        step = Step(size, device, ranks)
        rollouts = step.batch(step.sequences)
        found: dict[str, Any] = {"ranks": ranks, "tokens": step.sequences * step.length}
        predicted = step.predicted(step.sequences)
        for name in ("update", "score"):  # Adam's moments are there from the first update on
            found[name] = step.measured(name, rollouts, rounds=rounds) | {"predicted_gb": predicted[name]}
            found[name]["predicted_over_measured"] = predicted[name] / found[name]["peak_gb"]
        return found


def largest(size: str, device: torch.device) -> dict[str, Any]:
    """The most sequences of one micro-batch that an update of one rank of eight fits into each limit with."""
    if device.type != "cuda":
        return {"skipped": "a CPU has no limit that torch would keep to"}
    if not hasattr(FSDPModule, "reset_iter_state"):
        return {"skipped": f"torch {torch.__version__}: FSDP2 does not recover from running out of memory; 2.13 does"}
    total = torch.cuda.get_device_properties(device).total_memory
    found: dict[str, Any] = {}
    with joined(8, device):
        step = Step(size, device, 8)
        step.update(step.batch(1))
        for limit in LIMITS_GB:
            if limit * 1e9 > total:
                found[f"{limit}_gb"] = f"skipped: this device has {total / 1e9:.0f} GB"
                continue
            torch.cuda.set_per_process_memory_fraction(limit * 1e9 / total)
            most = most_that_fit(lambda sequences: runs(step, sequences), MOST_SEQUENCES)
            predicted = step.predicted(max(most, 1))["update"]
            found[f"{limit}_gb"] = answer(most, step.length) | {"predicted_gb": predicted}
    return found


def most_that_fit(fits: Callable[[int], bool], limit: int) -> int:
    """The largest n up to `limit` with fits(n), in log2(limit) + 1 questions; 0 where not even 1 does. What fits n
    must fit fewer."""
    most, too_many = 0, limit + 1
    while too_many - most > 1:
        middle = (most + too_many) // 2
        most, too_many = (middle, too_many) if fits(middle) else (most, middle)
    return most


def answer(sequences: int, length: int) -> dict[str, Any]:
    """What `most_that_fit` found, in tokens, with a note where the search came to an end of its range."""
    found: dict[str, Any] = {"tokens_per_microbatch": sequences * length}
    if sequences == 0:
        found["note"] = f"not one sequence of {length} tokens fits; predicted_gb is that of one"
    elif sequences == MOST_SEQUENCES:
        found["note"] = f"at least: more than {MOST_SEQUENCES} sequences were not tried"
    return found


def runs(step: Step, sequences: int) -> bool:
    """Whether an update with so many sequences does not run out of memory."""
    try:
        step.update(step.batch(sequences))
    except torch.OutOfMemoryError:
        # FSDP2 would go on as in the middle of that backward, and never cut its weights up again.
        step.policy.model.reset_iter_state()
        return False
    finally:
        step.optimizer.zero_grad(set_to_none=True)
        torch.cuda.empty_cache()
    return True


def demo(out: Path, *extra: str) -> dict[str, Any]:
    """The demo in a process of its own; what it summed up, without its curves."""
    command = [sys.executable, str(ROOT / "train" / "demo.py"), "--out", str(out), *extra]
    # Sooner than this process itself is given up, or the demo would go on beside the next part.
    done = subprocess.run(command, capture_output=True, text=True, timeout=PART_SECONDS - 40)
    if done.returncode:
        raise RuntimeError(f"the demo ended with {done.returncode}: {(done.stdout + done.stderr)[-2000:]}")
    summary = json.loads((out / "summary.json").read_text())
    for arm in summary["arms"].values():
        arm |= {name: arm[name][:: max(1, len(arm[name]) // 50)] for name in ("entropy", "target")}
    return {"seconds": summary["seconds"], "arms": summary["arms"]}


def run_part(part: str, size: str, device: torch.device, out: Path, rounds: int) -> dict[str, Any]:
    """One part, in this process."""
    if part in ("whole", "rank_of_8"):
        return of_a_rank(size, device, 1 if part == "whole" else 8, rounds)
    if part == "largest":
        return largest(size, device)
    extra = [f"--recipe={ROOT / 'train' / 'configs' / 'demo_gpu.yaml'}"] if part == "demo_gpu" else []
    if size == "tiny":
        extra += ["--warm-start-steps=1", "--optimizer.steps=2", "--batch.prompts_per_step=2", "--evaluation.samples=2"]
        extra += ["--model.tiny.hidden_size=32", "--model.tiny.layers=1", "--model.tiny.vocabulary=600"]
        extra += ["--sampling.max_response_tokens=4", "--logging.report=false"]
    return demo(out / part, f"--device={device.type}", *extra)


def main(argv: list[str] | None = None) -> int:
    """Measures every part in a process of its own and writes `gpu_train_step.json`; 1 when one failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for gpu_train_step.json")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--size", choices=list(SIZES), help="default: qwen3_4b on a GPU, tiny on a CPU")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--rounds", type=int, default=3, help="timed rounds (default: %(default)s)")
    parser.add_argument("--here", choices=PARTS, help=argparse.SUPPRESS)
    given = parser.parse_args(argv)
    if given.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no GPU here; use --device cpu --size tiny")
    size = given.size or ("qwen3_4b" if given.device == "cuda" else "tiny")
    given.out.mkdir(parents=True, exist_ok=True)
    if given.here:
        device = torch.device("cuda", 0) if given.device == "cuda" else torch.device("cpu")
        found = run_part(given.here, size, device, given.out, given.rounds)
        (given.out / f"{given.here}.json").write_text(json.dumps(found) + "\n")
        return 0
    name = torch.cuda.get_device_name() if given.device == "cuda" else "cpu"
    report: dict[str, Any] = {**provenance(), "device": name, "size": size, "parts": {}}
    failed = 0
    for part in given.parts:
        same = ["--out", str(given.out), "--device", given.device, "--size", size, "--rounds", str(given.rounds)]
        print(f"{part} ...", file=sys.stderr, flush=True)
        try:
            command = [sys.executable, str(Path(__file__).resolve()), "--here", part, *same]
            done = subprocess.run(command, capture_output=True, text=True, timeout=PART_SECONDS)
            if done.returncode:
                raise RuntimeError(done.stderr[-3000:])
            file = given.out / f"{part}.json"
            report["parts"][part] = json.loads(file.read_text())
            file.unlink()
        except (RuntimeError, OSError, subprocess.TimeoutExpired) as error:  # one must not take the others with it
            traceback.print_exc()
            report["parts"][part] = {"error": str(error)[-3000:]}
            failed += 1
        (given.out / "gpu_train_step.json").write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report, indent=1))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
