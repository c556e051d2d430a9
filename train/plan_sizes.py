"""The numbers that a memory plan is made of: what each rank keeps of a model, and what a pass of it takes."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import nn

from entrocraft.train.config import Config
from entrocraft.train.loading import attention_kind
from entrocraft.train.lora import add_adapters
from entrocraft.train.model_shapes import meta_model, model_shape
from entrocraft.train.plan_trace import MASKED, VARLEN, Trace, packed_inputs, trace_blocks
from entrocraft.train.sharding import blocks, compute_dtype, is_tied, needs_sharding

Kind = Literal["weights", "gradients", "optimizer"]


@dataclass(frozen=True, slots=True)
class Known:
    """What plans of similar runs share, by all that it depends on."""

    models: dict[tuple, Any] = field(default_factory=dict)
    """Meta models in float32."""
    traces: dict[tuple, Trace] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Held:
    """A tensor that a rank keeps from step to step."""

    kind: Kind
    name: str
    shape: tuple[int, ...]
    """Of this rank's rows."""
    nbytes: int


def held_tensors(model: nn.Module, shards: int) -> Iterator[Held]:
    """Everything that a rank keeps of a model and its optimizer, tensor by tensor: fp32, the first rank's rows, of
    which FSDP2 gives it as many as any other."""
    for name, parameter in model.named_parameters():
        shape = (-(-parameter.shape[0] // shards), *parameter.shape[1:])
        nbytes = 4 * torch.Size(shape).numel()
        yield Held("weights", name, shape, nbytes)
        if parameter.requires_grad:
            yield Held("gradients", name, shape, nbytes)
            yield Held("optimizer", f"{name}.step", (), 4)
            for moment in ("exp_avg", "exp_avg_sq"):
                yield Held("optimizer", f"{name}.{moment}", shape, nbytes)


class Sizes:
    """A run's model by its shape alone, and how it would be cut up.

    Raises ValueError for settings that no run could begin with, and what `model_shape` raises.
    """

    def __init__(self, config: Config, world_size: int, shape: str | None = None, known: Known | None = None) -> None:
        self.config, self.world_size = config, world_size
        self.known = known or Known()
        self.shape, self.source = model_shape(config.model, shape)
        self._key = (self.shape.to_json_string(), repr(config.lora))
        if self._key not in self.known.models:
            self.known.models[self._key] = self._build()
        self.model = self.known.models[self._key]
        # What is planned for is CUDA, whatever this machine has, unless the configuration says otherwise.
        self.device = torch.device("cpu" if config.device == "cpu" else "cuda")
        pretrained = config.model.path is not None or shape is not None
        self.dtype = compute_dtype(config.parallel, device=self.device, pretrained=pretrained)
        self.attention = attention_kind(config.model, device=self.device, dtype=self.dtype) or "sdpa"
        self.sharded = needs_sharding(config.parallel, world_size, self.dtype)
        self.shards = _shards(config, world_size) if self.sharded else 1
        self.offloaded = self.sharded and config.parallel.cpu_offload
        self.length = config.data.max_prompt_tokens + config.sampling.max_response_tokens - 1
        self.rows = config.batch.tokens_per_microbatch // self.length
        if self.rows == 0:
            raise ValueError(
                f"batch.tokens_per_microbatch = {config.batch.tokens_per_microbatch}: the longest prompt "
                f"(data.max_prompt_tokens = {config.data.max_prompt_tokens}) and response "
                f"(sampling.max_response_tokens = {config.sampling.max_response_tokens}) do not fit; expected at least "
                f"{self.length}"
            )
        self.held = list(held_tensors(self.model, self.shards))
        head = self.model.get_output_embeddings().weight
        self.V, self.H = head.shape
        self.tied, self.head_trained = is_tied(self.model), head.requires_grad
        self.item = self.dtype.itemsize
        self.block_sizes = [_count(block.parameters()) for block in blocks(self.model)]
        self.block_trained = max(_count(block.parameters(), trained=True) for block in blocks(self.model))
        self.total, self.trained = _count(self.model.parameters()), _count(self.model.parameters(), trained=True)

    def _build(self) -> Any:
        model = meta_model(self.shape, trust_remote_code=self.config.model.trust_remote_code)
        if self.config.lora.rank is not None:
            add_adapters(model, self.config.lora)
        return model

    @property
    def tokens(self) -> int:
        """Of the planned micro-batch."""
        return self.rows * self.length

    def held_bytes(self, kind: Kind) -> int:
        """Bytes this rank keeps of one kind, wherever."""
        return sum(held.nbytes for held in self.held if held.kind == kind)

    @property
    def one_row(self) -> bool:
        """Whether attention needs neither mask nor padding: all tokens of a micro-batch are in one row."""
        return self.attention not in ("sdpa", "eager")

    def trace(self, checkpointing: bool | None = None) -> Trace:
        """The pass of the planned micro-batch; by default with the configured checkpointing."""
        recompute = self.config.model.gradient_checkpointing if checkpointing is None else checkpointing
        return self._traced(recompute, (1, self.tokens) if self.one_row else (self.rows, self.length))

    def prompt_pass(self) -> int:
        """Bytes that one of the longest prompts takes in a forward pass, its mask included; n prompts together take n
        times as much."""
        length = self.config.data.max_prompt_tokens
        return self._traced(False, (1, length)).score + (0 if self.one_row else length**2)

    def _traced(self, recompute: bool, size: tuple[int, int]) -> Trace:
        """The pass of so many rows of so many tokens."""
        kind = {"sdpa": MASKED, "eager": "eager"}.get(self.attention, VARLEN)
        key = (*self._key, self.dtype, kind, recompute, size)
        if key not in self.known.traces:
            model = self._build()
            for parameter in model.parameters():
                parameter.data = parameter.data.to(self.dtype)
            model.set_attn_implementation(kind)
            if recompute:
                model.gradient_checkpointing_enable()
            self.known.traces[key] = trace_blocks(model, packed_inputs(*size))
        return self.known.traces[key]


def _shards(config: Config, world_size: int) -> int:
    shards = config.parallel.shard_ranks or world_size
    if world_size % shards:
        raise ValueError(
            f"parallel.shard_ranks = {shards}: expected a divisor of --world-size = {world_size}, so that every copy "
            "of the model has as many ranks"
        )
    return shards


def _count(parameters: Iterable[torch.Tensor], *, trained: bool = False) -> int:
    return sum(parameter.numel() for parameter in parameters if parameter.requires_grad or not trained)
