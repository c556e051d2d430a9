import json
import math
import os
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from entrocraft.train.metrics import MetricsLog, depends_on_the_clock, read_events, read_metrics, read_samples


def scalars(run_dir, tag: str) -> list[tuple[int, float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run_dir / "tensorboard"))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(tag)]


def test_values_of_every_kind_are_read_back(tmp_path):
    values = {
        "entropy": 0.1 + 0.2,
        "samples": 256,
        "count": np.int64(3),
        "mean": np.float32(0.5),
        "loss": torch.tensor(-0.25),
        "bypassed": True,
        "nan": math.nan,
        "inf": torch.tensor(-math.inf),
        "reason": 'entropy > "band"',
        "nothing": None,
    }
    with MetricsLog(tmp_path, resume_step=None) as log:
        log.log(1, values)
    (row,) = read_metrics(tmp_path)
    assert row == {
        "step": 1,
        "entropy": 0.1 + 0.2,
        "samples": 256,
        "count": 3,
        "mean": 0.5,
        "loss": -0.25,
        "bypassed": 1,
        "nan": None,
        "inf": None,
        "reason": 'entropy > "band"',
        "nothing": None,
    }
    assert "NaN" not in (tmp_path / "metrics.jsonl").read_text()


def test_lines_are_on_disk_before_the_log_is_closed(tmp_path):
    log = MetricsLog(tmp_path, resume_step=None)
    for step in (1, 2):
        log.log(step, {"entropy": float(step)})
        assert [row["entropy"] for row in read_metrics(tmp_path)] == [1.0, 2.0][:step]
    log.event("step_skipped", step=2, why="loss is NaN")
    assert read_events(tmp_path) == [{"kind": "step_skipped", "step": 2, "why": "loss is NaN"}]
    log.close()
    log.close()


def test_tensorboard_has_the_numbers_by_step(tmp_path):
    with MetricsLog(tmp_path, resume_step=None) as log:
        for step in (1, 2, 3):
            log.log(step, {"entropy": 0.5 * step, "eval_accuracy": math.nan if step < 3 else 0.75, "reason": "x"})
    assert scalars(tmp_path, "entropy") == [(1, 0.5), (2, 1.0), (3, 1.5)]
    assert scalars(tmp_path, "eval/accuracy") == [(3, 0.75)]


def run_to(path, last: int, resume_step: int | None, offset: float = 0.0) -> None:
    with MetricsLog(path, resume_step=resume_step) as log:
        for step in range((resume_step or 0) + 1, last + 1):
            log.log(step, {"entropy": step + offset})
            log.event("seen", step=step, offset=offset)


@pytest.mark.parametrize("torn", [b"", b'{"step": 6, "entro', b'{"step": 6}', b"\xff\xfe", b"5"])
def test_resume_cuts_off_later_steps_and_a_torn_line(tmp_path, torn):
    run_to(tmp_path, last=5, resume_step=None)
    for name in ("metrics.jsonl", "events.jsonl"):
        with (tmp_path / name).open("ab") as file:
            file.write(torn)
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2, 3, 4, 5]
    run_to(tmp_path, last=6, resume_step=3, offset=0.5)
    assert [row["entropy"] for row in read_metrics(tmp_path)] == [1, 2, 3, 4.5, 5.5, 6.5]
    assert [(row["step"], row["offset"]) for row in read_events(tmp_path)] == [
        *((step, 0.0) for step in (1, 2, 3)),
        *((step, 0.5) for step in (4, 5, 6)),
    ]


def test_tensorboard_shows_the_steps_of_the_resumed_run(tmp_path):
    run_to(tmp_path, last=5, resume_step=None)
    time.sleep(1.0)  # TensorBoard reads its files in the order of their names, which tell seconds
    run_to(tmp_path, last=6, resume_step=3, offset=0.5)
    assert scalars(tmp_path, "entropy") == [(1, 1), (2, 2), (3, 3), (4, 4.5), (5, 5.5), (6, 6.5)]


def test_kept_lines_stay_as_they_were_to_the_byte(tmp_path):
    run_to(tmp_path, last=4, resume_step=None, offset=1 / 3)
    before = (tmp_path / "metrics.jsonl").read_bytes()
    MetricsLog(tmp_path, resume_step=4).close()
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


def test_resume_at_zero_starts_over_and_without_files_is_fine(tmp_path):
    run_to(tmp_path, last=2, resume_step=0)
    run_to(tmp_path, last=1, resume_step=0, offset=0.5)
    assert read_metrics(tmp_path) == [{"step": 1, "entropy": 1.5}]


def test_a_new_run_does_not_mix_with_an_old_one(tmp_path):
    run_to(tmp_path, last=1, resume_step=None)
    with pytest.raises(ValueError, match="holds the metrics of an earlier run; resume it, choose another"):
        MetricsLog(tmp_path, resume_step=None)
    with pytest.raises(ValueError, match="resume_step=-1"):
        MetricsLog(tmp_path, resume_step=-1)
    assert read_metrics(tmp_path) == [{"step": 1, "entropy": 1.0}]


def test_a_broken_line_in_the_middle_is_named_and_nothing_is_lost(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2\n{"step": 3}\n')
    for read in (lambda: read_metrics(tmp_path), lambda: MetricsLog(tmp_path, resume_step=2)):
        with pytest.raises(ValueError, match=r"metrics\.jsonl:2: not valid JSON"):
            read()
    assert path.read_text().count("\n") == 3


def test_missing_run_and_run_without_events(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no metrics\.jsonl"):
        read_metrics(tmp_path)
    assert read_events(tmp_path) == []


def test_bad_steps_and_values_are_refused(tmp_path):
    with MetricsLog(tmp_path, resume_step=None) as log:
        log.log(1, {"entropy": 1.0})
        with pytest.raises(ValueError, match="step=1 must be above the last one recorded, 1"):
            log.log(1, {"entropy": 2.0})
        with pytest.raises(ValueError, match=r"metric 'length' is .*expected a number"):
            log.log(2, {"length": torch.zeros(3)})
        log.log(2, {"entropy": 3.0})
    assert [row["entropy"] for row in read_metrics(tmp_path)] == [1.0, 3.0]
    assert json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[0]) == {"step": 1, "entropy": 1.0}


def test_rows_beside_the_metrics_are_plain_and_cut_with_them(tmp_path):
    with MetricsLog(tmp_path, resume_step=None) as log:
        log.rows("samples.jsonl", [])
        assert not (tmp_path / "samples.jsonl").exists()
        log.rows("samples.jsonl", [{"step": 1, "reward": math.nan, "scores": {"a": math.inf}, "response": "\ud800é"}])
        log.rows("samples.jsonl", [{"step": step, "reward": 1.0} for step in (2, 3)])
    assert read_samples(tmp_path)[0] == {"step": 1, "reward": None, "scores": {"a": None}, "response": "?é"}
    MetricsLog(tmp_path, resume_step=2).close()
    assert [row["step"] for row in read_samples(tmp_path)] == [1, 2]
    assert read_samples(tmp_path / "elsewhere") == []


def test_sync_waits_for_every_file_of_the_record(tmp_path, monkeypatch):
    synced, fsync = [], os.fsync

    def watched(descriptor):
        synced.append(Path(f"/proc/self/fd/{descriptor}").resolve().name)
        fsync(descriptor)

    with MetricsLog(tmp_path, resume_step=None) as log:
        log.log(1, {"entropy": 2.0})
        log.rows("samples.jsonl", [{"step": 1, "text": "a"}])
        monkeypatch.setattr(os, "fsync", watched)
        log.sync()
    assert set(synced) == {"metrics.jsonl", "events.jsonl", "samples.jsonl", tmp_path.name}


def test_what_depends_on_the_clock():
    clocks = (
        "seconds",
        "seconds_update",
        "publish_seconds",
        "tokens_per_second",
        "mfu_update",
        "tflops_update",
        "memory",
    )
    assert all(map(depends_on_the_clock, clocks))
    assert not any(map(depends_on_the_clock, ("entropy", "eval_reward", "publish_mib", "samples")))
