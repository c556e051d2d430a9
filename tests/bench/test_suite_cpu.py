"""The command that measures what documents quote: its parts run, its files are small, its tables find their places."""

import json

import pytest
from suite_cpu import QUOTED, ROOT, commands, main, quote, slim

from entrocraft.train.bench_table import as_markdown, load_results

TABLE = "| T=1 V=2 | ms |\n|---|---|\n| entrocraft | 1 |\n\nMeasured on a machine; commit new."


def test_a_table_takes_the_place_of_the_older_one_and_nothing_else_changes():
    old = TABLE.replace("| 1 |", "| 7 |\n| gone | 9 |").replace("new", "old")
    other = TABLE.replace("T=1", "T=3")
    assert quote(f"Before.\n\n{other}\n\n{old}\n\nAfter.\n", TABLE, "a") == f"Before.\n\n{other}\n\n{TABLE}\n\nAfter.\n"
    with pytest.raises(ValueError, match="no table begins with 'T=1 V=2'"):
        quote("Nothing here. <!-- b -->", TABLE, "a")
    assert quote("Here:\n\n<!-- a -->\n", TABLE, "a") == f"Here:\n\n{TABLE}\n"


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
    }
    found = slim({**report, "benchmarks": [row]})
    assert set(found) == {"machine_info", "datetime", "benchmarks"}
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
    rivals = {row.rival for row in load_results(tmp_path / "head_cpu.json").rows}
    assert {"entrocraft", "eager_fp32", "eager_bf16", "trl_chunked"} <= rivals
    found = json.loads((tmp_path / "scaling_cpu.json").read_text())["benchmarks"]
    assert len({one["group"] for one in found}) == 4
    assert len(found) == 12
    assert "| entrocraft |" in (tmp_path / "scaling_cpu.md").read_text()
