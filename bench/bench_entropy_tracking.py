"""Which methods make the entropy follow a curve, and what that costs: real training of the demo's tiny model.

On the demo's task, where one prompt has many right answers, or with `--task addition` where it has one.

    python bench/bench_entropy_tracking.py --out bench/results/entropy_tracking            # hours; goes on where it was
    python bench/bench_entropy_tracking.py --out DIR --methods none budget hard --schedules line --seeds 1
    python bench/bench_entropy_tracking.py --out DIR --task addition
    python bench/bench_entropy_tracking.py --out DIR --report                              # tables and figures alone

Same warm start, prompts and number of rollouts for all methods of a seed; one process and one thread a run. Each
finished run is one line of `runs.jsonl` with both curves, so that stopping loses the runs in progress and no others.
`tracking_cases.py` says what each method and curve is, `tracking_runs.py` what a run is judged by.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import sys
import time
import traceback
from collections.abc import Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any

BENCH = Path(__file__).resolve().parent
if str(BENCH) not in sys.path:  # workers and pytest import this file without having run it
    sys.path.insert(0, str(BENCH))

from tracking_cases import FREE, REGIMES, SCHEDULES, TARGETED, TASKS, VARIANTS, WITH_RLOO, Case, grid  # noqa: E402

CONFIG = BENCH.parent / "train" / "configs" / "demo.yaml"


def run_case(case: Case, scratch: Path, model: Path, data: tuple[Path, Path], steps: int | None) -> dict[str, Any]:
    """Trains one case in this process; returns its name, settings and judgement. Its folder is gone afterwards."""
    import torch
    from tracking_runs import judge

    from entrocraft.train.config_reader import load_config
    from entrocraft.train.metrics import read_metrics
    from entrocraft.train.train import run_training

    torch.set_num_threads(1)
    folder = scratch / case.name
    shutil.rmtree(folder, ignore_errors=True)
    files = [f"--model.path={model}", f"--data.train={data[0]}", f"--data.eval={data[1]}", f"--run_dir={folder}"]
    started = time.perf_counter()
    scratch.mkdir(parents=True, exist_ok=True)
    with (scratch / f"{case.name}.log").open("w") as log, contextlib.redirect_stdout(log):
        run_training(load_config([f"--config={CONFIG}", *files, *case.overrides(steps)]))
    found = judge(read_metrics(folder))
    shutil.rmtree(folder)
    (scratch / f"{case.name}.log").unlink()
    return {**case._asdict(), "name": case.name, "seconds": round(time.perf_counter() - started, 1), **found}


def prepare(
    scratch: Path, seeds: Sequence[int], warm_start_steps: int | None, task: str = "sums"
) -> tuple[dict[int, Path], tuple[Path, Path]]:
    """The warm-started model of every seed, and the two files of problems."""
    from entrocraft.train.config_reader import load_config
    from entrocraft.train.warm_start import warm_start

    shape, chosen = load_config([f"--config={CONFIG}"]).model.tiny, TASKS[task]
    models = {
        seed: warm_start(scratch / "models", shape, seed, steps=warm_start_steps, lessons=chosen.lessons)
        for seed in seeds
    }
    return models, chosen.write_problems(scratch / ("data" if task == "sums" else f"data_{task}"))


def run_grid(
    cases: list[Case], out: Path, scratch: Path, *, jobs: int, steps: int | None, warm_start_steps: int | None
) -> int:
    """Runs what is not in `out/runs.jsonl` yet, of cases of one task; returns how many failed."""
    from tracking_runs import read_runs

    from entrocraft.train.demo import provenance

    out.mkdir(parents=True, exist_ok=True)
    record = out / "runs.jsonl"
    todo = [case for case in cases if case.name not in read_runs(record)]
    print(f"{len(cases) - len(todo)} of {len(cases)} runs are there, {len(todo)} to go", flush=True)
    if not todo:
        return 0
    models, data = prepare(scratch, sorted({case.seed for case in todo}), warm_start_steps, todo[0].task)
    origin, failed = {"commit": provenance()["commit"], "steps": steps}, 0
    with _pool(jobs) as pool:
        futures = {pool.submit(run_case, case, scratch, models[case.seed], data, steps): case for case in todo}
        for done, future in enumerate(as_completed(futures), 1):
            case = futures[future]
            try:
                row = future.result() | origin
            except Exception:
                failed += 1
                print(f"FAILED {case.name}\n{traceback.format_exc()}", file=sys.stderr, flush=True)
                continue
            with record.open("a") as file:
                file.write(json.dumps(row) + "\n")
            print(
                f"{done}/{len(todo)} {case.name}: error {row['error']:.3f} nats, accuracy {row['accuracy']:.2f}, "
                f"{row['distinct']:.1f} distinct, {row['seconds']:.0f} s",
                flush=True,
            )
    return failed


def _pool(jobs: int) -> Executor:
    """Fresh processes of one thread each; for 0 jobs, one thread of this process."""
    if jobs == 0:
        return ThreadPoolExecutor(1)
    os.environ["OMP_NUM_THREADS"] = "1"
    return ProcessPoolExecutor(jobs, mp_context=get_context("spawn"))


def main(argv: Sequence[str] | None = None) -> int:
    """Command line entry; exit status 1 if a run failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of runs.jsonl, tables and figures")
    parser.add_argument(
        "--scratch", type=Path, default=Path("runs/entropy_tracking"), help="models and unfinished runs"
    )
    parser.add_argument("--task", choices=list(TASKS), default="sums", help="default: %(default)s")
    by_name = [*FREE, *TARGETED, *VARIANTS, *WITH_RLOO]
    parser.add_argument("--methods", nargs="+", choices=by_name, help="default: all but try_... and rloo_...")
    parser.add_argument("--schedules", nargs="+", choices=list(SCHEDULES), help="default: all of the task's")
    parser.add_argument("--regimes", nargs="+", choices=list(REGIMES), help="default: both")
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="runs at a time, a thread each; 0: here")
    parser.add_argument("--steps", type=int, help="of every run; default: the regime's")
    parser.add_argument("--warm-start-steps", type=int, help="default: the task's")
    parser.add_argument("--report", action="store_true", help="only write tables and figures")
    given = parser.parse_args(argv)
    try:
        cases = grid(given.methods, given.schedules, given.regimes, tuple(given.seeds), given.task)
    except ValueError as error:
        parser.error(str(error))
    failed = 0
    if not given.report:
        failed = run_grid(
            cases, given.out, given.scratch,
            jobs=given.jobs, steps=given.steps, warm_start_steps=given.warm_start_steps,
        )  # fmt: skip
    from tracking_report import write_report

    print(write_report(given.out))
    return 1 if failed else 0


def bench_ten_steps_under_control(benchmark, tmp_path):
    """Seconds of ten steps of the demo under `budget`, for `make bench`, once its curve is seen to be one."""
    models, data = prepare(tmp_path, [1], 20)
    case = Case("budget", "line", "one_pass", 1)
    benchmark.group = "ten steps of the demo, one thread"
    row = benchmark.pedantic(run_case, args=(case, tmp_path, models[1], data, 10), rounds=1)
    assert len(row["entropy"]) == 10
    assert all(0 < value < 6 for value in row["entropy"])


if __name__ == "__main__":
    sys.exit(main())
