"""Checkpoints that are whole or are not there, of one process or many.

A checkpoint is written into a folder beside its place, synced to disk, given a completion mark with size and sha256 of
every file, and renamed; a folder without a mark, or whose files do not match it, is ignored. Tensors are stored by
`torch.distributed.checkpoint`, whose index is a pickle: resume only runs whose folder you trust. Everything else that
decides the next step is JSON. Each rank writes its own shards; a run goes on at any number of ranks, since a tensor is
found again by its name and place. All ranks save and load together, in a folder that all of them see.

Asynchronously, the state is copied to host memory and written by a thread while training goes on, under ranks of a
group of their own, so that its messages and the training's never mix. The next checkpoint waits for it.
"""

import hashlib
import json
import os
import shutil
import sys
import time
import warnings
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from entrocraft.train.checkpoint_files import (
    STATE_FILE,
    damage,
    digests,
    in_host_memory,
    is_whole,
    mark_whole,
    os_error,
)
from entrocraft.train.deadline import Caller
from entrocraft.train.durable_files import sync, write_text
from entrocraft.train.errors import TrainingStopped
from entrocraft.train.parallel import Ranks
from entrocraft.train.random_states import kinds, random_states, restore, stored_states


def model_fingerprint(model: nn.Module) -> str:
    """A short digest of the names, shapes and types of all parameters: two models that differ in it cannot share
    weights."""
    described = [f"{name} {tuple(p.shape)} {p.dtype}" for name, p in sorted(model.named_parameters())]
    return hashlib.sha256("\n".join(described).encode()).hexdigest()[:16]


@contextmanager
def one_process() -> Iterator[None]:
    """Hides the library's remark that there is no process group; one process is what is meant."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
        yield


class CheckpointFolder:
    """The checkpoints of one run, in `run_dir/checkpoints/step_000123`.

    keep: how many of the newest are kept. best: whether the one with the greatest `value` is kept as well.
    asynchronous: whether `save` returns while a thread still writes. patience_s: how long `close` waits for it.
    device: the accelerator whose random state belongs to the run.
    """

    def __init__(
        self,
        run_dir: Path,
        *,
        keep: int,
        ranks: Ranks | None = None,
        best: bool = False,
        asynchronous: bool = False,
        patience_s: float = 600.0,
        device: torch.device | None = None,
    ) -> None:
        self.root = run_dir / "checkpoints"
        self.keep = keep
        self.best = best
        self.ranks = ranks or Ranks()
        self.damaged: dict[Path, str] = {}
        """Folders with a mark whose content is not what was written, and what is wrong: found when loading."""
        self.patience_s = patience_s
        self.device = device or torch.device("cpu")
        self._caller = Caller("the trainer", "the writing of checkpoints") if asynchronous else None
        self._writers = self.ranks.another() if asynchronous else self.ranks
        self._pending: Future[None] | None = None

    def whole(self) -> list[Path]:
        """Whole checkpoints, oldest first."""
        found = sorted(folder for folder in self.root.glob("step_*") if folder.suffix == "" and is_whole(folder))
        return [folder for folder in found if folder not in self.damaged]

    def broken(self) -> list[Path]:
        """Folders that look like checkpoints and are not whole: a write that was cut off, or files that were
        changed."""
        return sorted(
            folder
            for folder in self.root.glob("step_*")
            if folder not in self.damaged and (folder.suffix != "" or not is_whole(folder))
        )

    def tidy(self) -> None:
        """Removes what a killed process left of a checkpoint that it was writing, and puts damaged ones aside, so that
        none of them passes for a checkpoint again. Only for the run's one writer."""
        for folder in self.root.glob("step_*.writing-*"):
            shutil.rmtree(folder)
        for folder in self.damaged:
            if folder.exists():
                folder.rename(folder.with_name(f"{folder.name}.damaged-{time.time_ns()}"))
        self.damaged = {}

    def save(
        self,
        step: int,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        state: dict[str, Any],
        value: float | None = None,
    ) -> Path:
        """Writes one checkpoint and removes all but the newest `keep` and the best. `state` must be JSON-able.

        value: how good it is, if that was measured. Model and optimizer are left as they are. Asynchronously, what went
        wrong with the checkpoint before is raised here or by `wait`. Raises TrainingStopped when the disk is full or
        cannot be written; older checkpoints are untouched then.
        """
        self.wait()
        place = self.root / f"step_{step:06d}"
        aside = self.root / self.ranks.from_main(f"step_{step:06d}.writing-{os.getpid()}-{time.time_ns()}")
        # Asked for its state before its first step, an optimizer is made to take a hidden one, which would change the
        # bias correction of all that follow: so an unused optimizer is recorded as such.
        used = bool(optimizer.state)
        own = {
            "step": step,
            "model_fingerprint": model_fingerprint(model),
            "optimizer_used": used,
            "ranks": self.ranks.size,
            "random_states": kinds(self.device),
            "value": value,
        }
        text = json.dumps({**state, **own}, indent=1)  # now: the state goes on changing while a thread writes
        tensors = self._tensors(model, optimizer, used)
        tensors |= random_states(self.ranks.rank, self.device)
        if self._caller is None:
            self._write(aside, place, tensors, text)
        else:
            copy = in_host_memory(tensors)
            self._pending = self._caller.start(lambda: self._write(aside, place, copy, text))
        return place

    @property
    def failed(self) -> bool:
        """Whether the checkpoint that a thread was writing could not be written; `wait` raises the reason."""
        return self._pending is not None and self._pending.done() and self._pending.exception() is not None

    def wait(self) -> None:
        """Returns when the last checkpoint is on the disk. Raises what went wrong with it, once."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def close(self) -> None:
        """Waits for the last checkpoint, but not for ever: another process, without which it cannot be finished, may be
        what ended the run. Trouble is told, not raised, as an exception may be on its way."""
        pending, self._pending = self._pending, None
        try:
            failure = None if pending is None else pending.exception(self.patience_s)
        except TimeoutError:
            failure = f"a checkpoint was not written within {self.patience_s:g} s"
        if failure is not None:
            print(f"warning: {failure}", file=sys.stderr)
        if self._caller is not None:
            self._caller.close()

    def _write(self, aside: Path, place: Path, tensors: dict[str, Any], state: str) -> None:
        ranks = self._writers
        trouble: str | None = None
        try:
            aside.mkdir(parents=True, exist_ok=True)
            self._write_tensors(aside, tensors, ranks)
            ranks.barrier()
            names = ranks.from_main(sorted(file.name for file in aside.iterdir()))  # others may see fewer yet
            content = digests(aside, names, ranks)
            if not all(content.values()):
                raise OSError(f"{sorted(n for n in content if not content[n])} cannot be read back")
            if ranks.main:
                self._finish(aside, place, state, content)
        except BaseException as error:
            shutil.rmtree(aside, ignore_errors=True)
            complaint = os_error(error)
            if complaint is None and isinstance(error, CheckpointException):  # not an Exception: it would pass by all
                raise RuntimeError(f"the checkpoint {place} could not be written: {error}") from error
            if complaint is None:
                raise
            trouble = f"{type(complaint).__name__}: {complaint}"
        trouble = next((told for told in ranks.gather(trouble) if told), None)
        if trouble is not None:
            whole = self.whole()
            held = f"{whole[-1]} is the newest whole one" if whole else "there is none before it"
            raise TrainingStopped(
                f"the checkpoint {place} could not be written: {trouble}. {held}; make room or mend the disk, then go "
                "on with --resume auto"
            )

    def _tensors(self, model: nn.Module, optimizer: torch.optim.Optimizer, used: bool) -> dict[str, Any]:
        """What a checkpoint holds of tensors, random states excepted."""
        # What is frozen is where it was loaded from.
        tensors: dict[str, Any] = {"model": get_model_state_dict(model, options=_trained(model))}
        if used:
            tensors["optimizer"] = get_optimizer_state_dict(model, optimizer)
        return tensors

    def _write_tensors(self, folder: Path, tensors: dict[str, Any], ranks: Ranks) -> None:
        if ranks.size > 1:
            state_dict_saver.save(tensors, checkpoint_id=folder, process_group=ranks.host_group)
            return
        with one_process():
            state_dict_saver.save(tensors, checkpoint_id=folder, no_dist=True)

    def _finish(self, aside: Path, place: Path, state: str, content: dict[str, str]) -> None:
        """Marks what all ranks wrote as whole, renames it, and removes what is no longer to be kept."""
        write_text(aside / STATE_FILE, state)
        mark_whole(aside, content | digests(aside, [STATE_FILE], Ranks()))
        if place.exists():
            shutil.rmtree(place)
        aside.rename(place)
        sync(self.root)
        whole = self.whole()
        kept = {*whole[-self.keep :], *self._best(whole)}
        for old in whole:
            if old not in kept:
                shutil.rmtree(old)

    def _best(self, whole: list[Path]) -> list[Path]:
        """The whole checkpoint of greatest value, the oldest of several; empty where none has one."""
        if not self.best:
            return []
        values = {folder: json.loads((folder / STATE_FILE).read_text()).get("value") for folder in whole}
        measured = [folder for folder in whole if values[folder] is not None]
        return [max(measured, key=lambda folder: values[folder])] if measured else []

    def load_newest(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any] | None:
        """Loads the newest whole checkpoint into model and optimizer; returns its state, or None when there is none.

        One whose content is not what was written goes into `damaged`, and the one before it is taken. Raises ValueError
        when all are damaged, or when it belongs to a model with other parameters.
        """
        folder = self._newest_undamaged()
        if folder is None:
            return None
        state = json.loads((folder / STATE_FILE).read_text())
        if state["model_fingerprint"] != model_fingerprint(model):
            raise ValueError(
                f"{folder} holds another model (fingerprint {state['model_fingerprint']}, this one is "
                f"{model_fingerprint(model)}): names, shapes or types of parameters differ. Resume with the model "
                "it was written by, or choose another run_dir"
            )
        tensors = self._tensors(model, optimizer, state["optimizer_used"])
        tensors |= stored_states(folder, state, self.ranks, self.device)
        if self.ranks.size > 1:
            state_dict_loader.load(tensors, checkpoint_id=folder, process_group=self.ranks.host_group)
        else:
            with one_process():
                state_dict_loader.load(tensors, checkpoint_id=folder, no_dist=True)
        set_model_state_dict(model, tensors["model"], options=_trained(model))
        if state["optimizer_used"]:
            set_optimizer_state_dict(model, optimizer, tensors["optimizer"])
        restore(tensors, self.ranks.rank, self.device)
        return state

    def _newest_undamaged(self) -> Path | None:
        for folder in reversed(self.ranks.from_main(self.whole())):
            reason = damage(folder, self.ranks)
            if reason is None:
                return folder
            self.damaged[folder] = reason
        if self.damaged:
            raise ValueError(
                f"every checkpoint of {self.root} is damaged: {'; '.join(self.damaged.values())}. Restore one from a "
                "copy, or choose another run_dir to begin anew"
            )
        return None


def _trained(model: nn.Module) -> StateDictOptions:
    """Leaves frozen parameters out, and asks for none of them."""
    frozen = not all(parameter.requires_grad for parameter in model.parameters())
    return StateDictOptions(ignore_frozen_params=frozen, strict=not frozen)
