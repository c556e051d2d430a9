"""Models from safetensors: whole on one process, or straight into shards, where no rank ever holds the whole.

For shards the model is built on the meta device, sharded there, and each rank then reads from the files only the rows
that are its own, tensor by tensor: host memory peaks at a rank's share of the float32 weights.
"""

import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from transformers.utils.hub import cached_file
from transformers.utils.logging import disable_progress_bar

from entrocraft.train.config import ModelConfig
from entrocraft.train.config_lora import LoraConfig
from entrocraft.train.config_parallel import ParallelConfig
from entrocraft.train.lora import add_adapters, first_values, is_adapter, plain_name
from entrocraft.train.sharding import blocks, build_mesh, check_shard_ranks, compute_dtype, needs_sharding, shard_model
from entrocraft.train.tiny_model import build_tiny_model

_INDEX, _SINGLE = "model.safetensors.index.json", "model.safetensors"


def local_path(config: ModelConfig) -> str:
    """`model.path` with `~` expanded. FileNotFoundError for what looks like a folder and is none."""
    assert config.path is not None
    path = str(Path(config.path).expanduser())
    if config.path.startswith((".", "/", "~")) and not Path(path).is_dir():
        raise FileNotFoundError(f"model.path = {config.path!r}: no such folder")
    return path


@contextmanager
def told_as_users_mistake(config: ModelConfig) -> Iterator[None]:
    """What transformers says when there is no such model, in one line."""
    try:
        yield
    except OSError as error:
        raise ValueError(
            f"model.path = {config.path!r}: neither a folder with a model in safetensors nor a model of the "
            f"hub that can be reached: {str(error).splitlines()[0]}"
        ) from error


def load_whole(
    config: ModelConfig, seed: int, attention: str | None = None, dtype: torch.dtype = torch.float32
) -> tuple[Any, Any]:
    """Model on the CPU, and tokenizer; the tiny one is built from `seed`."""
    if config.path is None:
        model, tokenizer = build_tiny_model(config.tiny, seed)
        _prepare(model, config, attention)
        return model.to(dtype), tokenizer
    disable_progress_bar()
    path, remote = local_path(config), config.trust_remote_code
    with told_as_users_mistake(config):
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=remote)
        model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, use_safetensors=True, trust_remote_code=remote)
    _prepare(model, config, attention)
    return model, tokenizer


def load(
    config: ModelConfig,
    parallel: ParallelConfig,
    lora: LoraConfig | None = None,
    *,
    device: torch.device,
    size: int,
    seed: int,
) -> tuple[Any, Any]:
    """Model and tokenizer as `parallel` asks for on `size` ranks: sharded, or whole on this one process.

    lora: adapters to put in, whose first values come from `seed`.

    Raises ValueError for attention or `shard_ranks` that cannot be here, and for files that do not fit the model.
    """
    check_shard_ranks(parallel.shard_ranks, size)
    dtype = compute_dtype(parallel, device=device, pretrained=config.path is not None)
    attention = attention_kind(config, device=device, dtype=dtype)
    if not needs_sharding(parallel, size, dtype):
        model, tokenizer = load_whole(config, seed, attention)
        if lora is not None and lora.rank is not None:
            add_adapters(model, lora)
            _begin_adapters(model, seed)
        if parallel.compile is not None:
            for block in blocks(model):
                block.compile(backend=parallel.compile)
        return model, tokenizer
    mesh = build_mesh(device, size, parallel.shard_ranks)
    return load_sharded(config, parallel, lora or LoraConfig(), mesh, dtype, device, seed, attention)


def load_sharded(
    config: ModelConfig,
    parallel: ParallelConfig,
    lora: LoraConfig,
    mesh: DeviceMesh,
    dtype: torch.dtype,
    device: torch.device,
    seed: int,
    attention: str | None = None,
) -> tuple[Any, Any]:
    """Sharded model with float32 master weights on `device` (the CPU with `parallel.cpu_offload`), and tokenizer.

    Raises ValueError when the files do not hold a tensor of the same name and shape for every parameter.
    """
    place = torch.device("cpu") if parallel.cpu_offload else device
    if config.path is None:
        model, tokenizer = build_tiny_model(config.tiny, seed)
        _prepare(model, config, attention)
        if lora.rank is not None:
            add_adapters(model, lora)
            _begin_adapters(model, seed)
        shard_model(model.to(place), parallel, mesh, dtype)
        _buffers_to(model, device)
        return model, tokenizer
    model, tokenizer, files = without_weights(config)
    _prepare(model, config, attention)
    if lora.rank is not None:
        add_adapters(model, lora)
    shard_model(model, parallel, mesh, dtype)
    _materialise(model, place)
    _begin_adapters(model, seed)
    _fill(model, files)
    _buffers_to(model, device)
    return model, tokenizer


def without_weights(config: ModelConfig) -> tuple[Any, Any, dict[str, str]]:
    """The model at `config.path` with its parameters on the meta device, its tokenizer, and which file holds each
    tensor."""
    disable_progress_bar()
    path, remote = local_path(config), config.trust_remote_code
    with told_as_users_mistake(config):
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=remote)
        settings = AutoConfig.from_pretrained(path, trust_remote_code=remote)
        files = _weight_files(path)
    with _parameters_on_meta():
        model = AutoModelForCausalLM.from_config(settings, dtype=torch.float32, trust_remote_code=remote)
    with suppress(OSError):  # there need not be one; if there is, it may name further end marks
        model.generation_config = GenerationConfig.from_pretrained(path)
    return model, tokenizer, files


def _prepare(model: Any, config: ModelConfig, attention: str | None) -> None:
    if attention is not None:
        model.set_attn_implementation(attention)
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable()


def attention_kind(config: ModelConfig, *, device: torch.device, dtype: torch.dtype) -> str | None:
    """What transformers is asked for; None leaves the choice to it, which is SDPA where the model has it.

    Raises ValueError for flash-attention where it cannot run.
    """
    can = device.type == "cuda" and dtype in (torch.bfloat16, torch.float16)
    if config.attention == "auto":
        return "flash_attention_2" if can and find_spec("flash_attn") is not None else None
    if config.attention.startswith("flash") and not can:
        raise ValueError(
            f"model.attention = {config.attention!r}: it computes in bfloat16 on CUDA, and this model in "
            f"{str(dtype).removeprefix('torch.')} on {device.type}; set parallel.param_dtype = 'bfloat16' on a GPU, or "
            "leave model.attention alone"
        )
    return config.attention


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Modules built inside have parameters without storage and real buffers: rotary frequencies are in no file."""
    register = nn.Module.register_parameter

    def register_on_meta(module: nn.Module, name: str, param: nn.Parameter | None) -> None:
        if param is not None and not param.is_meta:
            param = nn.Parameter(param.detach().to("meta"), requires_grad=param.requires_grad)
        register(module, name, param)

    nn.Module.register_parameter = register_on_meta  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def _materialise(model: nn.Module, device: torch.device) -> None:
    """Gives meta parameters storage; buffers keep their values."""
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    model.to_empty(device=device)
    for name, buffer in model.named_buffers():
        buffer.copy_(buffers[name])


def _buffers_to(model: nn.Module, device: torch.device) -> None:
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = buffer.to(device)


def _weight_files(path: str) -> dict[str, str]:
    """Which file holds each tensor."""
    try:
        index = cached_file(path, _INDEX)
    except OSError:  # a small model: one file, no index
        single = str(cached_file(path, _SINGLE))
        with safe_open(single, framework="pt") as file:
            return dict.fromkeys(file.keys(), single)
    names = json.loads(Path(str(index)).read_text())["weight_map"]
    found = {file: str(cached_file(path, file)) for file in sorted(set(names.values()))}
    return {name: found[file] for name, file in names.items()}


def own_rows(rows: int, mesh: DeviceMesh) -> range:
    """Which rows of a tensor FSDP gives to this rank: equal pieces, the last ones shorter or empty."""
    shards, place = mesh.size(mesh.ndim - 1), mesh.get_local_rank(mesh.ndim - 1)
    each = -(-rows // shards)
    return range(min(rows, place * each), min(rows, (place + 1) * each))


@torch.no_grad()
def _begin_adapters(model: nn.Module, seed: int) -> None:
    for name, parameter in model.named_parameters():
        if is_adapter(name):
            _set(parameter, first_values(name, parameter.shape, seed))


def _set(tensor: Tensor, whole: Any) -> None:
    """Copies into a parameter its own rows of `whole`, a tensor or a slice of a file."""
    if isinstance(tensor, DTensor) and any(isinstance(placement, Shard) for placement in tensor.placements):
        rows = own_rows(tensor.shape[0], tensor.device_mesh)
        tensor.to_local().copy_(whole[rows.start : rows.stop])
    else:
        tensor.copy_(whole[:])


@torch.no_grad()
def _fill(model: nn.Module, files: dict[str, str]) -> None:
    """Reads each parameter's own rows, and each persistent buffer."""
    for _, tensor, piece in stored_tensors(model, files):
        _set(tensor, piece)


def stored_tensors(model: nn.Module, files: dict[str, str]) -> Iterator[tuple[str, Tensor, Any]]:
    """Name, place in the model and slice of a file of each parameter but adapters', and of each persistent buffer.

    Raises ValueError when the files hold no tensor of the same name and shape for one.
    """
    saved = model.state_dict()
    wanted: dict[str, Tensor] = {  # a tied weight once, under its first name
        plain_name(name): parameter for name, parameter in model.named_parameters() if not is_adapter(name)
    }
    wanted |= {name: buffer for name, buffer in model.named_buffers() if name in saved}
    missing = sorted(set(wanted) - set(files))
    if missing:
        raise ValueError(
            f"the model's files hold no tensor for {len(missing)} of {len(wanted)} parameters, such as {missing[0]}: "
            "they are named or arranged otherwise than in transformers' model. Load it with transformers, save it with "
            "save_pretrained, and train from that folder"
        )
    with ExitStack() as stack:
        opened = {
            path: stack.enter_context(safe_open(path, framework="pt"))
            for path in sorted({files[name] for name in wanted})
        }
        for name, tensor in wanted.items():
            piece = opened[files[name]].get_slice(name)
            if tuple(piece.get_shape()) != tuple(tensor.shape):
                raise ValueError(
                    f"{name} has shape {tuple(piece.get_shape())} in the files; the model expects {tuple(tensor.shape)}"
                )
            yield name, tensor, piece
