"""Metrics to Weights & Biases, when asked for. A run that goes on from a checkpoint goes on there too."""

import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from entrocraft.train.config_logging import LoggingConfig

ID_FILE = "wandb_id"


class WandbLog:
    """One run there. `log` and `close` as of `MetricsLog`, which passes on what it writes.

    Its id is kept in the run's folder, so that a resumed run continues its curves. Steps that are run again after a
    crash are not drawn twice: W&B keeps what it was told first, which is the same.

    Raises ValueError where wandb is not installed, and where it cannot begin, such as `online` without a login.
    """

    def __init__(self, config: LoggingConfig, run_dir: Path, settings: Mapping[str, Any]) -> None:
        assert config.wandb != "off", "made only when asked for"
        try:
            import wandb
        except ImportError as error:
            raise ValueError(
                f"logging.wandb = {config.wandb!r}: wandb cannot be imported ({error}); pip install 'entrocraft[wandb]'"
            ) from None
        try:
            self._run = wandb.init(
                project=config.wandb_project,
                entity=config.wandb_entity,
                name=config.wandb_name or run_dir.absolute().name,
                id=_own_id(run_dir),
                resume="allow" if config.wandb == "online" else None,
                dir=str(run_dir),
                mode=config.wandb,
                config=dict(settings),
            )
        except wandb.Error as error:
            raise ValueError(f"logging.wandb = {config.wandb!r}: {error}; use 'offline', or leave it 'off'") from error

    def log(self, step: int, row: Mapping[str, Any]) -> None:
        """The numbers of a step."""
        numbers = {name: value for name, value in row.items() if isinstance(value, int | float) and name != "step"}
        self._run.log(numbers, step=step)

    def close(self) -> None:
        """Waits until all is written, or sent."""
        self._run.finish()


def _own_id(run_dir: Path) -> str:
    place = run_dir / ID_FILE
    if not place.exists():
        place.write_text(uuid.uuid4().hex[:12] + "\n")
    return place.read_text().strip()
