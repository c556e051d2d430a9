import base64
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from entrocraft.train.metrics import MetricsLog
from entrocraft.train.report import compare_runs, summarise, write_report


class Page(HTMLParser):
    """Tables and numbers of a written page, read back."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tables: dict[str, list[list[str]]] = {}
        self.sources: list[str] = []
        self.links: list[str] = []
        self.texts: dict[str, str] = {}
        self._table: list[list[str]] | None = None
        self._id: str | None = None
        self._cell = False
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        found = dict(attrs)
        if tag == "table":
            self._table = self.tables.setdefault(found["id"] or "", [])
        elif tag == "tr" and self._table is not None:
            self._table.append([])
        elif tag in ("td", "th") and self._table is not None:
            self._table[-1].append("")
            self._cell = True
        elif tag == "img":
            self.sources.append(found["src"] or "")
        elif tag in ("link", "script", "iframe", "a"):
            self.links.append(tag)
        elif found.get("id"):
            self._id = found["id"]
            self.texts[found["id"] or ""] = ""

    def handle_endtag(self, tag):
        if tag == "table":
            self._table = None
        self._cell = False if tag in ("td", "th") else self._cell
        self._id = None if tag in ("pre", "p") else self._id

    def handle_data(self, data):
        if self._cell and self._table is not None:
            self._table[-1][-1] += " ".join(data.split())
        elif self._id:
            self.texts[self._id] += data


def rows_of(steps: int = 30, gap: float = 0.04) -> list[dict]:
    """Entropy is `gap` above its target after the first third, and 1 nat above before."""
    return [
        {
            "step": step,
            "samples": 64 * step,
            "entropy": 1.0 - 0.02 * step + (1.0 if step <= steps // 3 else gap),
            "target": 1.0 - 0.02 * step,
            "band_low": 0.95 - 0.02 * step,
            "band_high": 1.05 - 0.02 * step,
            "reward": 0.5 if step <= 27 else 0.75,
            "kept_fraction": 0.5 if step % 2 else 1.0,
            "bypassed": float(step == 4),
            "realised_change": None if step == 1 else -0.02,
            "predicted_change": -0.015,
            "reward_timeouts": 1.0 if step == 5 else 0.0,
            "seconds": 0.25,
            "reason": f"step {step}: above the band by <{gap}>",
        }
        | ({"eval_accuracy": step / 100, "eval_pass_at_8": 0.9} if step % 10 == 0 else {})
        for step in range(1, steps + 1)
    ]


def write_run(path: Path, rows: list[dict], *, events: bool = True) -> Path:
    with MetricsLog(path, resume_step=None) as log:
        for row in rows:
            log.log(row["step"], row)
        if events:
            log.event("step_skipped", step=3, why="loss is <nan>")
            log.event("step_skipped", step=9, why="loss is inf")
            log.event("prompts_dropped", count=17)
    (path / "config.yaml").write_text("entropy:\n  rule: budget  # <&>\n")
    return path


def test_summary_is_what_the_rows_say():
    summary = summarise(rows_of())
    expected = {
        "steps": 30,
        "training samples": 64 * 30,
        "tracking error (nats)": 0.04,
        "entropy at the start": 1.98,
        "entropy at the end": 1.0 - 0.02 * 29 + 0.04,
        "target at the end": 1.0 - 0.02 * 29,
        "reward at the end": 0.75,
        "accuracy (last)": 0.3,
        "pass at 8 (last)": 0.9,
        "kept fraction (mean)": 0.75,
        "steps bypassed": 1,
        "reward time-outs": 1,
        "seconds": 7.5,
    }
    assert summary == pytest.approx(expected, rel=0, abs=1e-12)


def test_summary_of_a_run_that_knows_only_its_step():
    assert summarise([{"step": 4}]) == {"steps": 4.0}
    assert summarise([{"step": 1, "entropy": None, "target": 0.5}]) == {"steps": 1.0, "target at the end": 0.5}


def test_report_holds_the_numbers_of_the_run(tmp_path):
    rows = rows_of()
    path = write_report(write_run(tmp_path / "my run", rows))
    page = Page(path)
    metrics = {row[0]: row[1:] for row in page.tables["metrics"][1:]}
    assert set(metrics) == set(rows[0]) - {"step", "reason"} | {"eval_accuracy", "eval_pass_at_8"}
    # first, last, mean of the last tenth, lowest, highest
    assert metrics["reward"] == ["0.5", "0.75", "0.75", "0.5", "0.75"]
    assert metrics["entropy"] == ["1.98", "0.44", "0.46", "0.44", "1.98"]
    assert metrics["samples"] == ["64", "1 920", "1 856", "64", "1 920"]
    assert page.tables["evaluations"] == [
        ["step", "accuracy", "pass at 8"],
        ["10", "0.1", "0.9"],
        ["20", "0.2", "0.9"],
        ["30", "0.3", "0.9"],
    ]
    decisions = page.tables["decisions"]
    assert [row[0] for row in decisions[1:4]] == ["30", "29", "28"]
    assert decisions[1][1:4] == ["0.44", "0.4", "1"]
    assert decisions[1][4].startswith("step 30: above the band by <0.04>")
    assert page.texts["event-counts"].strip() == "step_skipped: 2; prompts_dropped: 1"
    assert [row[0] for row in page.tables["events"][1:]] == ["prompts_dropped", "step_skipped", "step_skipped"]
    assert page.tables["events"][3][1] == "step = 3, why = loss is <nan>"
    assert page.texts["config"] == "entropy:\n  rule: budget  # <&>\n"
    assert "tracking error (nats)" in path.read_text()


def test_report_needs_nothing_but_itself(tmp_path):
    run = write_run(tmp_path / "run", rows_of())
    page = Page(write_report(run))
    assert page.links == []
    (source,) = page.sources
    kind, _, data = source.partition("base64,")
    assert kind == "data:image/png;"
    assert base64.b64decode(data) == (run / "curves.png").read_bytes()
    assert not re.search(r"https?://", (run / "report.html").read_text())


def test_report_of_a_bare_run(tmp_path):
    with MetricsLog(tmp_path, resume_step=None) as log:
        log.log(1, {"entropy": 0.5})
    path = write_report(tmp_path)
    page = Page(path)
    assert page.tables["metrics"][1] == ["entropy", "0.5", "0.5", "0.5", "0.5", "0.5"]
    assert "decisions" not in page.tables
    assert "no step was skipped" in path.read_text()
    assert "holds no config.yaml" in path.read_text()


def test_runs_are_compared_side_by_side(tmp_path):
    arms = {"none": 0.9, "budget": 0.01}
    folders = [write_run(tmp_path / name, rows_of(gap=gap)) for name, gap in arms.items()]
    path = compare_runs(folders, tmp_path / "new" / "out")
    page = Page(path)
    table = page.tables["comparison"]
    assert table[0] == ["", "none", "budget"]
    values = {row[0]: row[1:] for row in table[1:]}
    assert values["tracking error (nats)"] == ["0.9", "0.01"]
    assert values["training samples"] == ["1 920", "1 920"]
    assert page.links == []
    assert base64.b64decode(page.sources[0].partition("base64,")[2]) == (path.parent / "compare.png").read_bytes()


def test_runs_of_the_same_name_are_told_apart_and_missing_numbers_are_dashes(tmp_path):
    write_run(tmp_path / "a" / "run", rows_of())
    write_run(tmp_path / "b" / "run", [{"step": 1, "entropy": 0.5}])
    table = Page(compare_runs([tmp_path / "a" / "run", tmp_path / "b" / "run"], tmp_path)).tables["comparison"]
    assert table[0] == ["", "a/run", "b/run"]
    values = {row[0]: row[1:] for row in table[1:]}
    assert values["training samples"] == ["1 920", "-"]


def test_what_is_not_a_run_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no such folder"):
        write_report(tmp_path / "absent")
    with pytest.raises(FileNotFoundError, match=r"no metrics\.jsonl"):
        write_report(tmp_path)
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 1})[:5])
    with pytest.raises(ValueError, match="has no finished step yet"):
        write_report(tmp_path)
    run = write_run(tmp_path / "run", rows_of(steps=3))
    with pytest.raises(ValueError, match="at least two runs"):
        compare_runs([run], tmp_path)
    with pytest.raises(ValueError, match="names a folder twice"):
        compare_runs([run, tmp_path / "run"], tmp_path)
    with pytest.raises(FileNotFoundError, match="no such folder"):
        compare_runs([run, tmp_path / "absent"], tmp_path)
