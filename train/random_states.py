"""The random states of a process that anything may draw from without asking, as tensors that a checkpoint holds.

torch's of the CPU and of the accelerator (dropout), Python's `random` and numpy's (a reward of one's own, a library).
What the trainer itself draws comes from streams named by seed, purpose and step, and needs none of them.
"""

import random
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from entrocraft.train.parallel import Ranks

KINDS = ("torch", "python", "numpy", "cuda")


def seed_all(seed: int) -> None:
    """Seeds all of them, those of every accelerator included."""
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)


def name_of(kind: str, rank: int) -> str:
    """What a checkpoint calls one rank's state."""
    return f"{kind}_rng_{rank}"


def kinds(device: torch.device) -> list[str]:
    """The kinds of state of a process that computes on this device."""
    return [kind for kind in KINDS if kind != "cuda" or device.type == "cuda"]


def random_states(rank: int, device: torch.device) -> dict[str, Tensor]:
    """The present states by name, each of a size that depends on its kind alone."""
    version, words, gauss = random.getstate()
    legacy: Any = np.random.get_state()
    bits, key, position, has_gauss, cached = legacy
    assert bits == "MT19937", f"numpy's global generator is {bits}: nothing here sets another"
    # float64 holds the 32-bit words of a Mersenne twister as they are.
    python = torch.tensor([version, *words, gauss is not None, gauss or 0.0], dtype=torch.float64)
    numpy = torch.tensor([*key.tolist(), position, has_gauss, cached], dtype=torch.float64)
    states = {"torch": torch.get_rng_state(), "python": python, "numpy": numpy}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return {name_of(kind, rank): state for kind, state in states.items()}


def stored_states(folder: Path, state: Mapping[str, Any], ranks: Ranks, device: torch.device) -> dict[str, Tensor]:
    """Tensors to load this rank's states into, by name, of the kinds that the checkpoint holds; rank 0 says which it
    does not. `state` is what the checkpoint says of itself."""
    held = state.get("random_states", ["torch"])  # what those hold that do not say
    missing = [kind for kind in kinds(device) if kind not in held]
    if missing and ranks.main:
        print(
            f"warning: {folder} holds no random state of {' and '.join(missing)}: it was written by an older version, "
            f"or not on {device.type}. What is drawn from there (by dropout, by a reward of your own) goes on "
            "otherwise than in an uninterrupted run",
            file=sys.stderr,
        )
    if ranks.rank >= state["ranks"]:  # there were fewer
        return {}
    own = random_states(ranks.rank, device)
    return {name: own[name] for kind in held if (name := name_of(kind, ranks.rank)) in own}


def restore(tensors: Mapping[str, Any], rank: int, device: torch.device) -> None:
    """Makes the states among these tensors the present ones; a kind that is not there is left alone."""
    states = {kind: tensors[name_of(kind, rank)] for kind in KINDS if name_of(kind, rank) in tensors}
    if "torch" in states:
        torch.set_rng_state(states["torch"])
    if "python" in states:
        version, *words, has_gauss, gauss = states["python"].tolist()
        random.setstate((int(version), tuple(map(int, words)), gauss if has_gauss else None))
    if "numpy" in states:
        *key, position, has_gauss, cached = states["numpy"].tolist()
        np.random.set_state(("MT19937", np.array(key, dtype=np.uint32), int(position), int(has_gauss), cached))
    if "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"], device)
