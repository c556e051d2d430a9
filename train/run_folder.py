"""The folder of a run: whether a run may begin or go on there, and that one run alone writes into it."""

import fcntl
import time
from pathlib import Path

import yaml

from entrocraft.train.checkpoint import CheckpointFolder
from entrocraft.train.config import Config
from entrocraft.train.config_reader import differences, save_config, to_dict
from entrocraft.train.metrics import EVALUATIONS_FILE, EVENTS_FILE, METRICS_FILE, SAMPLES_FILE
from entrocraft.train.parallel import Ranks

# Settings that may change when a run goes on: they decide how long, how often, where, and with how much memory, not
# what a step computes beyond rounding. `sampling.rollouts_per_batch` is of the `hf` engine, which draws by prompt,
# however prompts are batched. Attention, layers, compilation and dtypes are not among them: they round in other ways.
_FREE_ON_RESUME = (
    *("run_dir", "resume", "checkpoint.", "self_check.", "evaluation.", "reward.workers", "mismatch.", "logging."),
    *("engine.url", "engine.connections", "engine.transfer", "engine.memory"),
    *("engine.start_timeout_s", "engine.publish_timeout_s", "engine.sample_timeout_s"),
    *("batch.tokens_per_microbatch", "model.gradient_checkpointing", "sampling.rollouts_per_batch"),
    *("reference.offload", "engine.sleep", "engine.eager"),
    *(f"parallel.{name}" for name in ("shard_ranks", "reshard_after_forward", "cpu_offload", "timeout_s")),
)


class RunFolder:
    """`run_dir`, as all ranks see it; rank 0 alone writes."""

    def __init__(self, config: Config, ranks: Ranks) -> None:
        self.config = config
        self.ranks = ranks
        self.dir = Path(config.run_dir)

    def refuse_or_compare(self, checkpoints: CheckpointFolder) -> None:
        """Raises ValueError where the folder holds a run that is not to be gone on with, or one of other settings."""
        whole = checkpoints.whole()
        metrics = self.dir / METRICS_FILE
        if self.config.resume == "never" and (whole or (metrics.exists() and metrics.stat().st_size)):
            held = whole[-1].name if whole else "no checkpoint yet, but metrics"
            raise ValueError(
                f"run_dir = {self.config.run_dir!r} already holds a run ({held}); go on with --resume auto, or choose "
                "another run_dir"
            )
        if not whole:
            return
        schedule = self.config.entropy.schedule
        free = _FREE_ON_RESUME
        method = self.config.loss.method
        stretches = schedule.steps is None and schedule.kind not in ("constant", "piecewise")
        if not (stretches or method == "flexible_clip" or ":" in method):
            free = (*free, "optimizer.steps")  # else it would stretch the curve, or the method's timetable
        old = yaml.safe_load((self.dir / "config.yaml").read_text())
        changed = [line for line in differences(old, to_dict(self.config)) if not line.startswith(free)]
        if changed:
            raise ValueError(
                f"cannot resume {self.config.run_dir!r} with other settings, the curves would not be of one run: "
                f"{'; '.join(changed)}. Restore them, or choose another run_dir"
            )

    def take(self, resumed: int | None, checkpoints: CheckpointFolder) -> None:
        """Takes the folder for this run, and writes the resolved configuration into it.

        A record without a checkpoint to go on from is set aside under another name, not written over. Raises ValueError
        when another run is training in this folder.
        """
        trouble = None
        if self.ranks.main:
            try:
                self._take(resumed, checkpoints)
            except ValueError as error:
                trouble = str(error)
        trouble = self.ranks.from_main(trouble)
        if trouble is not None:
            raise ValueError(trouble)

    def _take(self, resumed: int | None, checkpoints: CheckpointFolder) -> None:
        self.dir.mkdir(parents=True, exist_ok=True)
        self._lock = (self.dir / ".lock").open("w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"run_dir = {self.config.run_dir!r} is in use by another process; stop it, or choose another run_dir"
            ) from None
        checkpoints.tidy()
        metrics = self.dir / METRICS_FILE
        if resumed is None and metrics.exists() and metrics.stat().st_size:
            mark = time.strftime("before-%Y%m%d-%H%M%S")
            for name in (METRICS_FILE, EVENTS_FILE, EVALUATIONS_FILE, SAMPLES_FILE, "config.yaml"):
                if (self.dir / name).exists():
                    (self.dir / name).rename(self.dir / f"{name}.{mark}")
        aside = self.dir / "config.yaml.writing"
        save_config(self.config, aside)
        aside.replace(self.dir / "config.yaml")

    def release(self) -> None:
        """Lets go of the folder."""
        if self.ranks.main:
            self._lock.close()
