"""Rows of a data set, from wherever it is: a JSONL or parquet file, a folder of either, or the Hugging Face hub.

Each row comes with the place it stands at, so that whoever finds a mistake in it can say where. The packages that read
parquet and the hub are imported only for those.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_FILES = (".jsonl", ".json", ".parquet", ".csv", ".txt", ".gz", ".zst")
Rows = Iterator[tuple[str, dict[str, Any]]]


def rows(
    path: str | Path, columns: Sequence[str], *, split: str = "train", subset: str = "", revision: str = ""
) -> Rows:
    """Yield ("where", row) for each row. A row has at least those of `columns` that exist, and may have others.

    Raises:
        FileNotFoundError: there is no such file, nor could it be a data set of the hub.
        ValueError: a line or file that cannot be read (`file:line`), a split or data set that is not there, a package
            that is missing.
    """
    place = Path(path).expanduser()
    if place.is_file():
        return _parquet_rows(place, columns) if place.suffix == ".parquet" else _json_rows(place)
    if place.is_dir():
        if not any(file.suffix in _FILES for file in place.rglob("*")):
            raise FileNotFoundError(f"no data file at {place}: the folder holds none of {', '.join(_FILES)}")
        return _dataset_rows(str(place), columns, split, subset, revision)
    if _HUB_ID.fullmatch(str(path)) and place.suffix not in _FILES:
        return _dataset_rows(str(path), columns, split, subset, revision)
    raise FileNotFoundError(
        f"no data file at {place} (looked in {place.absolute().parent}); give the path of a JSONL or parquet file, or "
        "a data set of the hub as owner/name"
    )


def _json_rows(path: Path) -> Rows:
    with path.open("rb") as file:
        for number, raw in enumerate(file, start=1):
            if not raw.strip():
                continue
            where = f"{path}:{number}"
            try:
                row = json.loads(raw.decode("utf-8"))
            except UnicodeDecodeError as error:
                raise ValueError(f"{where}: not UTF-8 ({error.reason} at byte {error.start})") from error
            except json.JSONDecodeError as error:
                raise ValueError(f"{where}: not valid JSON: {error.msg} at column {error.colno}") from error
            if not isinstance(row, dict):
                raise ValueError(f"{where}: expected a JSON object, found {type(row).__name__}")
            yield where, row


def _parquet_rows(path: Path, columns: Sequence[str]) -> Rows:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise _missing(f"{path} is a parquet file", "pyarrow") from None
    try:
        file = parquet.ParquetFile(path)
    except pyarrow.ArrowException as error:
        raise ValueError(f"{path}: not a parquet file that can be read: {error}") from error
    with file:
        known = file.schema_arrow.names
        # All of them where one is missing, so that the complaint can name the nearest.
        wanted = list(dict.fromkeys(columns)) if set(columns) <= set(known) else known
        number = 0
        for batch in file.iter_batches(columns=wanted):
            for row in batch.to_pylist():
                yield f"{path}, row {number}", row
                number += 1


def _dataset_rows(path: str, columns: Sequence[str], split: str, subset: str, revision: str) -> Rows:
    try:
        import datasets
    except ImportError:
        raise _missing(f"{path} is a folder or a data set of the hub", "datasets") from None
    shown = datasets.utils.logging.is_progress_bar_enabled()
    datasets.utils.logging.disable_progress_bar()
    try:
        loaded = datasets.load_dataset(path, subset or None, split=split, revision=revision or None)
    except Exception as error:  # its own, the hub client's and the network's have no common kind
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise ValueError(
            f"{path} (split {split!r}{f', subset {subset!r}' if subset else ''}): neither a file nor a data set that "
            f"can be loaded: {reason[0]}"
        ) from error
    finally:
        if shown:
            datasets.utils.logging.enable_progress_bar()
    assert isinstance(loaded, datasets.Dataset), "a split was asked for"
    if set(columns) <= set(loaded.column_names):
        loaded = loaded.select_columns(list(dict.fromkeys(columns)))
    for number, row in enumerate(loaded):
        yield f"{path}, {split} row {number}", dict(row)


def _missing(what: str, package: str) -> ValueError:
    return ValueError(f"{what}, which needs the package `{package}`: pip install 'entrocraft[data]'")
