"""What a run is about to do, in words: the table it begins with."""

from entrocraft.train.layers import description
from entrocraft.train.run import Run


def _processes(run: Run) -> str:
    size, shards = run.ranks.size, run.config.parallel.shard_ranks or run.ranks.size
    if size == 1:
        return "1 process"
    return f"{size} processes, " + (f"{size // shards} copies of the model" if shards < size else "one model")


def batch_table(run: Run) -> list[tuple[str, str]]:
    """What follows from the four batch numbers, in words."""
    batch, loss, steps = run.config.batch, run.config.loss, run.config.optimizer.steps
    epochs = steps * batch.prompts_per_step / len(run.problems)
    longest = run.config.sampling.max_response_tokens
    return [
        *description(run.policy.model, run.policy.dtype, liger=run.liger),
        (
            "rollouts a step",
            f"{batch.prompts_per_step} prompts x {batch.samples_per_prompt} = {batch.rollouts_per_step}",
        ),
        (
            "optimizer updates a step",
            f"{batch.updates_per_step} x {loss.passes} = {batch.updates_per_step * loss.passes}",
        ),
        ("rollouts an update", f"{batch.rollouts_per_update}"),
        ("response tokens a step", f"at most {batch.rollouts_per_step * longest:,}"),
        ("tokens a forward pass", f"at most {batch.tokens_per_microbatch:,} on each of {_processes(run)}"),
        (
            "steps",
            f"{steps}, {steps * batch.rollouts_per_step:,} training samples, {epochs:.1f} passes over the prompts",
        ),
        (
            "problems",
            f"{len(run.problems)} to train on ({run.data.train.dropped} dropped), "
            f"{sum(len(held.problems) for held in run.held_out)} held out "
            f"({sum(held.dropped for held in run.held_out)} dropped)",
        ),
    ]
