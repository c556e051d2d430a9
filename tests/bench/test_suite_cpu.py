"""The command that measures what documents quote: its parts run, its files are small, its tables find their places."""

import json
import subprocess

import pytest
import suite_cpu
from compare_head_cpu import NAMES
from suite_cpu import QUOTED, ROOT, commands, main, quote, scaling_sentence, slim

from entrocraft.train.bench_file import load_results
from entrocraft.train.bench_table import as_markdown

TABLE = "| T=1 V=2 | ms |\n|---|---|\n| entrocraft | 1 |\n\nMeasured on a machine; commit new."


def test_a_table_takes_the_place_of_the_older_one_and_nothing_else_changes():
    old = TABLE.replace("| 1 |", "| 7 |").replace("new", "old")
    other = TABLE.replace("T=1", "T=3")
    assert quote(f"Before.\n\n{other}\n\n{old}\n\nAfter.\n", TABLE, "a") == f"Before.\n\n{other}\n\n{TABLE}\n\nAfter.\n"
    with pytest.raises(ValueError, match="no table begins with 'T=1 V=2'"):
        quote("Nothing here. <!-- b -->", TABLE, "a")
    assert quote("Here:\n\n<!-- a -->\n", TABLE, "a") == f"Here:\n\n{TABLE}\n"
    noted = f"{TABLE}\n\n- entrocraft: defaults\n- trl: not measured, none there"
    assert quote(f"{old}\n\n- entrocraft: others\n- eager: bf16\n\nAfter.", noted, "a") == f"{noted}\n\nAfter."
    assert (
        quote(f"{old}\n\n- A list of the document's own.", noted, "a") == f"{noted}\n\n- A list of the document's own."
    )


def test_a_table_that_has_lost_a_contender_is_not_quoted(tmp_path, capsys, monkeypatch):
    older = TABLE.replace("| 1 |", "| 7 |\n| verl_torch | 9 |")
    with pytest.raises(ValueError, match="has lost verl_torch: measure where it is installed"):
        quote(older, TABLE, "a")
    assert quote(TABLE, older, "a") == older  # one more is no loss
    report = json.loads((ROOT / "bench/results/head_cpu.json").read_text())
    report["results"]["verl_torch"] = {"skipped": "verl is not installed"}
    (tmp_path / "bench").mkdir()
    for document in QUOTED["head_cpu"]:
        (tmp_path / document).parent.mkdir(exist_ok=True)
        (tmp_path / document).write_text((ROOT / document).read_text())
    monkeypatch.setattr(suite_cpu, "ROOT", tmp_path)

    def run(command):
        (tmp_path / "head_cpu.json").write_text(json.dumps(report))
        return subprocess.CompletedProcess(command, 0)

    assert main(["--out", str(tmp_path), "--only", "head_cpu"], run=run) == 1
    assert "head_cpu: not written into the documents: the new table has lost verl_torch" in capsys.readouterr().err
    for document in QUOTED["head_cpu"]:
        assert (tmp_path / document).read_text() == (ROOT / document).read_text()


def test_the_default_head_is_as_fast_as_eager_with_fp32_logits_and_takes_an_eighth_of_its_memory():
    """What is expected of it at T = 1,024 and V = 151,936."""
    rows = {row.rival: row for row in load_results(ROOT / "bench/results/head_cpu.json").rows}
    ours, eager = rows["entrocraft"], rows["eager_fp32"]
    assert (ours.info["T"], ours.info["V"]) == (1024, 151_936)
    assert ours.seconds <= eager.seconds
    assert ours.info["peak_bytes"] <= eager.info["peak_bytes"] / 8
    assert "eager_bf16" in rows


def test_what_the_document_says_of_small_sizes_is_what_was_measured():
    sentence = scaling_sentence(load_results(ROOT / "bench/results/scaling_cpu.json"))
    assert sentence in (ROOT / "docs/benchmarks.md").read_text(), sentence


@pytest.mark.parametrize("name", [name for name in QUOTED if (ROOT / f"bench/results/{name}.json").is_file()])
def test_documents_quote_the_committed_results(name):
    table = as_markdown(load_results(ROOT / f"bench/results/{name}.json"))
    for document in QUOTED[name]:
        text = (ROOT / document).read_text()
        assert quote(text, table, name) == text, f"{document}: run `python bench/suite_cpu.py --only {name}`"


def test_a_slim_report_says_nothing_of_paths_or_hosts():
    stats = {"min": 1.0, "max": 2.0, "median": 1.5, "stddev": 0.5, "rounds": 2, "data": [1.0, 2.0]}
    row = {"name": "a", "group": "g", "extra_info": {"rival": "a"}, "stats": stats, "fullname": "/somewhere/a"}
    report = {
        "machine_info": {"node": "host", "entrocraft": {"device": "d"}},
        "datetime": "now",
        "commit_info": {"b": 1},
        "skipped": [{"rival": "b", "group": None, "reason": "none there"}],
    }
    found = slim({**report, "benchmarks": [row]})
    assert set(found) == {"machine_info", "datetime", "benchmarks", "skipped"}
    assert found["skipped"] == [{"rival": "b", "group": None, "reason": "none there"}]
    assert found["machine_info"] == {"entrocraft": {"device": "d"}}
    assert set(found["benchmarks"][0]) == {"name", "group", "extra_info", "stats"}
    assert "data" not in found["benchmarks"][0]["stats"]


def test_a_part_that_fails_is_named_and_writes_nothing_down(tmp_path, capsys):
    class Failed:
        returncode = 3

    assert main(["--out", str(tmp_path)], run=lambda command: Failed) == 1
    said = capsys.readouterr().out
    assert [line.split(" (")[0] for line in said.splitlines()] == [
        f"{name}: exit status 3" for name in commands("", tmp_path, smallest=True)
    ]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_the_smallest_sizes_run_and_are_tables_and_a_figure(tmp_path):
    assert main(["--smallest", "--out", str(tmp_path), "--only", "head_cpu", "scaling_cpu"]) == 0
    assert {path.name for path in tmp_path.iterdir()} == {
        "head_cpu.json", "scaling_cpu.json", "scaling_cpu.md", "scaling_cpu.png",
    }  # fmt: skip
    saved = load_results(tmp_path / "head_cpu.json")
    assert {"entrocraft", "eager_fp32", "eager_bf16", "trl_chunked"} <= {row.rival for row in saved.rows}
    assert {row.rival for row in saved.rows} | {skip.rival for skip in saved.skipped} == set(NAMES)
    found = json.loads((tmp_path / "scaling_cpu.json").read_text())["benchmarks"]
    assert len({one["group"] for one in found}) == 4
    assert len(found) == 12
    assert "| entrocraft |" in (tmp_path / "scaling_cpu.md").read_text()
