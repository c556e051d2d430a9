"""The head against every rival: speed, memory and error, of every job, on peaked and random data.

    pytest bench/bench_linear_logprob.py                                             # small, anywhere
    pytest bench/bench_linear_logprob.py --heads qwen3_4b gpt_oss --tokens 2048 16385 --bench-rounds 30   # a GPU

All contenders of a job share their operands. Each is checked against fp64 on a slice before anything is timed; rounds
are interleaved, so that what slows the machine down slows all. `extra_info` in the JSON has what the columns of the
table do not: errors, memory, rates, bits. `entrocraft bench FILE.json` prints it.
"""

from __future__ import annotations

import functools
import itertools
import statistics
from typing import Any

import pytest
from rivals import ALWAYS, Rival, all_rivals, run
from suite_cases import JOBS, Job, Shape, make_operands, shapes
from suite_choice import chosen, nobody
from suite_contest import CLOCK, Contender, Measured, compete, record
from suite_errors import Truth, bounds
from suite_rates import Work, derived


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A benchmark for each head, T, job, kind of data and contender that does the job; one that was named and does not
    do it is skipped with its reason."""
    config: Any = metafunc.config
    if "contender" not in metafunc.fixturenames:
        return
    rivals = {rival.name: rival for rival in all_rivals()}
    named, cases = config.getoption("rivals") is not None, []
    for head, shape in shapes(*map(config.getoption, ("heads", "tokens", "vocab"))):
        for job_name in config.getoption("jobs"):
            kinds = config.getoption("data") or ("peaked", *(["random"] if job_name == "both" else []))
            for data, name in itertools.product(kinds, chosen(config, rivals)):
                reason = rivals[name].declines(job_name, JOBS[job_name])
                marks = [] if reason is None else [pytest.mark.skip(reason=f"{name} {reason}")]
                if reason is None or named:
                    test = f"{head}-T{shape.T}-V{shape.V}-{job_name}-{data}-{name}"
                    cases.append(pytest.param(head, shape, job_name, data, rivals[name], id=test, marks=marks))
    arguments = ("head", "shape", "job_name", "data", "contender")
    metafunc.parametrize(arguments, cases or [nobody(config, len(arguments), rivals)])


@pytest.mark.benchmark(timer=CLOCK)
def bench_linear_logprob(
    request: pytest.FixtureRequest, benchmark: Any, rates: Any,
    head: str, shape: Shape, job_name: str, data: str, contender: Rival,
) -> None:  # fmt: skip
    """One contender's rounds, measured beside all others of its group."""
    config: Any = request.config
    device = config.getoption("device")
    reason = contender.why_not(shape, device)
    if reason is not None:
        (pytest.fail if device == "cpu" and contender.name in ALWAYS else pytest.skip)(f"{contender.name}: {reason}")
    wanted = config.getoption("rivals")
    rounds = 1 if benchmark.disabled else config.getoption("bench_rounds")
    names = tuple(wanted) if wanted else None
    found = group(shape, job_name, data, device, names, rounds)[contender.name]
    benchmark.group = f"{head} T={shape.T} V={shape.V} {job_name} {data}"
    info = {"head": head, **shape._asdict(), "job": job_name, "data": data}
    if isinstance(found, Measured):
        job = JOBS[job_name]
        work = Work(shape.product_operations(), job.useful_products(), contender.products(job), moved(shape, job))
        info |= {"version": contender.version()} | derived(work, statistics.median(found.seconds), rates[shape])
    record(benchmark, found, **info)


@functools.lru_cache(maxsize=1)
def group(
    shape: Shape, job_name: str, data: str, device: str, names: tuple[str, ...] | None, rounds: int
) -> dict[str, Measured | str]:
    """Every contender that runs here: what was measured, or why it was not timed. Kept until the next group comes."""
    job = JOBS[job_name]
    operands = make_operands(shape, job, data, device=device)
    truth = Truth(operands, job)
    field = {
        rival.name: Contender(
            functools.partial(run, rival, operands, job),
            rival.settings,
            lambda made: truth.errors(*made),
            bounds(rival),
        )
        for rival in all_rivals()
        if rival.does(job_name, job) and not rival.why_not(shape, device) and (names is None or rival.name in names)
    }
    return compete(field, device, rounds)


def moved(shape: Shape, job: Job) -> int:
    """Bytes that must move: hidden and weight read once, their gradients written once."""
    return shape.operand_bytes() + (0, 2 * shape.T * shape.H, shape.operand_bytes())[job.gradients]
