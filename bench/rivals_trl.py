"""TRL's chunked op as TRL's own trainers call it."""

from __future__ import annotations

import functools
import importlib.util
import re
from pathlib import Path
from typing import Any

from rivals import load
from torch import Tensor

NAME = "_CHUNKED_LOGPROB_CHUNK_SIZE"


@functools.cache
def trainers_chunk() -> int:
    """Columns of the vocabulary that TRL's trainers take at a time.

    Read from their source: importing them wants pandas, datasets and accelerate, which the op itself does without.

    Raises:
        ImportError: TRL is not installed, or has no constant of that name any more.
    """
    root = importlib.util.find_spec("trl")
    if root is None or not root.submodule_search_locations:
        raise ModuleNotFoundError("No module named 'trl'")
    file = Path(root.submodule_search_locations[0]) / "trainer" / "utils.py"
    found = re.search(rf"^{NAME} = ([\d_]+)", file.read_text(), re.MULTILINE) if file.is_file() else None
    if found is None:
        raise ImportError(f"trl.trainer.utils has no {NAME}, the vocabulary chunk of its trainers")
    return int(found[1])


def chunked_setting() -> str:
    """What `chunked_logprob` asks for, in words."""
    try:
        return f"ChunkedLogProbFunction, its trainers' vocabulary chunk of {trainers_chunk():,}"
    except ImportError:  # then the call raises it too
        return "ChunkedLogProbFunction, its trainers' vocabulary chunk"


def chunked_logprob(
    hidden_TH: Tensor, weight_VH: Tensor, target_T: Tensor, *, entropy: bool
) -> tuple[Tensor, Tensor | None]:
    """Log-probability of each target and, where wanted, the entropy of its row."""
    function: Any = load("trl.kernels:ChunkedLogProbFunction")
    outputs = ("entropy",) if entropy else ()
    found = function.apply(hidden_TH, weight_VH, None, target_T, 1.0, trainers_chunk(), None, 1.0, outputs)
    return found[0], found[1] if entropy else None
