"""Real vLLM on the CPU. A run that skips something, or finds fewer tests than there are, fails."""

import copy
import os
import sys
from pathlib import Path

os.environ["TORCH_COMPILE_DISABLE"] = "1"  # vLLM compiles its sampler for 20 s otherwise; read when torch is imported
os.environ["VLLM_LOGGING_LEVEL"] = "ERROR"
os.environ["OMP_NUM_THREADS"] = "1"  # of the processes that tests start

import pytest
import torch

torch.set_num_threads(1)  # tensors this small only wait for a second thread
sys.path.insert(0, str(Path(__file__).parent))  # for vllm_kit

EXPECTED = 31


@pytest.fixture(scope="session")
def published():
    """A policy and an engine that has its weights, by kind of head: `published(tied=True)`."""
    from vllm_kit import make_engine, make_policy

    made = {}

    def get(*, tied):
        if tied not in made:
            policy = make_policy(tied=tied)
            made[tied] = policy, make_engine(policy), copy.deepcopy(policy.model.state_dict())
        policy, engine, weights = made[tied]
        policy.model.load_state_dict(weights)
        engine.publish(0)
        return policy, engine

    return get


def pytest_sessionfinish(session, exitstatus):
    """Fail a run of the whole folder that skipped a test or passed fewer than there should be."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    passed, skipped = (len(reporter.stats.get(name, [])) for name in ("passed", "skipped"))
    option = session.config.option
    whole = not option.keyword and all("::" not in word and not word.endswith(".py") for word in option.file_or_dir)
    if exitstatus == 0 and whole and (skipped or passed < EXPECTED):
        reporter.write_line(f"tests/vllm: {passed} passed and {skipped} skipped; expected {EXPECTED} and 0", red=True)
        session.exitstatus = 1
