"""What runs inside vLLM: the end of a publication that receives weights, loads them and says what it then holds.

vLLM resolves `WORKER` by name in every worker process before it loads the model, which imports this file, which
registers the transfer backend. Nothing else imports it before vLLM is wanted.
"""

# pyright: reportMissingImports=false
# vLLM is an extra.

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

from entrocraft.train.publication import block_of, checksum, hexadecimal

WORKER = "entrocraft.train.vllm_worker.Attesting"
BACKEND = "entrocraft"


class Recorder:
    """Loads weights into a model and remembers which, so that it can be asked what came of them."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.received: dict[str, str] = {}
        self.loaded: set[str] = set()
        self.tells_loaded = True
        self.error: str | None = None

    def load(self, weights: Iterator[tuple[str, Tensor]]) -> None:
        """vLLM's own loading, between the start and the finish of an update."""
        loaded = self.model.load_weights(self._noting(weights))
        self.tells_loaded &= loaded is not None
        self.loaded |= loaded or set()

    def _noting(self, weights: Iterator[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        for name, value in weights:
            self.received[name] = hexadecimal(checksum(value, ordered=True))
            yield name, value

    def finish(self) -> None:
        """After loading has ended: brings packed copies of tied heads up to date, and looks for what got no value."""
        repack_heads(self.model)
        missing = {name for name, _ in self.model.named_parameters()} - self.loaded
        if self.tells_loaded and missing:
            shown = ", ".join(sorted(missing)[:3])
            self.error = f"{len(missing)} parameters of the sampler got no new value: {shown}"

    def attest(self) -> dict[str, Any]:
        """What arrived, what the blocks hold now, and what went wrong, as JSON can carry it."""
        return {"received": self.received, "held": held_blocks(self.model), "error": self.error}


def repack_heads(model: torch.nn.Module) -> None:
    """Packs heads anew that share the embedding's weight.

    vLLM's CPU build multiplies by a packed copy of a head's weight. A reload packs those modules anew that weights were
    loaded into; a tied head is none of them and would keep on sampling from its first copy.
    """
    for module in model.modules():
        method: Any = getattr(module, "quant_method", None)
        if hasattr(module, "cpu_linear") and type(method).__name__ == "UnquantizedEmbeddingMethod":
            method.process_weights_after_loading(module)


def held_blocks(model: torch.nn.Module) -> dict[str, str | None]:
    """Checksum of each block's parameters; None where some are not to be seen (packed away by the CPU build)."""
    held: dict[str, int | None] = {}
    for name, value in model.named_parameters():
        block = block_of(name)
        before = held.get(block, 0)
        held[block] = (
            None if before is None or not value.numel() else (before + checksum(value, ordered=False)) % (1 << 64)
        )
    return {block: None if value is None else hexadecimal(value) for block, value in held.items()}


@dataclass
class Nothing(WeightTransferInitInfo):
    """There is nothing to agree on beforehand."""


@dataclass
class Parcel(WeightTransferUpdateInfo):
    """Some weights: tensors of this very process, or a safetensors file that both sides can read."""

    weights: list[tuple[str, Any]] = field(default_factory=list)
    file: str | None = None


class Transfer(WeightTransferEngine[Nothing, Parcel]):
    """Weights in Hugging Face's layout, from this process or from files, through vLLM's layer-wise reload."""

    init_info_cls = Nothing
    update_info_cls = Parcel
    recorder: Recorder | None = None

    def init_transfer_engine(self, init_info: Nothing) -> None:
        """Nothing to connect."""

    def start_weight_update(self) -> None:
        """Opens the model for new weights."""
        self.recorder = Recorder(self.model)
        initialize_layerwise_reload(self.model)

    def receive_weights(self, update_info: Parcel) -> None:
        """Loads one parcel."""
        assert self.recorder is not None, "an update without a start"
        self.recorder.load(self._unpack(update_info))

    def _unpack(self, parcel: Parcel) -> Iterator[tuple[str, Tensor]]:
        yield from parcel.weights
        if parcel.file is not None:
            with safe_open(parcel.file, framework="pt", device=str(self.device)) as file:
                for name in file.keys():  # noqa: SIM118 - not a mapping
                    yield name, file.get_tensor(name)

    def finish_weight_update(self) -> None:
        """Closes the model again, and takes stock."""
        assert self.recorder is not None, "an update without a start"
        finalize_layerwise_reload(self.model, self.model_config)
        self.recorder.finish()

    def shutdown(self) -> None:
        """Nothing to let go of."""


class Attesting:
    """Added to vLLM's worker class: what the trainer can ask of it besides vLLM's own calls."""

    def entrocraft_type(self) -> dict[str, str]:
        """The type of the model's weights."""
        config: Any = getattr(self, "vllm_config", None)
        return {"dtype": str(config.model_config.dtype).removeprefix("torch.")}

    def entrocraft_attest(self) -> dict[str, Any]:
        """`Recorder.attest` of the last publication, and over how many workers the model is cut."""
        transfer: Any = getattr(self, "weight_transfer_engine", None)
        recorder = getattr(transfer, "recorder", None)
        if recorder is None:
            return {"received": {}, "held": {}, "error": "no publication has reached this worker", "shards": 1}
        parallel = transfer.parallel_config
        shards = parallel.tensor_parallel_size * parallel.pipeline_parallel_size
        return {**recorder.attest(), "shards": shards}


WeightTransferEngineFactory.register_engine(BACKEND, Transfer)
