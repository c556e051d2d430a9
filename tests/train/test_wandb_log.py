"""Weights & Biases, the real package, offline: what was logged is read back from the file that it writes."""

import json
import struct
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from wandb.proto import wandb_internal_pb2

from entrocraft.train.config_logging import LoggingConfig
from entrocraft.train.config_reader import load_config
from entrocraft.train.metrics import MetricsLog
from entrocraft.train.wandb_log import WandbLog


@pytest.fixture(autouse=True)
def _quiet(monkeypatch, tmp_path):
    for name, value in (
        ("WANDB_SILENT", "true"), ("WANDB_CACHE_DIR", str(tmp_path)), ("WANDB_CONFIG_DIR", str(tmp_path)),
        ("WANDB_DATA_DIR", str(tmp_path)), ("WANDB_DISABLE_GIT", "true"), ("WANDB_CONSOLE", "off"),
        ("WANDB__DISABLE_STATS", "true"),
    ):  # fmt: skip
        monkeypatch.setenv(name, value)
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)


def scanned(file: Path) -> Iterator[bytes]:
    """Records of W&B's own file, LevelDB's log after a header of seven bytes: blocks of 32 KiB, in which stand parts of
    checksum (4), length (2) and kind (1: whole, 2: first, 3: middle, 4: last)."""
    data, place, held = file.read_bytes(), 7, b""
    while place + 7 <= len(data):
        left = 32_768 - place % 32_768
        length, kind = struct.unpack("<HB", data[place + 4 : place + 7])
        if left < 7 or kind == 0:
            place += left
            continue
        held += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):
            yield held
            held = b""


def record_of(data: bytes) -> Any:
    return wandb_internal_pb2.Record.FromString(data)  # pyright: ignore[reportAttributeAccessIssue]


def whole(file: Path) -> list[Any]:
    """All records, once the last is there: W&B's own process writes a moment longer than `finish` waits."""
    begun = time.monotonic()
    while True:
        found = [record_of(data) for data in scanned(file)]
        if found and found[-1].WhichOneof("record_type") == "exit":
            return found
        assert time.monotonic() - begun < 60, "the run's last record is not there"
        time.sleep(0.1)


def records(folder: Path):
    """(rows by step, settings, ids) of all runs that the folder holds."""
    rows, settings, ids = {}, {}, set()
    for file in sorted(folder.glob("wandb/offline-run-*/*.wandb")):
        for record in whole(file):
            if record.WhichOneof("record_type") == "history":
                row = {(item.key or item.nested_key[0]): json.loads(item.value_json) for item in record.history.item}
                rows[row["_step"]] = row
            if record.WhichOneof("record_type") == "run":
                ids.add((record.run.run_id, record.run.project, record.run.display_name))
                settings |= {item.key: json.loads(item.value_json) for item in record.run.config.update}
    return rows, settings, ids


def test_offline_run_holds_the_metrics_and_goes_on_under_its_id(tmp_path):
    config = load_config(["--logging.wandb=offline", "--logging.wandb_project=curves"]).logging
    for resume, steps in ((None, (1, 2)), (2, (3,))):
        also = WandbLog(config, tmp_path, {"seed": 7, "optimizer": {"lr": 0.5}})
        with MetricsLog(tmp_path, resume_step=resume, also=[also]) as log:
            for step in steps:
                log.log(step, {"entropy": 1.0 / step, "reason": "kept 3", "gain": float("nan"), "tokens": 10 * step})
    rows, settings, ids = records(tmp_path)
    assert {step: (row["entropy"], row["tokens"]) for step, row in rows.items()} == {
        1: (1.0, 10), 2: (0.5, 20), 3: (1 / 3, 30),
    }  # fmt: skip
    assert all("reason" not in row and "gain" not in row for row in rows.values())
    assert (settings["seed"], settings["optimizer"]) == (7, {"lr": 0.5})
    own = (tmp_path / "wandb_id").read_text().strip()
    assert ids == {(own, "curves", tmp_path.name)}
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 3


def test_without_the_package_it_says_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ValueError, match=r"logging.wandb = 'offline'.*pip install 'entrocraft\[wandb\]'"):
        WandbLog(LoggingConfig(wandb="offline"), tmp_path, {})
