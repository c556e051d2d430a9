"""`entrocraft bench`: tables, comparison, Markdown and figures of saved results; documents quote what files hold."""

import json
import re
from pathlib import Path

import matplotlib.image
import pytest

from entrocraft.train.bench_figure import floor_bytes, series
from entrocraft.train.bench_file import load_results
from entrocraft.train.bench_table import as_markdown, baseline, cells, fits_h100, floors
from entrocraft.train.cli import main

ROOT = Path(__file__).parents[2]
CPU = ROOT / "bench" / "results" / "head_cpu.json"
STEP = ROOT / "bench" / "results" / "step_cpu.json"


def entry(rival: str, ms: float, **info):
    known = {"rival": rival, "head": "qwen3_4b", "T": 2048, "H": 2560, "V": 151936, "job": "both", "data": "peaked"}
    info = known | {"useful_products": 3, "gemm_tflops": 790.0, "moved_bytes": 10**9, "floor_ms": 6.05} | info
    return {"name": rival, "group": f"qwen3_4b T={info['T']}", "stats": {"median": ms / 1e3}, "extra_info": info}


@pytest.fixture
def saved(tmp_path):
    """Two sizes of two contenders on a GPU, as pytest-benchmark writes them."""
    benchmarks = [
        entry("entrocraft", 10, peak_bytes=2**28, errors={"logprob_mean": 3e-7}, repeats=True, share_of_gemm=0.8),
        entry("eager_bf16", 20, peak_bytes=79 * 10**9, errors={"logprob_mean": 2e-2}, repeats=False),
        entry("entrocraft", 40, T=8192, peak_bytes=2**28, floor_ms=24.2),
        entry("eager_bf16", 80, T=8192, peak_bytes=2**32, floor_ms=24.4),
    ]
    machine = {"device": "a GPU", "capability": "9.0", "commit": "abc", "versions": {"torch": "2.13.0"}}
    path = tmp_path / "head.json"
    path.write_text(json.dumps({"machine_info": {"entrocraft": machine}, "benchmarks": benchmarks}))
    return path


def test_a_table_has_the_fastest_first_and_leaves_empty_columns_out(saved, capsys):
    assert main(["bench", str(saved)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "a GPU; commit abc; torch 2.13.0"
    head = next(i for i, line in enumerate(lines) if line == "qwen3_4b T=2048")
    assert lines[head + 1].split("  ")[-1] == "same bits"
    assert "cold ms" not in lines[head + 1]
    assert lines[head + 2].split() == ["entrocraft", "10", "0.5", "256", "0.0034", "80%", "3.0e-07", "yes"]
    assert lines[head + 3].split() == ["eager_bf16", "20", "1", "75,340", "1", "2.0e-02", "no"]
    # 3 x 2 x 2048 x 2560 x 151936 operations at 790 TFLOP/s.
    below = "Floor: this machine 6.05 ms, H100 6.05 ms. Would fit into 80 GB: entrocraft. Would not: eager_bf16."
    assert lines[head + 4] == below


def test_floors_are_the_larger_of_operations_and_bytes(saved):
    results = load_results(saved)
    row = results.rows[0]
    assert floors(row, results.machine)["H100"] == pytest.approx(3e3 * 2 * 2048 * 2560 * 151936 / 790e12)
    row.info["useful_operations"] = 2 * 3 * 2 * 2048 * 2560 * 151936  # of a whole model, whose head is half of it
    assert floors(row, results.machine)["H100"] == pytest.approx(6e3 * 2 * 2048 * 2560 * 151936 / 790e12)
    row.info["moved_bytes"] = 10**11
    assert floors(row, results.machine)["H100"] == pytest.approx(1e14 / 3.35e12)
    assert "H100" not in floors(row, {"device": "cpu"})
    assert fits_h100(row) is True
    assert fits_h100(results.rows[1]) is False
    assert floor_bytes(row) == 4 * 2560 * (2048 + 151936)


def test_settings_are_printed_once_each(saved, tmp_path, capsys):
    report = json.loads(saved.read_text())
    for one in report["benchmarks"]:
        one["extra_info"]["settings"] = "chunks of 8,192" if one["extra_info"]["rival"] == "eager_bf16" else "defaults"
    path = tmp_path / "settings.json"
    path.write_text(json.dumps(report))
    for options in ((), ("--markdown",)):
        assert main(["bench", str(path), *options]) == 0
        assert capsys.readouterr().out.endswith("\n- entrocraft: defaults\n- eager_bf16: chunks of 8,192\n")


def test_errors_say_of_what_they_are(saved, tmp_path, capsys):
    report = json.loads(saved.read_text())
    errors = {"logprob_mean": 1e-6, "logprob_max": 2e-6, "entropy_mean": 3e-6, "entropy_max": 4e-6}
    errors |= {"hidden_grad": 5e-6, "weight_grad": 6e-6, "logits_grad": 7e-6, "loss": 8e-6, "grad_norm": 9e-6}
    info = {"rival": "entrocraft", "errors": errors, "loss": 0.5}
    report["benchmarks"] = [{"name": "a", "group": "g", "stats": {"median": 1.0}, "extra_info": info}]
    path = tmp_path / "errors.json"
    path.write_text(json.dumps(report))
    table = cells(load_results(path).rows)
    assert dict(zip(*table, strict=True)) == {
        "": "entrocraft", "ms": "1,000", "ratio": "1", "log p error": "1.0e-06", "log p max": "2.0e-06",
        "H error": "3.0e-06", "H max": "4.0e-06", "dX error": "5.0e-06", "dW error": "6.0e-06", "dZ error": "7.0e-06",
        "loss error": "8.0e-06", "norm error": "9.0e-06",
    }  # fmt: skip


def test_who_was_not_measured_is_told_with_the_reason(saved, tmp_path, capsys):
    report = json.loads(saved.read_text())
    report["skipped"] = [
        {"rival": "cce", "group": None, "reason": "it has no path on a CPU"},
        {"rival": "quack", "group": "qwen3_4b T=2048", "reason": "does not fit"},
    ]
    path = tmp_path / "skipped.json"
    path.write_text(json.dumps(report))
    for options in ((), ("--markdown",)):
        assert main(["bench", str(path), *options]) == 0
        assert capsys.readouterr().out.endswith(
            "\n- cce: not measured, it has no path on a CPU\n- quack: not measured (qwen3_4b T=2048), does not fit\n"
        )
    assert main(["bench", str(STEP)]) == 0
    assert "- trl_liger: not measured, Liger's kernels want a GPU" in capsys.readouterr().out


def test_a_comparison_of_the_head_has_errors_settings_and_reasons(tmp_path, capsys):
    ours = {"seconds": [2.0, 1.0, 4.0], "transient_bytes": 2**20, "errors": {"logprob_mean": 1e-6}, "settings": "small"}
    report = {"machine": {"device": "d"}, "size": {"T": 2}, "results": {"a": ours, "b": {"skipped": "not there"}}}
    path = tmp_path / "head.json"
    path.write_text(json.dumps(report))
    assert main(["bench", str(path), "--markdown"]) == 0
    said = capsys.readouterr().out
    assert "| T=2 | ms | ratio | MiB | ratio of MiB | log p error |\n" in said
    assert "| a | 2,000 | 1 | 1 | 1 | 1.0e-06 |\n" in said
    assert said.endswith("\n- a: small\n- b: not measured, not there\n")


def test_of_a_grid_of_sizes_the_largest_is_drawn(tmp_path):
    sizes = [(T, V) for T in (64, 512) for V in (4_096, 65_536)]
    benchmarks = [entry("entrocraft", T * V / 1e6, T=T, V=V) for T, V in sizes]
    path = tmp_path / "grid.json"
    path.write_text(json.dumps({"machine_info": {"entrocraft": {}}, "benchmarks": benchmarks}))
    panels = series([load_results(path)])
    assert {title for title, _ in panels} == {"both peaked, qwen3_4b V = 65,536", "both peaked, qwen3_4b T = 512"}
    drawn = [[(row.info["T"], row.info["V"]) for row in lines["entrocraft"]] for lines in panels.values()]
    assert sorted(drawn) == [[(64, 65_536), (512, 65_536)], [(512, 4_096), (512, 65_536)]]


def test_two_files_are_compared_where_they_have_something_in_common(saved, tmp_path, capsys):
    report = json.loads(saved.read_text())
    report["benchmarks"][0]["stats"]["median"] /= 4
    report["benchmarks"][0]["extra_info"]["peak_bytes"] *= 2
    report["benchmarks"].pop()
    after = tmp_path / "after.json"
    after.write_text(json.dumps(report))
    assert main(["bench", str(saved), str(after)]) == 0
    lines = [re.split(r"  +", line) for line in capsys.readouterr().out.splitlines()]
    assert ["qwen3_4b T=2048", "entrocraft", "10", "2.5", "0.25", "256", "512", "2"] in lines
    assert sum(line[0].startswith("qwen3_4b") for line in lines) == 3
    assert main(["bench", str(saved), str(CPU)]) == 2
    assert "have no benchmark in common" in capsys.readouterr().err


def test_markdown_and_figures_are_written(saved, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["bench", str(saved), "--out", str(out)]) == 0
    markdown = (out / "table.md").read_text()
    assert "| entrocraft | 10 | 0.5 | 256 |" in markdown
    assert sum(line.startswith("|---") for line in markdown.splitlines()) == 2
    picture = matplotlib.image.imread(out / "scaling.png")
    assert min(picture.shape[:2]) > 200
    assert picture[..., :3].std() > 0.05  # something is drawn
    panels = series([load_results(saved)])
    ((title, axis),) = panels
    assert (title, axis) == ("both peaked, qwen3_4b V = 151,936", "T")
    assert [row.info["T"] for row in panels[title, axis]["entrocraft"]] == [2048, 8192]


def test_one_size_alone_is_drawn_as_bars(tmp_path):
    assert main(["bench", str(CPU), "--out", str(tmp_path)]) == 0
    assert matplotlib.image.imread(tmp_path / "scaling.png")[..., :3].std() > 0.05


def test_what_one_file_has_alone_is_listed_and_other_machines_are_told(saved, tmp_path, capsys):
    report = json.loads(saved.read_text())
    report["benchmarks"][1]["extra_info"]["rival"] = "newcomer"
    report["machine_info"]["entrocraft"]["device"] = "another GPU"
    after = tmp_path / "after.json"
    after.write_text(json.dumps(report))
    assert main(["bench", str(saved), str(after)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[2] == "warning: different machines: device a GPU before, another GPU after: the ratios say little"
    assert lines[-2:] == ["only before: qwen3_4b T=2048: eager_bf16", "only after: qwen3_4b T=2048: newcomer"]
    assert main(["bench", str(saved), str(saved)]) == 0
    told = capsys.readouterr().out
    assert "warning" not in told
    assert "only" not in told


def test_a_comparison_is_markdown_where_that_is_asked_for(saved, tmp_path, capsys):
    assert main(["bench", str(saved), str(saved), "--markdown", "--out", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    assert "| qwen3_4b T=2048 | entrocraft | 10 | 10 | 1 | 256 | 256 | 1 |" in printed
    assert "|---|---|---|---|---|---|---|---|" in printed
    assert (tmp_path / "out" / "table.md").read_text().rstrip() == printed.partition(f"\n\n{tmp_path}")[0]


def test_the_best_micro_batch_and_the_largest_batch_have_columns(tmp_path, capsys):
    size = {"head": "small", "layers": 2, "rollouts": 16}
    results = {
        "entrocraft": {"seconds": 1.0, "peak_bytes": 1, "best_microbatch": 16, "largest_batch": 4096,
                       "seconds_range": [0.95, 1.25], "largest_batch_capped": True, "limit_gb": 4.0},
        "trl": {"seconds": 2.0, "peak_bytes": 2, "best_microbatch": 8, "largest_batch": 36, "limit_gb": 4.0},
        "trl_liger": {"reason": "no GPU"},
    }  # fmt: skip
    path = tmp_path / "step.json"
    path.write_text(json.dumps({"machine": {}, "size": size, "results": results}))
    assert main(["bench", str(path)]) == 0
    lines = [re.split(r"  +", line) for line in capsys.readouterr().out.splitlines()]
    assert lines[3][-2:] == ["micro-batch", "largest batch"]
    assert lines[4][-2:] == ["16", ">= 4,096 in 4 GB"]
    assert (lines[3][2], lines[4][2]) == ("range", "950 to 1,250")
    assert lines[5][-2:] == ["8", "36 in 4 GB"]


ROW = '{"name": "a", "stats": {"median": 1}, "extra_info": {}}'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not JSON"),
        ("{}", "holds no benchmark"),
        ('{"benchmarks": []}', "holds no benchmark"),
        ('{"benchmarks": 3}', "benchmarks is 3, expected a list"),
        ('{"benchmarks": [{}]}', "benchmarks[0]: stats is nothing, expected an object"),
        ('{"benchmarks": [' + ROW + ', {"stats": {}}]}', "benchmarks[1]: stats: median is nothing, expected a number"),
        ('{"benchmarks": [{"stats": {"median": "1"}}]}', 'benchmarks[0]: stats: median is "1", expected a number'),
        ('{"benchmarks": [{"extra_info": 1}]}', "benchmarks[0]: extra_info is 1, expected an object"),
        ('{"benchmarks": [' + ROW + '], "machine_info": []}', "machine_info is [], expected an object"),
        ('{"size": {}, "results": [1]}', "results is [1], expected an object"),
        ('{"size": {}, "results": {"a": {"seconds": []}}}', "results: a: seconds is [], expected those of a round"),
        ('{"size": {}, "results": {"a": {"seconds": "x"}}}', 'results: a: seconds is "x", expected a number'),
        ("\x80", "is no text"),
    ],
)
def test_a_file_without_benchmarks_is_an_error_with_a_way_out(text, message, tmp_path, capsys):
    path = tmp_path / "x.json"
    path.write_bytes(text.encode("latin-1"))
    assert main(["bench", str(path)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {path}")
    assert message in line
    assert "pytest bench --benchmark-json=FILE" in line


def test_a_folder_or_nothing_is_an_error_with_a_way_out(tmp_path, capsys):
    for path, message in ((tmp_path, "is a folder"), (tmp_path / "absent.json", "does not exist")):
        assert main(["bench", str(path)]) == 2
        assert f"error: {path} {message}; expected a file written by" in capsys.readouterr().err


def test_results_without_a_machine_are_printed(tmp_path, capsys):
    path = tmp_path / "x.json"
    path.write_text('{"size": {"T": 8}, "results": {"entrocraft": {"seconds": [0.5, 0.25, 1.0]}}}')
    assert main(["bench", str(path)]) == 0
    printed = capsys.readouterr().out
    assert "an unknown device; commit unknown; versions unknown" in printed
    assert "entrocraft  500" in printed


def test_ratios_are_of_eager_and_of_the_first_without_it():
    rows = load_results(CPU).rows
    assert baseline(rows).rival == "eager_fp32"
    assert baseline(rows[:2]).rival == "entrocraft"
    assert {line[0]: line[2] for line in cells(rows)[1:]}["eager_fp32"] == "1"


def test_the_table_of_the_readme_is_what_was_measured():
    table = as_markdown(load_results(CPU))
    for document in ("README.md", "docs/benchmarks.md", "kernels/README.md"):
        command = "entrocraft bench bench/results/head_cpu.json --markdown"
        text = (ROOT / document).read_text()
        assert command in text
        assert table in text, f"put what `{command}` prints into {document}:\n{table}"
