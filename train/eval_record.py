"""The file from which a stopped evaluation goes on: a line that says what is evaluated, then a line for each batch."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from entrocraft.train.config_reader import differences
from entrocraft.train.eval_statistics import Outcome
from entrocraft.train.metrics import SAMPLES_FILE, finite


class Record:
    """Outcomes of one set, on disk as soon as they are known. A context manager.

    Args:
        folder: where `<name>.jsonl` and `samples.jsonl` are.
        name: of the set.
        identity: what two halves of one evaluation must share, as JSON can hold it.
        again: set a file of another identity aside instead of refusing it.

    Raises ValueError (on entry) when the file holds results of another identity, saying what differs.
    """

    def __init__(self, folder: Path, name: str, identity: Mapping[str, Any], *, again: bool = False) -> None:
        self.path = folder / f"{name}.jsonl"
        self.samples = folder / SAMPLES_FILE
        self.name = name
        self.identity: dict[str, Any] = json.loads(json.dumps(identity))
        self.again = again
        self.outcomes: list[Outcome] = []
        """Those of the problems so far, in the set's order."""

    def __enter__(self) -> Record:
        batches = self._held()
        if batches is None:
            self._keep_samples(())
            batches = []
        # Whole batches alone: one that was cut off in the middle is drawn again, from its own random numbers.
        self.outcomes = [Outcome(**row) for batch in batches for row in batch]
        aside = self.path.with_name(self.path.name + ".partial")
        aside.write_text("".join(json.dumps(row) + "\n" for row in (self.identity, *batches)), encoding="utf-8")
        aside.replace(self.path)
        self._keep_samples({outcome.problem for outcome in self.outcomes})
        self._file = self.path.open("a", encoding="utf-8")
        return self

    def __exit__(self, *exception: object) -> None:
        self._file.close()

    def add(self, outcomes: Sequence[Outcome], samples: Sequence[Mapping[str, Any]]) -> None:
        """One batch: some responses as text, then, synced to disk, its outcomes."""
        with self.samples.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(finite({"set": self.name, **row}), ensure_ascii=False) + "\n" for row in samples)
        self._file.write(json.dumps([asdict(outcome) for outcome in outcomes]) + "\n")
        self._file.flush()
        os.fsync(self._file.fileno())
        self.outcomes += outcomes

    def _held(self) -> list[list[dict[str, Any]]] | None:
        """Batches of an earlier evaluation with this identity; None to start over."""
        if not self.path.is_file():
            return None
        lines = _whole_lines(self.path)
        if lines and isinstance(lines[0], dict):
            changed = differences(lines[0], self.identity)
            if not changed:
                return lines[1:]
            if not self.again:
                raise ValueError(
                    f"{self.path} holds results of other settings ({'; '.join(changed)}): restore them, give another "
                    "--out, or start over with --again"
                )
        self.path.rename(self.path.with_name(self.path.name + ".before"))
        return None

    def _keep_samples(self, problems: set[int] | tuple[()]) -> None:
        """Leaves of this set's samples those of `problems`."""
        if self.samples.is_file():
            rows = [r for r in _whole_lines(self.samples) if r.get("set") != self.name or r.get("problem") in problems]
            self.samples.write_text(
                "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8"
            )


def _whole_lines(path: Path) -> list[Any]:
    """The values of all lines up to the first that cannot be read: what came after a kill or a crash is drawn again."""
    values: list[Any] = []
    for line in path.read_bytes().splitlines(keepends=True):
        try:
            values.append(json.loads(line))
        except ValueError:
            break
        if not line.endswith(b"\n"):
            values.pop()
            break
    return values
