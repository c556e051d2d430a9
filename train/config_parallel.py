"""Settings of runs on several processes or in mixed precision: how the model is cut up, and in what it computes."""

from dataclasses import dataclass
from typing import Literal

from entrocraft.train.config_check import require


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """FSDP2. Under `torchrun` the parameters, gradients and optimizer are sharded over the processes."""

    param_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """What the model computes in. Master weights, gradient sums and optimizer are float32 always. `auto`: bfloat16 for
    a `model.path` on CUDA, else float32."""
    shard_ranks: int | None = None
    """Processes that share one copy of the model; gradients are summed over the copies (HSDP). Put the GPUs of a node
    here when there are many nodes. Empty: all processes share one."""
    reshard_after_forward: bool = True
    """Free a block's gathered weights after its forward pass and gather them again for the backward pass: less memory,
    more traffic."""
    cpu_offload: bool = False
    """Keep master weights, gradients and optimizer in host memory: much slower, for models that do not fit."""
    vocab_parallel_head: bool = False
    """Leave the LM head sharded over its vocabulary and send hidden states and six numbers a token instead of its
    weight and gradient. For untied heads; costs the product of every rank's tokens with a share of the vocabulary."""
    compile: str | None = None
    """Backend of torch.compile for each block, such as `inductor`; empty: off."""
    timeout_s: float = 1800.0
    """Seconds a process waits for the others before it ends with an error."""

    def __post_init__(self) -> None:
        require(
            self.shard_ranks is None or self.shard_ranks > 0,
            "parallel.shard_ranks",
            self.shard_ranks,
            "a positive number that divides the number of processes, or nothing",
        )
        require(self.timeout_s > 0, "parallel.timeout_s", self.timeout_s, "a number of seconds above 0")
