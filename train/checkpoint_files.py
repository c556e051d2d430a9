"""The files of a checkpoint: written so that they are there or not, and known again by their content.

The completion mark is written last and holds the size and the sha256 of every other file. Sizes tell a write that was
cut off; only the content tells a disk, a copy or a person that changed a byte.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

from entrocraft.train.durable_files import sync, write_text
from entrocraft.train.parallel import Ranks

STATE_FILE = "state.json"
_MARK = "COMPLETE.json"


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digests(folder: Path, names: Sequence[str], ranks: Ranks) -> dict[str, str]:
    """sha256 of files of a folder that all ranks see, each rank reading its share; "" for one that cannot be read."""
    own = {}
    for i in ranks.share(len(names)):
        try:
            own[names[i]] = _digest(folder / names[i])
        except OSError:
            own[names[i]] = ""
    return {name: digest for part in ranks.gather(own) for name, digest in part.items()}


def mark_whole(folder: Path, content: Mapping[str, str]) -> None:
    """Syncs all files of a folder, and writes the mark; `content` has the digest of each."""
    for name in content:
        sync(folder / name)
    sizes = {name: (folder / name).stat().st_size for name in content}
    write_text(folder / _MARK, json.dumps({"bytes": sizes, "sha256": dict(content)}, indent=1))
    sync(folder)


def is_whole(folder: Path) -> bool:
    """Whether the completion mark is there and every file has the size it had when the mark was written."""
    try:
        sizes = json.loads((folder / _MARK).read_text())["bytes"]
        return all((folder / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def damage(folder: Path, ranks: Ranks) -> str | None:
    """What is wrong with the content of a folder that looks whole, on all ranks; None when all is as it was written.

    Reads every byte, each rank its share of the files.
    """
    written: dict[str, str] | None = None
    if ranks.main:
        try:
            written = json.loads((folder / _MARK).read_text())["sha256"]
        except (OSError, ValueError, KeyError, TypeError):
            written = None
    written = ranks.from_main(written)
    if written is None:
        return "its completion mark cannot be read"
    found = digests(folder, sorted(written), ranks)
    changed = [name for name in sorted(written) if found[name] != written[name]]
    return f"the content of {', '.join(changed)} is not what was written" if changed else None


def os_error(error: BaseException) -> OSError | None:
    """The operating system's complaint behind what `torch.distributed.checkpoint` raises; None when there is none."""
    for each in _causes(error):
        if isinstance(each, OSError):
            return each
    return None


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        if isinstance(error, CheckpointException):
            for failure in error.failures.values():
                yield from _causes(failure[0])
        error = error.__cause__ or error.__context__


def in_host_memory(tensors: dict[str, Any]) -> dict[str, Any]:
    """A copy that training does not change."""
    pinned = torch.cuda.is_available()
    options = StagingOptions(
        use_pinned_memory=pinned, use_shared_memory=False, use_async_staging=False, use_non_blocking_copy=pinned
    )
    stager = DefaultStager(options)
    try:
        staged = stager.stage(tensors)
        assert isinstance(staged, dict), "staging was asked to wait"
        return staged
    finally:
        stager.close()


def value_of(name: str, row: Mapping[str, Any], *, evaluated: bool) -> float | None:
    """What the metric `name` (after a minus: its negative, so that less is better) was in a step; None where it was not
    measured.

    Raises ValueError when the step should have it: a name that is no metric.
    """
    plain = name.removeprefix("-")
    if plain in row:
        value = row[plain]
        return None if not isinstance(value, int | float) or value != value else -value if plain != name else value
    if evaluated or not plain.startswith("eval"):
        raise ValueError(
            f"checkpoint.best = {name!r}: a step has no such metric; it has {', '.join(sorted(row))}. Go on "
            "with --resume auto and one of these"
        )
    return None
