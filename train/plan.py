"""What a run will need of each rank's memory, phase by phase, from the shape of its model and its settings alone.

Nothing is loaded: parameters are counted on the meta device, sharded as FSDP2 shards them, and activations come from
the model's own code run on tensors without storage (`plan_trace.py`). Bytes are those of the first rank, which has the
most.

    weights, optimizer, gradients   fp32, this rank's rows: what it keeps from step to step
    gathered weights                what FSDP holds whole: all outside the blocks, and two blocks, one fetched ahead
    activations, backward pass      kept for the backward pass, and what it makes on its way
    hidden rows, packed rows        the head's input and its fp32 gradient; again those of tokens with a gradient
    head buffer                     the head's bounded workspace
    head gradient, reduction        of the head's weight; of other weights, in the compute dtype and in fp32
    KV cache, attention, logits     of the rollouts under way, with `engine.name: hf`

The largest micro-batch is planned for: full of sequences of the longest prompt and response, every token of which
reaches the head, and all but one of which learn. Not counted, and allowed for by RESERVE: CUDA's context, libraries'
workspaces, NCCL's buffers, what the allocator loses between tensors.

Held against what a small model allocates on a CPU, exactly or within a few percent: what is kept, a pass, the
optimizer, rollouts. The head buffer is held against both paths of the head, as the bound that it is. Formulas alone:
what FSDP gathers and reduces, fused attention beyond what it keeps, vLLM's share, weights on their
way to it.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from entrocraft.train.config import Config
from entrocraft.train.plan_phases import Phase, host_bytes, phases, token_cache
from entrocraft.train.plan_sizes import Known, Sizes

GB = 10**9
RESERVE = 4 * GB
"""Bytes of a device that no plan gives away: an allowance, not a prediction."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """The prediction for the first of `world_size` ranks."""

    source: str
    """Where the shape of the model was found."""
    parameters: int
    trained: int
    """Parameters with a gradient."""
    world_size: int
    dtype: str
    attention: str
    rows: int
    length: int
    """The planned micro-batch: rows of packed tokens, and tokens a row."""
    activations: dict[str, int]
    """Bytes kept between a forward pass and its backward pass, `without` and `with` checkpointing."""
    phases: list[Phase]
    host_bytes: int
    """What `parallel.cpu_offload` and `reference.offload` put into host memory instead, for each rank."""
    cache_tokens: int | None
    """vLLM: tokens whose keys and values fit beside its weights; None without it."""

    @property
    def peak(self) -> int:
        """Bytes of the fullest phase."""
        return max(phase.peak for phase in self.phases)

    def fits(self, gpu_bytes: int) -> bool:
        """Whether a device of so many bytes has room, RESERVE included, and vLLM for its own weights."""
        return self.peak + RESERVE <= gpu_bytes and (self.cache_tokens is None or self.cache_tokens > 0)


def make_plan(
    config: Config,
    world_size: int = 1,
    *,
    gpu_bytes: int = 80 * GB,
    shape: str | None = None,
    known: Known | None = None,
) -> Plan:
    """Predicts the memory of each rank of a run.

    gpu_bytes: memory of a device, of which vLLM takes its share. shape: see `model_shape`. known: what need not
    be found out again, added to. Raises ValueError for settings that no run could begin with, and what `model_shape`
    raises.
    """
    if world_size < 1:
        raise ValueError(f"--world-size {world_size}: expected 1 or more processes")
    sizes = Sizes(config, world_size, shape, known)
    return Plan(
        source=sizes.source,
        parameters=sizes.total,
        trained=sizes.trained,
        world_size=world_size,
        dtype=str(sizes.dtype).removeprefix("torch."),
        attention=sizes.attention,
        rows=sizes.rows,
        length=sizes.length,
        activations={"without": sizes.trace(False).kept, "with": sizes.trace(True).kept},
        phases=phases(sizes, gpu_bytes),
        host_bytes=host_bytes(sizes),
        cache_tokens=_cache_tokens(sizes, gpu_bytes),
    )


def _cache_tokens(sizes: Sizes, gpu_bytes: int) -> int | None:
    """vLLM keeps weights of 16 bits whole on every rank; the rest of its share is for keys and values."""
    if sizes.config.engine.name != "vllm":
        return None
    room = int(sizes.config.engine.memory * gpu_bytes) - 2 * sizes.total
    return max(0, room) // (len(sizes.block_sizes) * token_cache(sizes))


@dataclass(frozen=True, slots=True)
class Advice:
    """A change, and the peak with it."""

    change: str
    peak: int
    fits: bool


Change = tuple[str, Config, int]
"""What is changed, in words; the configuration and the number of processes with it."""


def advise(config: Config, world_size: int, *, gpu_bytes: int, shape: str | None, known: Known) -> list[Advice]:
    """Changes that lower the peak of a plan that does not fit, the least costly first, each alone and no further than
    needed; then, if none of them is enough, all that only cost time together, on more and more ranks."""
    found: list[Advice] = []
    options: dict[str, Any] = {"gpu_bytes": gpu_bytes, "shape": shape, "known": known}
    present = make_plan(config, world_size, **options)
    for steps in _changes(config, world_size, present.length):
        advice = None
        for change, changed, ranks in steps:
            plan = make_plan(changed, ranks, **options)
            advice = Advice(change, plan.peak, plan.fits(gpu_bytes))
            if advice.fits:
                break
        if advice is not None and (advice.fits or advice.peak < 0.98 * present.peak):
            found.append(advice)
    if any(advice.fits for advice in found):
        return found
    thrifty = _thrifty(config, present.length)
    for ranks in (world_size * 2**i for i in range(8)):
        plan = make_plan(thrifty, ranks, **options)
        if plan.fits(gpu_bytes):
            change = f"all of that but offloading, on {ranks} processes" if ranks > 1 else "all of that but offloading"
            return [*found, Advice(change, plan.peak, True)]
    return found


def _changes(config: Config, world_size: int, length: int) -> Iterator[list[Change]]:
    """Each a way, in steps."""
    model, parallel, sampling, engine = config.model, config.parallel, config.sampling, config.engine
    if not model.gradient_checkpointing:
        changed = replace(config, model=replace(model, gradient_checkpointing=True))
        yield [("model.gradient_checkpointing = true", changed, world_size)]
    yield [
        (
            f"batch.tokens_per_microbatch = {tokens}",
            replace(config, batch=replace(config.batch, tokens_per_microbatch=tokens)),
            world_size,
        )
        for tokens in _halves(config.batch.tokens_per_microbatch, length)
    ]
    if config.reference.kl_coefficient and not config.reference.offload:
        changed = replace(config, reference=replace(config.reference, offload=True))
        yield [("reference.offload = true", changed, world_size)]
    if not parallel.reshard_after_forward:
        changed = replace(config, parallel=replace(parallel, reshard_after_forward=True))
        yield [("parallel.reshard_after_forward = true", changed, world_size)]
    if engine.name == "hf":
        yield [
            (
                f"sampling.rollouts_per_batch = {rollouts}",
                replace(config, sampling=replace(sampling, rollouts_per_batch=rollouts)),
                world_size,
            )
            for rollouts in _halves(sampling.rollouts_per_batch, 1)
        ]
    if engine.name == "vllm":
        yield [
            (f"engine.memory = {share}", replace(config, engine=replace(engine, memory=share)), world_size)
            for share in (0.6, 0.4, 0.3, 0.2)
            if share < engine.memory
        ]
    whole = replace(config, parallel=replace(parallel, shard_ranks=None))
    yield [(f"{ranks} processes", whole, ranks) for ranks in (2 * world_size, 4 * world_size)]
    if not parallel.cpu_offload and not parallel.vocab_parallel_head:
        changed = replace(config, parallel=replace(parallel, cpu_offload=True))
        yield [("parallel.cpu_offload = true (slow)", changed, world_size)]


def _halves(number: int, least: int) -> list[int]:
    """The number halved again and again, as long as it is not below `least`."""
    found = []
    while number // 2 >= least:
        number //= 2
        found.append(number)
    return found


def _thrifty(config: Config, length: int) -> Config:
    """With everything that saves memory and costs time alone."""
    tokens = config.batch.tokens_per_microbatch
    return replace(
        config,
        model=replace(config.model, gradient_checkpointing=True),
        batch=replace(config.batch, tokens_per_microbatch=[tokens, *_halves(tokens, length)][-1]),
        parallel=replace(config.parallel, reshard_after_forward=True, shard_ranks=None),
        sampling=replace(config.sampling, rollouts_per_batch=min(8, config.sampling.rollouts_per_batch)),
        engine=replace(config.engine, memory=min(0.3, config.engine.memory)),
    )
