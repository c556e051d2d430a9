"""Settings of where a run is recorded besides its own folder."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class LoggingConfig:
    """JSON lines and TensorBoard are always written; this is what comes on top."""

    report: bool = True
    """Write `report.html` and `curves.png` when the run ends; `entrocraft report RUN_DIR` does at any time."""
    wandb: Literal["off", "offline", "online"] = "off"
    """Weights & Biases. `offline` writes into `run_dir` what `wandb sync` sends later; `online` sends metrics and
    configuration while the run goes on, and needs a login."""
    wandb_project: str = "entrocraft"
    """Project there."""
    wandb_entity: str | None = None
    """Team or user there; empty: the default of the login."""
    wandb_name: str | None = None
    """Name of the run there; empty: that of the folder."""
