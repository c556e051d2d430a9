"""A thousand random configurations of the head against its fp64 reference: every field, every gradient.

    python bench/stress_head.py [--count 1000] [--seed 0] [--only K]

A failure prints what was asked for and the command that asks for it again. Under TRITON_INTERPRET=1 the Triton kernels
answer; on a machine with a GPU they do anyway. Exit status 1 when any configuration failed.
"""

from __future__ import annotations

import argparse
import random
import sys
from typing import Any

import torch
from torch import Tensor

from entrocraft.kernels import linear_logprob_entropy, linear_logprob_entropy_reference
from entrocraft.kernels.head_passes import INTERPRETED

DIFFERENTIABLE = ("logprob_T", "entropy_T", "lse_T")
# Relative to the largest element: what rounding the gradient of the logits to a dtype once, and the result once, may
# cost. Stored exponentials are bf16 for every 16-bit operand.
GRADIENT_ERROR = {torch.float64: 1e-10, torch.float32: 4e-5, torch.float16: 3e-2, torch.bfloat16: 3e-2}


def configuration(seed: int) -> dict[str, Any]:
    """Sizes, dtype, arguments; the same for the same seed."""
    draw = random.Random(seed)
    dtypes = [torch.float32, torch.float16] + ([] if INTERPRETED else [torch.bfloat16, torch.float64])
    mode = draw.choice(["auto", "recompute", "cache", "frozen"])
    config: dict[str, Any] = {
        "T": draw.choice([0, 1, 2, 17, 64, 65, draw.randint(1, 300)]),
        "V": draw.choice([1, 2, 127, 128, 129, 257, draw.randint(1, 1500)]),
        "H": draw.choice([1, 3, 8, 32, 64, 65, draw.randint(1, 200)]),
        "dtype": draw.choice(dtypes),
        "spread": draw.choice([0.3, 2.0, 5.0]),
        "bias": draw.random() < 0.4,
        "row_temperature": draw.random() < 0.4,
        "ignored": draw.choice([0.0, 0.0, 0.3, 1.0]),
        "zero_gradient": draw.choice([0.0, 0.0, 0.5, 0.9]),
        "wanted": draw.sample(DIFFERENTIABLE, draw.randint(1, 3)),
        "frozen": mode == "frozen",
        "options": {
            "mode": mode,
            "collision": draw.random() < 0.5,
            "varentropy": draw.random() < 0.3,
            "argmax": draw.random() < 0.3,
            "batch_invariant": draw.random() < 0.2,
            "softcap": draw.choice([None, None, 5.0, 30.0]),
        },
    }
    logits_bytes = 4 * config["T"] * config["V"]
    config["options"]["cache_bytes"] = draw.choice([0, logits_bytes // 9, logits_bytes // 3, 1 << 24])
    config["options"]["buffer_bytes"] = max(1, logits_bytes // draw.choice([1, 5, 40]))  # so many tiles, about
    config["vocab_size"] = draw.choice([None, None, draw.randint(1, config["V"])])
    return config


def operands(config: dict[str, Any], seed: int) -> dict[str, Any]:
    """Tensors of a configuration, on the GPU if there is one."""
    torch.manual_seed(seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    T, V, H, dtype = config["T"], config["V"], config["H"], config["dtype"]
    target_T = torch.randint(0, config["vocab_size"] or V, (T,))
    target_T[torch.rand(T) < config["ignored"]] = -100
    upstream = torch.randn(3, T) * (torch.rand(T) >= config["zero_gradient"])
    made = {
        "hidden": torch.randn(T, H) * config["spread"],
        "weight": torch.randn(V, H) / H**0.5,
        "bias": torch.randn(V) if config["bias"] else None,
    }
    made = {name: None if value is None else value.to(device, dtype) for name, value in made.items()}
    temperature = (torch.rand(T) + 0.5).to(device) if config["row_temperature"] else 0.8
    return made | {"target": target_T.to(device), "upstream": upstream.to(device), "temperature": temperature}


def run(config: dict[str, Any], made: dict[str, Any], *, exact: bool) -> dict[str, Tensor]:
    """Fields and gradients, of the op or of its reference in fp64."""
    leaves = {name: made[name] for name in ("hidden", "weight", "bias") if made[name] is not None}
    leaves = {name: (leaf.double() if exact else leaf).detach().clone() for name, leaf in leaves.items()}
    needed = [leaf.requires_grad_() for name, leaf in leaves.items() if name == "hidden" or not config["frozen"]]
    options, size = dict(config["options"]), config["vocab_size"]
    if exact:
        for name in ("mode", "cache_bytes", "buffer_bytes", "batch_invariant"):
            del options[name]
        bias_V = leaves["bias"][:size] if "bias" in leaves else None
        arguments = (leaves["hidden"], leaves["weight"][:size], made["target"])
        stats = linear_logprob_entropy_reference(*arguments, bias_V=bias_V, temperature=made["temperature"], **options)
    else:
        arguments = (leaves["hidden"], leaves["weight"], made["target"])
        more = {"bias_V": leaves.get("bias"), "temperature": made["temperature"], "vocab_size": size}
        stats = linear_logprob_entropy(*arguments, **more, **options)
    total = sum((made["upstream"][i] * getattr(stats, name)).sum() for i, name in enumerate(config["wanted"]))
    assert isinstance(total, Tensor)
    names = [name for name in leaves if name == "hidden" or not config["frozen"]]
    gradients = dict(zip(names, torch.autograd.grad(total, needed), strict=True))
    return stats.detach().as_dict() | {f"gradient of {name}": gradient for name, gradient in gradients.items()}


def failures(config: dict[str, Any], seed: int) -> list[str]:
    """What differs from the reference by more than it may."""
    made = operands(config, seed)
    actual, exact = run(config, made, exact=False), run(config, made, exact=True)
    found = [f"fields {sorted(actual)} instead of {sorted(exact)}"] if set(actual) != set(exact) else []
    logits = float((made["hidden"].double() @ made["weight"].double().T).abs().max()) if config["T"] else 0.0
    for name, wanted in exact.items():
        got = actual[name]
        if not wanted.numel() or wanted.dtype == torch.bool:
            continue
        if wanted.dtype == torch.int64:  # ties within rounding may fall either way
            wrong = float((got != wanted).double().mean())
            if wrong > 0.1 and config["T"] > 10:
                found.append(f"{name}: {wrong:.0%} differ")
            continue
        error = float((got.double() - wanted).abs().max())
        if name.startswith("gradient"):
            most = GRADIENT_ERROR[config["dtype"]] * max(float(wanted.abs().max()), 1e-3) * max(1.0, logits / 20)
        else:
            unit = 1e-12 if config["dtype"] == torch.float64 else 4e-6
            most = unit * max(1.0, logits) * (20.0 if name == "varentropy_T" else 1.0)
        if not error <= most:
            found.append(f"{name}: error {error:.3g}, allowed {most:.3g}")
    return found


def main(arguments: list[str] | None = None) -> int:
    """Run them, and say which failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0, help="the first configuration's; the others count from it")
    parser.add_argument("--only", type=int, help="run the configuration of this seed alone")
    given = parser.parse_args(arguments)
    seeds = [given.only] if given.only is not None else list(range(given.seed, given.seed + given.count))
    failed = 0
    for done, seed in enumerate(seeds, 1):
        config = configuration(seed)
        found = failures(config, seed)
        if found:
            failed += 1
            print(f"FAILED {config}\n  " + "\n  ".join(found))
            print(f"  again: python bench/stress_head.py --only {seed}")
        if done % 100 == 0:
            print(f"{done} of {len(seeds)} configurations, {failed} failed", file=sys.stderr, flush=True)
    print(f"{len(seeds)} configurations, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
