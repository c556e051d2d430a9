"""A Hugging Face folder from a sharded model, tensor by tensor: rank 0 holds one file's worth of it at a time."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from entrocraft.train.lora import is_adapter, plain_name, update_of
from entrocraft.train.parallel import Ranks
from entrocraft.train.sharding import full_tensor

FILE_BYTES = 5 << 30
"""Largest file, unless one tensor alone is larger."""


def named_weights(model: Any) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the model whole, under the name that transformers and vLLM load it by; adapters are merged.

    All ranks iterate together, and each gets each tensor, on the model's device and in its dtype; a tied head comes
    once, as the embedding. Memory: one tensor at a time, and what the caller keeps.
    """
    names = {name for name, _ in model.named_parameters()}  # a tied weight once, under its first name
    added = update_of(model, full_tensor)
    for name, tensor in model.state_dict().items():
        if is_adapter(name) or not (name in names or _is_buffer(model, name)):
            continue
        whole = full_tensor(tensor.detach())
        yield plain_name(name), whole + added[name]().to(whole.dtype) if name in added else whole


def export(model: Any, folder: Path, ranks: Ranks, *, file_bytes: int = FILE_BYTES) -> None:
    """Writes config, generation settings and weights in float32. Called by all ranks together. Not atomic."""
    writer = _Files(folder, file_bytes) if ranks.main else None
    for name, tensor in named_weights(model):  # all ranks gather, one keeps
        if writer is not None:
            writer.add(name, tensor.to("cpu"))
    if writer is not None:
        writer.close()
        model.config.save_pretrained(folder)
        if getattr(model, "generation_config", None) is not None:
            model.generation_config.save_pretrained(folder)
    ranks.barrier()


def _is_buffer(model: torch.nn.Module, name: str) -> bool:
    owner, _, last = name.rpartition(".")
    return last in model.get_submodule(owner)._buffers


class _Files:
    """Safetensors files and their index, filled one tensor after the other."""

    def __init__(self, folder: Path, file_bytes: int) -> None:
        self.folder = folder
        self.file_bytes = file_bytes
        self.held: dict[str, Tensor] = {}
        self.held_bytes = self.total_bytes = 0
        self.names: list[list[str]] = []
        folder.mkdir(parents=True, exist_ok=True)
        for old in folder.glob("model*.safetensors*"):  # of an earlier export, perhaps in more files
            old.unlink()

    def add(self, name: str, tensor: Tensor) -> None:
        size = tensor.numel() * tensor.element_size()
        if self.held and self.held_bytes + size > self.file_bytes:
            self._flush()
        self.held[name] = tensor.contiguous()
        self.held_bytes += size
        self.total_bytes += size

    def _flush(self) -> None:
        save_file(self.held, self.folder / f"model-{len(self.names) + 1:05d}.part", metadata={"format": "pt"})
        self.names.append(list(self.held))
        self.held, self.held_bytes = {}, 0

    def close(self) -> None:
        """Names the files for how many there are, and writes the index where there are several."""
        self._flush()
        count = len(self.names)
        parts = [self.folder / f"model-{i + 1:05d}.part" for i in range(count)]
        if count == 1:
            parts[0].rename(self.folder / "model.safetensors")
            return
        files = [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
        for part, file in zip(parts, files, strict=True):
            part.rename(self.folder / file)
        where = {name: file for file, names in zip(files, self.names, strict=True) for name in names}
        index = {"metadata": {"total_size": self.total_bytes}, "weight_map": where}
        (self.folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))
