"""Rollouts from vLLM inside the trainer's process: one engine a rank, on the rank's own device.

    sample -> rest (sleep: weights and cache are given back) -> the policy learns -> publish:
    wake up for weights -> start, update, finish -> wake up for the cache -> forget cached prefixes

It starts with random weights: the first publication brings the policy's. Under torchrun every rank builds one
(`external_launcher`); they share nothing, and each draws the rollouts of its own prompts.
"""

import os
import random
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from entrocraft import Rollouts
from entrocraft.train.config_engine import EngineConfig, SamplingConfig
from entrocraft.train.deadline import Caller
from entrocraft.train.publication import Ledger, PublicationError, WeightSource, one_version
from entrocraft.train.sampling import assemble
from entrocraft.train.vllm_requests import request_options, responses_of

# Read when vLLM is imported. Scheduling in this process makes it deterministic, and torchrun needs it; the trainer's
# threads stay where they are; nothing is reported to anybody.
_ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
}


@dataclass(frozen=True, kw_only=True)
class SampledModel:
    """What an engine must know of the policy."""

    config: Any
    """The transformers configuration of the model."""
    architecture: str
    """What vLLM knows the model as, such as Qwen3ForCausalLM."""
    weights: WeightSource
    eos_ids: Sequence[int]
    device: torch.device
    context: int
    """Most tokens of prompt and response together."""
    seed: int = 0

    @property
    def who(self) -> str:
        """Who waits, in messages."""
        return f"rank {os.environ.get('RANK', '0')} of the trainer"


class VLLMEngine:
    """A `RolloutEngine` on a vLLM `LLM` of this process."""

    def __init__(self, model: SampledModel, config: EngineConfig, sampling: SamplingConfig) -> None:
        self.model, self.config, self.sampling = model, config, sampling
        self.dtype = choose_dtype(config.dtype, model.device)
        self.sleeps = config.sleep == "on" or (
            config.sleep == "auto" and model.device.type == "cuda" and not config.overlap
        )
        self.asleep = False
        # vLLM uses the group of processes it finds, and ends it when it ends.
        self._guest = torch.distributed.is_available() and torch.distributed.is_initialized()
        self._folder = tempfile.TemporaryDirectory(prefix="entrocraft-vllm-")
        self._caller = Caller(model.who, "vLLM in this process")
        self.llm: Any = self._caller.call(self._build, "start", config.start_timeout_s, "engine.start_timeout_s")

    def _build(self) -> Any:
        for name, value in _ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        import vllm  # pyright: ignore[reportMissingImports] - an extra

        from entrocraft.train.vllm_worker import BACKEND, WORKER

        device = self.model.device
        if device.type == "cuda":
            torch.cuda.set_device(device)  # the present device is a thread's own
        else:
            check_head_size(self.model.config)
        describe(self.model, Path(self._folder.name))
        torchrun = int(os.environ.get("WORLD_SIZE", "1")) > 1
        with _kept_as_it_was():
            llm = vllm.LLM(
                model=self._folder.name,
                runner="generate",
                skip_tokenizer_init=True,
                generation_config="vllm",
                load_format="dummy",
                dtype=str(self.dtype).removeprefix("torch."),
                max_model_len=self.model.context,
                gpu_memory_utilization=self.config.memory,
                enforce_eager=self.config.eager or device.type == "cpu",
                enable_sleep_mode=self.sleeps and device.type == "cuda",
                logprobs_mode="processed_logprobs",
                weight_transfer_config={"backend": BACKEND},
                worker_extension_cls=WORKER,
                distributed_executor_backend="external_launcher" if torchrun else None,
                seed=self.model.seed + int(os.environ.get("RANK", "0")),  # of what is drawn without a seed of its own
                disable_log_stats=True,
            )
            llm.init_weight_transfer_engine({"init_info": {}})
        return llm

    def publish(self, version: int) -> dict[str, float]:
        """Hands the weights over, then compares what the engine says it has with what was sent."""
        sent: Ledger = self._caller.call(
            lambda: self._publish(version),
            f"take over weight version {version}",
            self.config.publish_timeout_s,
            "engine.publish_timeout_s",
        )
        return {"publish_mib": sent.bytes / 2**20}

    @torch.no_grad()
    def _publish(self, version: int) -> Ledger:
        if self.model.device.type == "cuda":  # vLLM's stream does not wait for the one that the optimizer works on
            torch.cuda.synchronize(self.model.device)
        ledger = Ledger(version)
        if self.asleep:
            self.llm.wake_up(tags=["weights"])
        try:
            self.llm.start_weight_update()
            for parcel in parcels(ledger.passing(self.model.weights(), self.dtype), self.config.transfer_mib):
                self.llm.update_weights({"update_info": {"weights": parcel}})
            self.llm.finish_weight_update(str(version))
        except Exception as error:  # whatever vLLM raises: half of the weights are new
            raise PublicationError(
                f"vLLM in this process could not load weight version {version}: {type(error).__name__}: {error}"
            ) from error
        if self.asleep:
            self.llm.wake_up(tags=["kv_cache"])
            self.asleep = False
        self.llm.reset_prefix_cache()
        for attested in self.llm.collective_rpc("entrocraft_attest"):
            ledger.compare(attested, "vLLM in this process", check=self.config.check)
        return ledger

    def sample(
        self,
        prompts: Sequence[tuple[int, ...]],
        samples_per_prompt: int,
        *,
        stream: Sequence[int],
        temperature: float | None = None,
        settings: SamplingConfig | None = None,
        first_prompt: int = 0,
    ) -> Rollouts:
        """Draws R = P x G responses; each carries the version that vLLM says it was drawn from."""
        options = [
            request_options(
                settings or self.sampling,
                temperature=temperature,
                eos_ids=self.model.eos_ids,
                samples=samples_per_prompt,
                stream=(*stream, first_prompt + g) if self.config.seeded else None,
            )
            for g in range(len(prompts))
        ]
        return self._caller.call(
            lambda: self._sample(prompts, samples_per_prompt, options),
            f"draw {len(prompts) * samples_per_prompt} rollouts",
            self.config.sample_timeout_s,
            "engine.sample_timeout_s",
        )

    def _sample(self, prompts: Sequence[tuple[int, ...]], samples: int, options: Sequence[dict[str, Any]]) -> Rollouts:
        from vllm import SamplingParams, TokensPrompt  # pyright: ignore[reportMissingImports]

        assert not self.asleep, "asleep since `rest`; `publish` wakes the engine up"
        # It draws from the process's generator besides the seeded ones. While the policy learns in another thread, to
        # put that one back would make the other repeat itself.
        with nullcontext() if self.config.overlap else _kept_as_it_was():
            outputs = self.llm.generate(
                [TokensPrompt(prompt_token_ids=list(prompt)) for prompt in prompts],
                [SamplingParams(**each) for each in options],
                use_tqdm=False,
            )
        found = [vars_of(choice) for output in outputs for choice in output.outputs]
        version = one_version((span for choice in found for span in choice["versions"]), "vLLM in this process")
        return assemble(prompts, samples, responses_of(found, version), version)

    def rest(self) -> None:
        """Sleeps, if it does: vLLM's level 2, which keeps neither weights nor cache."""
        if self.sleeps and not self.asleep:
            self._caller.call(
                lambda: self.llm.sleep(level=2), "sleep", self.config.publish_timeout_s, "engine.publish_timeout_s"
            )
            self.asleep = True

    def close(self) -> None:
        """Ends vLLM and frees its memory; where the trainer has a process group, leaves both to the process's end."""
        llm, self.llm = self.llm, None
        if llm is not None and not self._caller.stuck and not self._guest:
            self._caller.start(llm.llm_engine.engine_core.shutdown)
        self._caller.close()
        self._folder.cleanup()


def vars_of(choice: Any) -> dict[str, Any]:
    """A vLLM output as the plain values that the server's answer has too."""
    logprobs = [found[token].logprob for token, found in zip(choice.token_ids, choice.logprobs, strict=True)]
    return {
        "token_ids": list(choice.token_ids),
        "logprobs": logprobs,
        "finish_reason": choice.finish_reason,
        "versions": [span.version for span in choice.weight_versions or ()],
    }


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """`auto` is bfloat16 on CUDA, float32 elsewhere."""
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return getattr(torch, name)


def parcels(weights: Iterator[tuple[str, torch.Tensor]], mib: int) -> Iterator[list[tuple[str, torch.Tensor]]]:
    """The weights in order, in lists of at most `mib` MiB, or of one weight that is larger."""
    parcel: list[tuple[str, torch.Tensor]] = []
    size = 0
    for name, value in weights:
        bytes_ = value.numel() * value.element_size()
        if parcel and size + bytes_ > mib << 20:
            yield parcel
            parcel, size = [], 0
        parcel.append((name, value))
        size += bytes_
    if parcel:
        yield parcel


def describe(model: SampledModel, folder: Path) -> None:
    """Writes `config.json` for vLLM."""
    written = type(model.config).from_dict(model.config.to_dict())
    written.architectures = [model.architecture]
    written.save_pretrained(folder)


def check_head_size(config: Any) -> None:
    """Raises ValueError for a size of attention head that vLLM's CPU build has no kernel for."""
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend  # pyright: ignore[reportMissingImports]

    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    known = CPUAttentionBackend.get_supported_head_sizes()
    if size not in known:
        raise ValueError(
            f"engine.name = 'vllm' on the CPU: attention heads of {size} dimensions, expected one of {known}; with "
            "`model.tiny` that is hidden_size / heads, e.g. --model.tiny.hidden_size 128 --model.tiny.heads 4"
        )


@contextmanager
def _kept_as_it_was() -> Iterator[None]:
    """Random states and thread settings of this process, which vLLM uses as if they were its own."""
    states = random.getstate(), np.random.get_state(), torch.random.get_rng_state()
    set_threads = torch.set_num_threads
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.random.set_rng_state(states[2])
        torch.set_num_threads = set_threads
