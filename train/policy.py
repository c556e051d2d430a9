"""The policy: a Hugging Face causal LM, its tokenizer, and the fused head that scores tokens without their logits."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.fsdp import register_fsdp_forward_method
from transformers.utils.logging import disable_progress_bar

from entrocraft import Rollouts, TokenStats
from entrocraft.kernels import FusedHead
from entrocraft.train.config import ModelConfig
from entrocraft.train.export import export, named_weights
from entrocraft.train.loading import attention_kind, load_whole
from entrocraft.train.lora import has_adapters
from entrocraft.train.packing import MicroBatch, idle_batch, pack, sequence_lengths
from entrocraft.train.parallel import Ranks, balanced
from entrocraft.train.sharding import compute_dtype_of, is_sharded, release_weights, whole_weights
from entrocraft.train.vocab_head import ShardedHead, vocabulary_group, whole_logits


def choose_device(name: str) -> torch.device:
    """`auto` is CUDA where there is one, else the CPU. Raises ValueError for a device that is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"device = {name!r}: expected 'auto', 'cpu' or 'cuda'") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device = {name!r}: no CUDA device here; use --device cpu, or run `entrocraft doctor`")
    return device


class Policy:
    """Scores tokens under the model at the sampling temperature.

    On several ranks the model is sharded and every method that runs it is called by all ranks together, with the same
    whole batch: each runs its part, and all get the whole answer.
    """

    # Any: the types that transformers declares for models and tokenizers are wider than what they return.
    def __init__(
        self, model: Any, tokenizer: Any, *, temperature: float, device: torch.device, ranks: Ranks | None = None
    ) -> None:
        self.model = model if is_sharded(model) else model.to(device)
        self.tokenizer = tokenizer
        self.temperature = temperature
        self.device = device
        self.ranks = ranks or Ranks()
        self.dtype = compute_dtype_of(self.model)
        # Flash-attention tells sequences apart by their positions in a batch of one row, and in no other.
        self.one_row = str(getattr(self.model.config, "_attn_implementation", "")).startswith("flash")
        group = vocabulary_group(self.model)
        self.head = FusedHead(self.model) if group is None else ShardedHead(self.model, group)
        # FSDP gathers a module's weights for the methods it knows of: those that use the root's and the head's.
        head = self.model.get_output_embeddings()
        for module, name, method in (
            (head, "row_stats", self._row_stats),
            (self.model, "token_stats", self._stats),
            (self.model, "hidden_states", self._hidden),
        ):
            setattr(module, name, method)
            register_fsdp_forward_method(module, name)

    @classmethod
    def load(
        cls,
        config: ModelConfig,
        *,
        temperature: float,
        device: torch.device,
        seed: int,
        dtype: torch.dtype = torch.float32,
    ) -> "Policy":
        """The model at `config.path` (safetensors only, no remote code unless asked), or the tiny one built from
        `seed`, whole and in `dtype`.

        Raises FileNotFoundError for a local path that does not exist; ValueError for attention that cannot be here;
        whatever transformers raises for a bad model.
        """
        attention = attention_kind(config, device=device, dtype=dtype)
        model, tokenizer = load_whole(config, seed, attention, dtype)
        return cls(model, tokenizer, temperature=temperature, device=device)

    @property
    def eos_ids(self) -> list[int]:
        """Token ids that end a response: the tokenizer's, and those the model's generation settings add."""
        ids = {self.tokenizer.eos_token_id, *_as_list(getattr(self.model.generation_config, "eos_token_id", None))}
        return sorted(i for i in ids if i is not None)

    @property
    def pad_id(self) -> int:
        """Token id that fills the left of shorter prompts; masked, so its value never matters."""
        pad = self.tokenizer.pad_token_id
        return pad if pad is not None else self.eos_ids[0]

    @property
    def context(self) -> int:
        """Most tokens the model can hold, prompt and response together."""
        return int(self.model.config.max_position_embeddings)

    @property
    def vocab_size(self) -> int:
        """V, rows of the LM head."""
        return int(self.model.get_output_embeddings().weight.shape[0])

    @contextmanager
    def whole_weights(self) -> Iterator[None]:
        """Inside the block this rank has all weights: the model can generate. All ranks enter and leave together."""
        with whole_weights(self.model):
            yield

    @property
    def low_precision(self) -> bool:
        """Whether the model computes in 16 bits."""
        return self.dtype != torch.float32 and self.dtype != torch.float64

    @torch.no_grad()
    def hidden_of(self, prompt: Sequence[int]) -> Tensor:
        """fp32 hidden states [n, H] of one sequence alone. All ranks call it together, with the same sequence."""
        self.model.eval()
        ids = torch.tensor([list(prompt)], device=self.device)
        found = self.model.hidden_states(ids, torch.arange(len(prompt), device=self.device)[None])[0].float()
        release_weights(self.model)
        return found

    @torch.no_grad()
    def check(self, prompt: Sequence[int]) -> None:
        """Makes sure, on one prompt, that this model may be scored as `token_stats` does it.

        Raises ValueError when it gives NaN or infinity, when its logits are not what the fused head computes, or when
        a sequence sees its neighbour in a packed row or padding, as in a model that ignores position ids.
        """
        prompt = list(prompt[:64])
        n, alone = len(prompt), self.hidden_of(prompt)
        if not bool(torch.isfinite(alone).all()):
            raise ValueError(
                f"{type(self.model).__name__} gives hidden states that are not numbers: its weights are broken"
            )
        low = self.low_precision
        ids, position = torch.tensor([prompt], device=self.device), torch.arange(n, device=self.device)
        logit_TV = self._own_logits(ids)
        stats = self.model.token_stats(logit_TV.argmax(1), position, ids, position[None], temperature=1.0)
        # In bfloat16 a logit of 30 is off by 0.06.
        self.head.compare(stats["logprob_T"], logit_TV, tolerance=0.25 if low else 1e-2)
        rows = torch.stack([ids[0].repeat(2), torch.cat([ids[0], torch.zeros_like(ids[0])])])
        places = torch.stack([position.repeat(2), torch.cat([position, torch.zeros_like(position)])])
        packed = self.model.hidden_states(rows, places).float()
        release_weights(self.model)
        size = alone.abs().max()
        for found, where in (
            (packed[0, :n], "before another"),
            (packed[0, n:], "after another"),
            (packed[1, :n], "before padding"),
        ):
            error = float((found - alone).abs().max() / size)
            if not error < (0.05 if low else 1e-3):
                raise ValueError(
                    f"{type(self.model).__name__} does not keep packed sequences apart: a prompt that stands {where} "
                    f"in a row differs from the same alone by {error:.2g} of its size; it cannot be trained with "
                    "packing"
                )

    def _own_logits(self, input_BL: Tensor) -> Tensor:
        """fp32 logits [B * L, V] by the model's own forward pass, in which a head that is sharded by vocabulary gives
        every rank's part of them instead of what its weight alone would."""
        with whole_logits(self.head):
            return self.model(input_ids=input_BL, use_cache=False).logits.flatten(0, -2).float()

    def token_stats(
        self, batch: MicroBatch, token_T: Tensor, *, collision: bool = False, clamped_share: float = 0.0
    ) -> TokenStats:
        """Statistics of the N response tokens of a micro-batch, differentiable. `token_T` are the rollouts' tokens.

        clamped_share: above 0, with the entropy of each row without the least likely such share of the vocabulary.
        """
        return TokenStats(**self._run(batch, token_T, collision=collision, clamped_share=clamped_share))

    @torch.no_grad()
    def stats_and_reference(self, batch: MicroBatch, token_T: Tensor) -> tuple[TokenStats, TokenStats]:
        """Statistics of a few response tokens, collision sums included, from the fused op and from logits of the same
        hidden rows."""
        fields = self._run(batch, token_T, collision=True, reference=True)
        reference = {name: fields.pop(f"reference_{name}") for name in list(fields) if f"reference_{name}" in fields}
        return TokenStats(**fields), TokenStats(**reference)

    def idle(self) -> Tensor:
        """A pass over one token that is worth nothing, for a rank without work while others have some: they wait for
        each other in every block. Backward through the zero it returns."""
        return 0.0 * self._run(idle_batch(0), torch.zeros(1, dtype=torch.int64))["logprob_T"].sum()

    def _run(self, batch: MicroBatch, token_T: Tensor, **options: Any) -> dict[str, Tensor]:
        target_N = token_T[batch.token_N].to(self.device)
        batch = batch.to(self.device)
        return self.model.token_stats(target_N, batch.source_N, batch.input_BL, batch.position_BL, **options)

    def _stats(
        self, target_N: Tensor, source_N: Tensor, input_BL: Tensor, position_BL: Tensor, **options: Any
    ) -> dict[str, Tensor]:
        """What the root runs: backbone, then the head at the rows that are asked for."""
        hidden_NH = self._hidden(input_BL, position_BL).flatten(0, -2).index_select(0, source_N)
        return self.model.get_output_embeddings().row_stats(hidden_NH, target_N, **options)

    def _hidden(self, input_BL: Tensor, position_BL: Tensor) -> Tensor:
        """The backbone's output [B, L, H], in which no sequence of a row sees another."""
        if not self.one_row:
            return self.head.hidden(input_ids=input_BL, position_ids=position_BL)
        row = self.head.hidden(input_ids=input_BL.reshape(1, -1), position_ids=position_BL.reshape(1, -1))
        return row.unflatten(1, input_BL.shape)[0]

    def _row_stats(
        self,
        hidden_NH: Tensor,
        target_N: Tensor,
        *,
        collision: bool = False,
        clamped_share: float = 0.0,
        reference: bool = False,
        temperature: float | None = None,
    ) -> dict[str, Tensor]:
        """What the head runs; a dict, in which FSDP finds the tensors that a backward pass may begin at.

        temperature: another than the policy's.
        """
        at = self.temperature if temperature is None else temperature
        stats = self.head.stats(hidden_NH, target_N, temperature=at, collision=collision)
        fields = stats.as_dict()
        if clamped_share:
            fields["clamped_entropy_T"] = self.head.clamped_entropy(hidden_NH, share=clamped_share, temperature=at)
        if reference:
            from_logits = self.head.reference_stats(
                hidden_NH, target_N, temperature=self.temperature, collision=collision
            )
            fields |= {f"reference_{name}": value for name, value in from_logits.as_dict().items()}
        return fields

    @torch.no_grad()
    def score(self, rollouts: Rollouts, tokens_per_microbatch: int, *, clamped_share: float = 0.0) -> TokenStats:
        """Statistics, collision sums included, of all T response tokens in the rollouts' own order, on the CPU.

        Ranks share the rollouts out by length, and all get the statistics of all. clamped_share: as `token_stats`.
        """
        self.model.eval()
        mine = balanced(sequence_lengths(rollouts, range(rollouts.R)), self.ranks.size)[self.ranks.rank]
        batches = pack(rollouts, mine, tokens_per_microbatch)
        most = self.ranks.largest(len(batches))  # asked before any runs: a rank that runs waits for the others
        parts = [
            self.token_stats(batch, rollouts.token_T, collision=True, clamped_share=clamped_share).to("cpu")
            for batch in batches
        ]
        for _ in range(len(batches), most):
            self.idle()
        release_weights(self.model)
        own = {name: torch.cat([getattr(part, name) for part in parts]) for name in parts[0].as_dict()} if parts else {}
        own_token = torch.cat([batch.token_N for batch in batches]) if batches else torch.zeros(0, dtype=torch.int64)
        found = [(token_N, TokenStats(**fields)) for token_N, fields in self.ranks.gather((own_token, own)) if fields]
        where_T = torch.argsort(torch.cat([token_N for token_N, _ in found]))
        return TokenStats.cat([stats for _, stats in found]).index(where_T)

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor whole, by the name it is loaded under, with adapters merged, on the device that computes, where
        checksums are quick, even if shards rest on the host; all ranks iterate together."""
        return ((name, whole.to(self.device)) for name, whole in named_weights(self.model))

    def save(self, folder: Path) -> None:
        """Writes a Hugging Face folder (safetensors and tokenizer) that `model.path`, vLLM and transformers load."""
        disable_progress_bar()
        if is_sharded(self.model) or has_adapters(self.model):
            export(self.model, folder, self.ranks)
        else:
            self.model.save_pretrained(folder)
        if self.ranks.main:
            self.tokenizer.save_pretrained(folder)


def _as_list(value: int | list[int] | None) -> list[int | None]:
    return list(value) if isinstance(value, list) else [value]
