"""Options of the suite, the machine in every saved JSON, and its rates."""

from __future__ import annotations

import sys
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest
import torch

BENCH = Path(__file__).resolve().parent
WHO = ("contender", "name", "rule")  # parameters that say whose benchmark it is
sys.path[:] = [path for path in sys.path if Path(path or ".").resolve() != BENCH.parent]
if str(BENCH) not in sys.path:  # its files import each other by name
    sys.path.insert(0, str(BENCH))

from suite_cases import DATA, DTYPE, HEADS, JOBS  # noqa: E402
from suite_choice import check_rivals, positive  # noqa: E402
from suite_contest import machine_rates, room_for  # noqa: E402
from suite_journal import JOURNAL, group_info  # noqa: E402
from suite_machine import machine  # noqa: E402


def pytest_addoption(parser: pytest.Parser) -> None:
    """What to measure. The defaults are small, for a CPU."""
    group = parser.getgroup("entrocraft's benchmarks")
    group.addoption("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    group.addoption("--heads", nargs="+", choices=list(HEADS), default=["small"], help="named shapes (H, V)")
    group.addoption("--tokens", nargs="+", type=positive, default=[256], help="T; 16385 is a ragged one")
    group.addoption("--vocab", nargs="+", type=positive, default=[], help="V instead of the head's, for scaling")
    group.addoption("--jobs", nargs="+", choices=list(JOBS), default=list(JOBS))
    group.addoption("--data", nargs="+", choices=DATA, default=None, help="default: peaked; for `both` random too")
    group.addoption("--rivals", nargs="+", default=None, help="names; default: all")
    group.addoption("--bench-rounds", type=positive, default=5, help="timed rounds, interleaved; 30 on a GPU")


def pytest_configure(config: pytest.Config) -> None:
    """Rivals' warnings are their authors' affair, and a benchmark is no test of ours. The folder of a JSON is made, and
    the journal opened beside it.

    Raises:
        pytest.UsageError: a device that is not there, or a rival that nobody knows.
    """
    config.addinivalue_line("filterwarnings", "ignore")
    device = str(config.getoption("device"))
    if device == "cuda" and not torch.cuda.is_available():
        raise pytest.UsageError("--device cuda: torch sees no GPU here; leave it out, or use --device cpu")
    check_rivals(config.getoption("rivals") or [])
    target = config.getoption("benchmark_json", None)
    if target is None or config.getoption("collectonly"):
        return
    opened = not isinstance(target, (str, Path))  # older pytest-benchmark opens it itself
    path = Path(target.name if opened else target)
    path.parent.mkdir(parents=True, exist_ok=True)
    if not opened:
        path.unlink(missing_ok=True)  # what stands there is of another run
    JOURNAL.open(path, machine(device))


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """A whole report needs no journal beside it."""
    JOURNAL.close(whole=exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED))


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> Generator[None, object, object]:
    """Tells the journal whose group is measured, and skips a group whose operands do not fit."""
    callspec = getattr(pyfuncitem, "callspec", None)
    params = callspec.params if callspec else {}
    contender = params.get("contender", params.get("name", params.get("rule")))
    contender = getattr(contender, "name", contender)
    if contender is None:
        return (yield)
    JOURNAL.begin(pyfuncitem.name, contender, group_info(params))
    with room_for(pyfuncitem.name.rpartition(contender)[0]):
        return (yield)


@pytest.fixture(scope="session")
def rates(request: pytest.FixtureRequest) -> dict[tuple[int, ...], dict[str, float]]:
    """What this machine gives for a shape, measured once a session: `machine_rates`."""
    device: Any = request.config.getoption("device")

    class Rates(dict[tuple[int, ...], dict[str, float]]):
        def __missing__(self, shape: tuple[int, ...]) -> dict[str, float]:
            self[shape] = machine_rates(device, DTYPE, *shape)
            return self[shape]

    return Rates()


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    """Device, memory, commit and versions; no name of the host."""
    machine_info.pop("node", None)
    machine_info["entrocraft"] = machine(str(config.getoption("device")))


SKIPPED: pytest.StashKey[list[dict[str, str | None]]] = pytest.StashKey()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Remembers who was skipped and why, for the JSON; the group where there was one already."""
    report = yield
    if report.skipped and isinstance(report.longrepr, tuple):
        of: Any = item
        reason = report.longrepr[2].removeprefix("Skipped: ")
        given = getattr(of, "callspec", None)
        who = next((given.params[key] for key in WHO if key in given.params), None) if given else None
        rival = getattr(who, "name", who) or item.name
        group = getattr(getattr(of, "funcargs", {}).get("benchmark"), "group", None)
        reason = reason.removeprefix(f"{rival}: ").removeprefix(f"{rival} ")
        item.config.stash.setdefault(SKIPPED, []).append({"rival": rival, "group": group, "reason": reason})
    return report


def pytest_benchmark_update_json(config: pytest.Config, benchmarks: Any, output_json: dict[str, Any]) -> None:
    """Beside the benchmarks, each skip and its reason once."""
    found = config.stash.get(SKIPPED, [])
    output_json["skipped"] = [one for number, one in enumerate(found) if one not in found[:number]]


THREADS = torch.get_num_threads()  # OMP_NUM_THREADS says how many


@pytest.fixture(autouse=True)
def _same_threads() -> None:
    """As many threads for every benchmark: one that trains a model sets its own number."""
    torch.set_num_threads(THREADS)
