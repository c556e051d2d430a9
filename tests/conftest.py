"""What every test stands on: nothing of the repository root on sys.path, nothing left of other tests, no network."""

import os
import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import hypothesis
import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent

# `python -m pytest` puts the root on sys.path, where kernels/ would pass for Hugging Face's package of that name.
sys.path[:] = [path for path in sys.path if Path(path or ".").resolve() != ROOT]

os.environ["HF_HUB_OFFLINE"] = "1"  # read when transformers is imported, which is later
os.environ["MPLBACKEND"] = "Agg"
os.environ["TOKENIZERS_PARALLELISM"] = "false"  # its threads and our forks do not mix

# Beside other test processes one thread each.
torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else min(2, os.cpu_count() or 1))

# torch notes the functions that a device bends at the first use of one as a context: before any is patched below.
with torch.device("meta"):
    assert torch.empty(0).is_meta

# Examples differ from run to run at a desk and are the same in continuous integration; slow machines are no failure.
hypothesis.settings.register_profile("entrocraft", deadline=None, derandomize="CI" in os.environ)
hypothesis.settings.load_profile("entrocraft")


# Half a minute and more each.
LONG = ("test_all_tests_of_the_op_under_the_interpreter", "test_sharding.py", "test_verify_resume.py", "_memory.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long tests first, or at the end one process works on one of them while the others have nothing left."""
    items.sort(key=lambda item: not any(name in item.nodeid for name in LONG))


@pytest.fixture(autouse=True)
def _seeds() -> None:
    """The same random numbers for a test whatever ran before it."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _modules_of_this_test(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Rewards that a test wrote and imported: the next may write others of the same name, and would be given these."""
    yield
    written = str(tmp_path_factory.getbasetemp()) + os.sep
    for (
        name,
        module,
    ) in sys.modules.copy().items():  # a copy in one piece: while tuples are made, a finaliser may import
        if str(getattr(module, "__file__", None)).startswith(written):
            del sys.modules[name]


@pytest.fixture(autouse=True)
def _poisoned_memory(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """In tests/kernels new memory holds NaN, so that an output which a kernel forgets to write cannot pass."""
    if ROOT / "tests" / "kernels" in request.path.parents:
        for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
            monkeypatch.setattr(owner, name, _poisoning(getattr(owner, name)))


def _poisoning(allocate: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def poisoned(*args: object, **kwargs: object) -> torch.Tensor:
        fresh = allocate(*args, **kwargs)
        with torch.no_grad():
            return fresh.fill_(float("nan")) if fresh.is_floating_point() else fresh

    return poisoned
