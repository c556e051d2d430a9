"""Checkpoints that are whole or are not there, of one process or many.

A checkpoint is written into a folder beside its place, synced to disk, given a completion mark with the size of every
file, and renamed; a folder without a mark, or whose files do not match it, is ignored. Tensors are stored by
`torch.distributed.checkpoint`, whose index is a pickle: resume only runs whose folder you trust. Everything else that
decides the next step is JSON. Each rank writes its own shards; a run goes on at any number of ranks, since a tensor is
found again by its name and place. All ranks save and load together, in a folder that all of them see.
"""

import hashlib
import json
import os
import shutil
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from entrocraft.train.parallel import Ranks

_MARK = "COMPLETE.json"
STATE_FILE = "state.json"


def model_fingerprint(model: nn.Module) -> str:
    """A short digest of the names, shapes and types of all parameters: two models that differ in it cannot share
    weights."""
    described = [f"{name} {tuple(p.shape)} {p.dtype}" for name, p in sorted(model.named_parameters())]
    return hashlib.sha256("\n".join(described).encode()).hexdigest()[:16]


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write_json(path: Path, content: object) -> None:
    with path.open("w") as file:
        json.dump(content, file, indent=1)
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def one_process() -> Iterator[None]:
    """Hides the library's remark that there is no process group; one process is what is meant."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
        yield


def is_whole(folder: Path) -> bool:
    """Whether the completion mark is there and every file has the size it had when the mark was written."""
    try:
        sizes = json.loads((folder / _MARK).read_text())["bytes"]
        return all((folder / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


class CheckpointFolder:
    """The checkpoints of one run, in `run_dir/checkpoints/step_000123`."""

    def __init__(self, run_dir: Path, *, keep: int, ranks: Ranks | None = None) -> None:
        self.root = run_dir / "checkpoints"
        self.keep = keep
        self.ranks = ranks or Ranks()

    def whole(self) -> list[Path]:
        """Whole checkpoints, oldest first."""
        return sorted(folder for folder in self.root.glob("step_*") if folder.suffix == "" and is_whole(folder))

    def broken(self) -> list[Path]:
        """Folders that look like checkpoints and are not whole: a write that was cut off, or files that were
        changed."""
        return sorted(folder for folder in self.root.glob("step_*") if folder.suffix != "" or not is_whole(folder))

    def remove_unfinished(self) -> None:
        """Removes what a killed process left of a checkpoint that it was writing. Only for the run's one writer."""
        for folder in self.root.glob("step_*.writing-*"):
            shutil.rmtree(folder)

    def save(self, step: int, model: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> Path:
        """Writes one checkpoint and removes all but the newest `keep`. `state` must be JSON-able.

        Model and optimizer are left as they are. Raises OSError when the disk is full or not writable; older
        checkpoints are untouched then.
        """
        place = self.root / f"step_{step:06d}"
        aside = self.root / self.ranks.from_main(f"step_{step:06d}.writing-{os.getpid()}-{time.time_ns()}")
        aside.mkdir(parents=True, exist_ok=True)
        try:
            # Asked for its state before its first step, an optimizer is made to take a hidden one, which would change
            # the bias correction of all that follow: so an unused optimizer is recorded as such.
            used = bool(optimizer.state)
            self._write_tensors(aside, self._tensors(model, optimizer, used, self.ranks.size))
            self.ranks.barrier()
            if self.ranks.main:
                own = {
                    "step": step,
                    "model_fingerprint": model_fingerprint(model),
                    "optimizer_used": used,
                    "ranks": self.ranks.size,
                }
                self._finish(aside, place, {**state, **own})
        except BaseException:
            shutil.rmtree(aside, ignore_errors=True)
            raise
        self.ranks.barrier()
        return place

    def _tensors(self, model: nn.Module, optimizer: torch.optim.Optimizer, used: bool, writers: int) -> dict[str, Any]:
        """What a checkpoint of so many ranks holds of tensors; a rank beyond them has no random state there."""
        # What is frozen is where it was loaded from.
        tensors: dict[str, Any] = {"model": get_model_state_dict(model, options=_trained(model))}
        if self.ranks.rank < writers:
            tensors[_random_state(self.ranks.rank)] = torch.get_rng_state()
        if used:
            tensors["optimizer"] = get_optimizer_state_dict(model, optimizer)
        return tensors

    def _write_tensors(self, folder: Path, tensors: dict[str, Any]) -> None:
        if self.ranks.size > 1:
            state_dict_saver.save(tensors, checkpoint_id=folder, process_group=self.ranks.host_group)
            return
        with one_process():
            state_dict_saver.save(tensors, checkpoint_id=folder, no_dist=True)

    def _finish(self, aside: Path, place: Path, state: dict[str, Any]) -> None:
        """Syncs what all ranks wrote, marks it whole, renames it, and removes what is older than the newest `keep`."""
        _write_json(aside / STATE_FILE, state)
        sizes = {file.name: file.stat().st_size for file in aside.iterdir()}
        for name in sizes:
            _sync(aside / name)
        _write_json(aside / _MARK, {"bytes": sizes})
        _sync(aside)
        if place.exists():
            shutil.rmtree(place)
        aside.rename(place)
        _sync(self.root)
        for old in self.whole()[: -self.keep]:
            shutil.rmtree(old)

    def load_newest(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any] | None:
        """Loads the newest whole checkpoint into model and optimizer; returns its state, or None when there is none.

        Raises ValueError when it belongs to a model with other parameters.
        """
        whole = self.whole()
        if not whole:
            return None
        folder = whole[-1]
        state = json.loads((folder / STATE_FILE).read_text())
        if state["model_fingerprint"] != model_fingerprint(model):
            raise ValueError(
                f"{folder} holds another model (fingerprint {state['model_fingerprint']}, this one is "
                f"{model_fingerprint(model)}): names, shapes or types of parameters differ. Resume with the model "
                "it was written by, or choose another run_dir"
            )
        tensors = self._tensors(model, optimizer, state["optimizer_used"], state["ranks"])
        if self.ranks.size > 1:
            state_dict_loader.load(tensors, checkpoint_id=folder, process_group=self.ranks.host_group)
        else:
            with one_process():
                state_dict_loader.load(tensors, checkpoint_id=folder, no_dist=True)
        set_model_state_dict(model, tensors["model"], options=_trained(model))
        if state["optimizer_used"]:
            set_optimizer_state_dict(model, optimizer, tensors["optimizer"])
        if self.ranks.rank < state["ranks"]:
            torch.set_rng_state(tensors[_random_state(self.ranks.rank)])
        return state


def _trained(model: nn.Module) -> StateDictOptions:
    """Leaves frozen parameters out, and asks for none of them."""
    frozen = not all(parameter.requires_grad for parameter in model.parameters())
    return StateDictOptions(ignore_frozen_params=frozen, strict=not frozen)


def _random_state(rank: int) -> str:
    return f"torch_rng_{rank}"
