"""bench/ is no package: its files import each other by name."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

BENCH = Path(__file__).resolve().parents[2] / "bench"
if str(BENCH) not in sys.path:
    sys.path.insert(0, str(BENCH))


@pytest.fixture(scope="package", autouse=True)
def _no_test_process() -> Iterator[None]:
    """Benchmarks that a test starts are not shared out as it is: pytest-benchmark would time nothing."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("PYTEST_XDIST_WORKER", raising=False)
        yield
