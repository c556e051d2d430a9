"""Rollouts from a vLLM server on devices of its own, started by `entrocraft serve`.

    publish: pause -> start, update (a file of weights at a time), finish -> resume -> compare

Every rank asks for the rollouts of its own prompts. All ranks take part in gathering the weights; rank 0 sends them and
tells the others how it went, so that none of them waits for a publication that has failed.
"""

import os
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from entrocraft import Rollouts
from entrocraft.train.config_engine import EngineConfig, SamplingConfig
from entrocraft.train.errors import TrainingStopped
from entrocraft.train.http_json import Server, ServerError, all_of
from entrocraft.train.publication import Ledger, PublicationError, one_version
from entrocraft.train.sampling import assemble
from entrocraft.train.vllm_engine import SampledModel, parcels
from entrocraft.train.vllm_requests import request_options, responses_of


class VLLMServerEngine:
    """A `RolloutEngine` on somebody else's process."""

    def __init__(self, model: SampledModel, config: EngineConfig, sampling: SamplingConfig) -> None:
        self.model, self.config, self.sampling = model, config, sampling
        self.server = Server(config.url, model.who)
        self.sends = _rank() == 0
        self.dtype = self._find()

    def _find(self) -> torch.dtype:
        """Waits until the server is up; the type of its weights."""
        deadline = time.monotonic() + self.config.start_timeout_s
        while True:
            try:
                found = self._ask("POST", "/collective_rpc", {"method": "entrocraft_type"}, "be ready", deadline)
                return getattr(torch, found["results"][0]["dtype"])
            except ServerError as error:
                if "ConnectionRefused" not in str(error) and "answered 503" not in str(error):
                    raise ValueError(
                        f"{error}. engine.url = {self.config.url!r}: expected a server started by `entrocraft serve`"
                    ) from None
                time.sleep(0.5)

    def _ask(
        self, method: str, path: str, body: Any, what: str, deadline: float, setting: str = "engine.start_timeout_s"
    ) -> Any:
        return self.server.ask(method, path, body, what=what, deadline=deadline, setting=setting)

    def publish(self, version: int) -> dict[str, float]:
        """Hands the weights over, then compares what the server's workers say they have with what was sent."""
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.barrier()  # no rank is still drawing from the version before
        ledger = Ledger(version)
        weights = ledger.passing(self.model.weights(), self.dtype)
        error: Exception | None = None
        try:
            if self.sends:
                self._send(ledger, weights)
            else:
                for _ in weights:  # gathering is a collective
                    pass
        except (ServerError, TrainingStopped) as caught:
            error = caught
        self._agree(error, version)
        return {"publish_mib": ledger.bytes / 2**20}

    def _send(self, ledger: Ledger, weights: Any) -> None:
        deadline = time.monotonic() + self.config.publish_timeout_s

        def tell(path: str, body: Any = None, method: str = "POST") -> Any:
            what = f"take over weight version {ledger.version} ({path.split('?')[0]})"
            return self._ask(method, path, body, what, deadline, "engine.publish_timeout_s")

        tell("/pause?mode=wait")
        try:
            self._send_files(weights, tell)
            tell("/finish_weight_update", {"weight_version": str(ledger.version)})
        finally:
            for _ in weights:  # whatever failed, the other ranks are gathering
                pass
        tell("/resume")
        if tell("/weight_info", method="GET")["weight_version"] != str(ledger.version):
            raise PublicationError(f"{self.config.url} does not say that it has weight version {ledger.version}")
        for attested in tell("/collective_rpc", {"method": "entrocraft_attest"})["results"]:
            ledger.compare(attested, self.config.url, check=self.config.check)

    def _send_files(self, weights: Any, tell: Callable[..., Any]) -> None:
        tell("/init_weight_transfer_engine", {"init_info": {}})
        tell("/start_weight_update")
        with tempfile.TemporaryDirectory(prefix="entrocraft-", dir=self.config.transfer_dir) as folder:
            file = Path(folder) / "weights.safetensors"
            for parcel in parcels(weights, self.config.transfer_mib):
                save_file({name: value.contiguous().cpu() for name, value in parcel}, file)
                tell("/update_weights", {"update_info": {"file": str(file)}})

    def _agree(self, error: Exception | None, version: int) -> None:
        """Raises on every rank what rank 0 ran into."""
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            told = [None if error is None else str(error)]
            torch.distributed.broadcast_object_list(told, src=0)
            if told[0] is not None and not self.sends:
                raise PublicationError(f"rank 0 could not publish weight version {version}: {told[0]}")
        if isinstance(error, ServerError):
            raise PublicationError(str(error)) from error
        if error is not None:
            raise error

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
        """Draws R = P x G responses; each carries the version that the server says it was drawn from."""
        deadline = time.monotonic() + self.config.sample_timeout_s
        what = f"draw {samples_per_prompt} rollouts of each of {len(prompts)} prompts"

        def draw(g: int) -> list[dict[str, Any]]:
            options = request_options(
                settings or self.sampling,
                temperature=temperature,
                eos_ids=self.model.eos_ids,
                samples=samples_per_prompt,
                stream=(*stream, first_prompt + g) if self.config.seeded else None,
            )
            body = {"token_ids": list(prompts[g]), "sampling_params": options}
            answer = self._ask("POST", "/inference/v1/generate", body, what, deadline, "engine.sample_timeout_s")
            return [_plain(choice) for choice in sorted(answer["choices"], key=lambda choice: choice["index"])]

        try:
            answers = all_of([lambda g=g: draw(g) for g in range(len(prompts))], self.config.connections)
        except ServerError as error:
            raise TrainingStopped(str(error)) from error
        found = [choice for answer in answers for choice in answer]
        version = one_version((span for choice in found for span in choice["versions"]), self.config.url)
        return assemble(prompts, samples_per_prompt, responses_of(found, version), version)

    def rest(self) -> None:
        """Nothing: the server's memory is its own."""

    def close(self) -> None:
        """The server stays; whoever started it ends it."""


def _plain(choice: dict[str, Any]) -> dict[str, Any]:
    """A choice as `vllm_requests` reads it."""
    return {
        "token_ids": choice["token_ids"],
        "logprobs": [each["logprob"] for each in choice["logprobs"]["content"]],
        "finish_reason": choice["finish_reason"],
        "versions": [span["version"] for span in choice["weight_versions"] or ()],
    }


def _rank() -> int:
    return int(os.environ.get("RANK", "0"))
