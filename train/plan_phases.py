"""The phases of a training step, and what is in a rank's memory at the fullest moment of each.

An update has three such moments: when the backward pass enters the head, with everything kept by the blocks; inside a
block, where tensors are recomputed and gradients made; and at its end, where the embedding's gradient is summed over
the ranks and activations are gone. The fullest of them is the phase.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from entrocraft.kernels.head import BUFFER_BYTES
from entrocraft.train.plan_sizes import Sizes

# fp32 copies of a step's logits that drawing a token makes beside the model's own: as fp32, divided by the temperature,
# noise for the group and for each row, their sum, and the sum of the step before, which is let go last.
DRAWN_COPIES = 6


@dataclass(frozen=True, slots=True)
class Phase:
    """A stretch of a step and what is in memory at its fullest moment, bytes by name."""

    name: str
    parts: Mapping[str, int]

    @property
    def peak(self) -> int:
        """Bytes in all."""
        return sum(self.parts.values())


def phases(sizes: Sizes, gpu_bytes: int) -> list[Phase]:
    """Every phase of a step, in order."""
    resting = _resting(sizes, gpu_bytes)
    # Whether a step samples more is decided by scores, so the engine is awake still.
    scoring = _awake(sizes, gpu_bytes) if sizes.config.refill.oversample else resting
    found = [
        Phase("sample", _resident(sizes) | _sampling(sizes, gpu_bytes)),
        Phase("score", _resident(sizes) | scoring | _scoring(sizes)),
    ]
    if has_reference(sizes):
        found.append(Phase("score the reference", _resident(sizes) | scoring | _scoring(sizes) | _reference(sizes)))
    gradients = {} if sizes.offloaded else {"gradients": sizes.held_bytes("gradients")}
    moments = [_resident(sizes) | gradients | resting | moment for moment in _update(sizes)]
    found.append(Phase("update", max(moments, key=lambda parts: sum(parts.values()))))
    found.append(Phase("optimizer", _resident(sizes) | gradients | resting | _optimizing(sizes)))
    if sizes.config.engine.name != "hf":
        found.append(Phase("publish", _resident(sizes) | _publishing(sizes, gpu_bytes)))
    if sizes.config.data.eval is not None or sizes.config.evaluation.sets:
        moments = [_resident(sizes) | moment for moment in _evaluation(sizes, gpu_bytes)]
        found.append(Phase("evaluate", max(moments, key=lambda parts: sum(parts.values()))))
    return [Phase(phase.name, {name: size for name, size in phase.parts.items() if size}) for phase in found]


def has_reference(sizes: Sizes) -> bool:
    """Whether there is a second model: with adapters the reference is the first without them."""
    own = sizes.config.reference
    return own.kl_coefficient != 0 and (sizes.config.lora.rank is None or own.path is not None)


def _resident(sizes: Sizes) -> dict[str, int]:
    """What is there in every phase from the second step on."""
    extra = has_reference(sizes) and not sizes.config.reference.offload
    if sizes.offloaded:
        return {}
    return {
        "weights": sizes.held_bytes("weights"),
        "optimizer": sizes.held_bytes("optimizer"),
        "reference": sizes.held_bytes("weights") if extra else 0,
    }


def _resting(sizes: Sizes, gpu_bytes: int) -> dict[str, int]:
    """What the rollout engine keeps while the policy learns."""
    engine = sizes.config.engine
    asleep = engine.sleep == "on" or (engine.sleep == "auto" and not engine.overlap)
    return {} if asleep else _awake(sizes, gpu_bytes)


def _awake(sizes: Sizes, gpu_bytes: int) -> dict[str, int]:
    """What the rollout engine holds of the device while it can sample."""
    engine = sizes.config.engine
    return {"vLLM": int(engine.memory * gpu_bytes)} if engine.name == "vllm" else {}


def _gathered(sizes: Sizes, *, whole: bool = False) -> dict[str, int]:
    """Weights that FSDP holds whole: those outside the blocks, and two blocks or all."""
    if not sizes.sharded:
        return {}
    every = whole or not sizes.config.parallel.reshard_after_forward
    within = sum(sizes.block_sizes) if every else sum(sorted(sizes.block_sizes)[-2:])
    outside = sizes.total - sum(sizes.block_sizes)
    if _by_vocabulary(sizes) and not whole:  # its own rows, cast for the time
        outside += (-(-sizes.V // sizes.shards) - sizes.V) * sizes.H
    return {"gathered weights": sizes.item * (within + outside)}


def _by_vocabulary(sizes: Sizes) -> bool:
    return sizes.sharded and sizes.config.parallel.vocab_parallel_head


def head_buffer(rows: int, V: int, H: int, bound: int = BUFFER_BYTES) -> int:
    """The most that the head needs for its own work on so many rows, bytes beside its operands and their gradients:
    its `buffer_bytes`, and less for a small head (three fp32 tiles, and slices of weight, hidden and gradients)."""
    return min(bound, 4 * (3 * rows * V + 2 * V * H + 2 * rows * H))


def _buffer(sizes: Sizes, rows: int) -> int:
    return head_buffer(rows, sizes.V, sizes.H)


def _scoring(sizes: Sizes) -> dict[str, int]:
    rows = sizes.tokens * (sizes.world_size if _by_vocabulary(sizes) else 1)
    hidden = sizes.item * sizes.H * (sizes.tokens + (rows if _by_vocabulary(sizes) else 0))
    return _gathered(sizes) | {
        "forward pass": sizes.trace().score,
        "hidden rows": hidden,
        "head buffer": _buffer(sizes, rows),
    }


def _reference(sizes: Sizes) -> dict[str, int]:
    """A second model that scores: what it holds beside the first's resident part. The policy has let go of its own."""
    whole = not sizes.sharded or not (sizes.config.reference.offload or sizes.offloaded)
    return {"reference": sizes.held_bytes("weights") if whole else 0}


def host_bytes(sizes: Sizes) -> int:
    """What is in host memory instead: the policy's part with `parallel.cpu_offload`, the reference's with either that
    or `reference.offload`."""
    own = sum(held.nbytes for held in sizes.held) if sizes.offloaded else 0
    away = has_reference(sizes) and (sizes.offloaded or sizes.config.reference.offload)
    return own + (sizes.held_bytes("weights") if away else 0)


def _update(sizes: Sizes) -> list[dict[str, int]]:
    """The three moments of an update that may be the fullest."""
    passes, reduced = sizes.trace(), sizes.sharded
    head_elements = sizes.V * sizes.H if sizes.head_trained else 0
    own_head = -(-sizes.V // sizes.shards) * sizes.H if sizes.head_trained else 0
    head_grad = (sizes.item + 4) * own_head if _by_vocabulary(sizes) else sizes.item * head_elements
    every_row = sizes.tokens * (sizes.world_size if _by_vocabulary(sizes) else 1)
    hidden = sizes.item * sizes.H * (sizes.tokens + (every_row if _by_vocabulary(sizes) else 0))
    gathered = _gathered(sizes)
    in_head = {
        "activations": passes.kept,
        "hidden rows": hidden + 4 * sizes.H * every_row,
        # As soon as one token has no gradient, the others are copied, and their gradients gathered apart.
        "packed rows": (sizes.item + 4) * sizes.H * every_row,
        "head buffer": _buffer(sizes, every_row),
        "head gradient": head_grad,
    }
    reducing_head = {
        "activations": passes.kept + passes.output,
        "head gradient": head_grad,
        "reduction": 4 * head_elements if reduced and not sizes.tied and not _by_vocabulary(sizes) else 0,
    }
    in_block = {
        "activations": passes.kept,
        "backward pass": max(0, passes.backward - passes.kept),
        "head gradient": head_grad if sizes.tied else 0,
        "reduction": (sizes.item + 4) * sizes.block_trained if reduced else 0,
    }
    embedding = sizes.V * sizes.H if sizes.model.get_input_embeddings().weight.requires_grad else 0
    at_end = {
        "head gradient": head_grad if sizes.tied else 0,
        "reduction": ((sizes.item + 4) * embedding + 4 * sizes.block_trained) if reduced else 4 * embedding,
    }
    return [gathered | moment for moment in (in_head, reducing_head, in_block, at_end)]


def _optimizing(sizes: Sizes) -> dict[str, int]:
    """AdamW's own temporaries: two of one parameter at a time."""
    largest = max((held.nbytes for held in sizes.held if held.kind == "gradients"), default=0)
    return {"temporaries": 0 if sizes.offloaded else 2 * largest}


def _sampling(sizes: Sizes, gpu_bytes: int) -> dict[str, int]:
    prompts = -(-sizes.config.batch.prompts_per_step // sizes.world_size)
    wanted = prompts * sizes.config.batch.samples_per_prompt
    return _generating(sizes, gpu_bytes, wanted, sizes.config.sampling.max_response_tokens)


def _generating(sizes: Sizes, gpu_bytes: int, wanted: int, response: int) -> dict[str, int]:
    """As the engine draws so many rollouts, with responses of so many tokens: the fullest of three moments. Those are
    the prompts' pass; the last token's attention, which sees keys and values of all before it; and its draw."""
    if sizes.config.engine.name != "hf":
        return _awake(sizes, gpu_bytes)
    rollouts, prompt = min(sizes.config.sampling.rollouts_per_batch, wanted), sizes.config.data.max_prompt_tokens
    fed = prompt + response - 1
    token, scores = rollouts * token_cache(sizes), 4 * rollouts * sizes.V
    layers = len(sizes.block_sizes)
    moments = [
        {"KV cache": layers * token * prompt, "forward pass": rollouts * sizes.prompt_pass()},
        # Two copies of the scores before are there still.
        {"KV cache": layers * token * fed, "attention": _attention_copies(sizes, token * fed), "logits": 2 * scores},
        {"KV cache": layers * token * fed, "logits": rollouts * sizes.V * sizes.item + DRAWN_COPIES * scores},
    ]
    return _gathered(sizes, whole=True) | max(moments, key=lambda parts: sum(parts.values()))


def _attention_copies(sizes: Sizes, layer: int) -> int:
    """Copies that a token's attention makes of one layer's cache of so many bytes: heads repeated where queries share
    them, beside a mask (prompts are padded); or only the old values as the longer ones are written."""
    shape: Any = sizes.shape
    groups = shape.num_attention_heads // _cached_heads(sizes)
    return layer * groups if groups > 1 and not sizes.one_row else layer // 2


def _evaluation(sizes: Sizes, gpu_bytes: int) -> list[dict[str, int]]:
    """The two moments of an evaluation: responses are drawn, and scored for their entropy beside an engine that is
    awake, since the next ones are drawn from the same weights."""
    config, evaluation = sizes.config, sizes.config.evaluation
    samples = {held.samples or evaluation.samples for held in evaluation.sets.values()} | {evaluation.samples}
    wanted = max(-(-max(1, evaluation.rollouts_per_batch // n) // sizes.world_size) * n for n in samples)
    response = evaluation.max_response_tokens or config.sampling.max_response_tokens
    drawn = _generating(sizes, gpu_bytes, wanted, response)
    return [drawn, _awake(sizes, gpu_bytes) | _scoring(sizes)] if evaluation.entropy else [drawn]


def token_cache(sizes: Sizes) -> int:
    """Bytes of one token's key and value in one layer, in the compute dtype."""
    shape: Any = sizes.shape
    width = getattr(shape, "head_dim", None) or shape.hidden_size // shape.num_attention_heads
    return 2 * _cached_heads(sizes) * width * sizes.item


def _cached_heads(sizes: Sizes) -> int:
    shape: Any = sizes.shape
    return getattr(shape, "num_key_value_heads", None) or shape.num_attention_heads


def _publishing(sizes: Sizes, gpu_bytes: int) -> dict[str, int]:
    """The largest weight whole in fp32, the chunk that is under way, and vLLM awake."""
    largest = max(parameter.numel() for parameter in sizes.model.parameters())
    under_way = {"weights under way": 4 * largest + (sizes.config.engine.transfer_mib << 20)}
    return _awake(sizes, gpu_bytes) | under_way
