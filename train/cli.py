"""The command `entrocraft`: one word for each thing that can be done with a run.

Every command is imported when it is called, so that `--help` costs nothing and `doctor` runs where others cannot.
"""

import argparse
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

# Mistakes of the caller: a wrong value, a file that is not there or cannot be used. Everything else is a defect of
# ours or of the machine, and keeps its traceback.
USER_ERRORS = (ValueError, FileNotFoundError, FileExistsError, IsADirectoryError, NotADirectoryError, PermissionError)


def train(argv: Sequence[str]) -> int | None:
    """train a model; the same as `python train/train.py` (`entrocraft train --help` explains every setting)"""
    from entrocraft.train.train import main

    return main(argv)


def evaluate(argv: Sequence[str]) -> int | None:
    """measure a model on held-out problems: mean@n, pass@k, intervals"""
    from entrocraft.train.eval_command import main

    return main(argv)


def report(argv: Sequence[str]) -> int | None:
    """write report.html and curves.png of a run from its recorded metrics"""
    parser = argparse.ArgumentParser(prog="entrocraft report", description=report.__doc__)
    parser.add_argument("run", type=Path, nargs="+", help="folder of a run, such as runs/demo/budget")
    runs = parser.parse_args(argv).run
    from entrocraft.train.report import write_report

    for run in runs:
        print(write_report(run))
    return 0


def compare(argv: Sequence[str]) -> int | None:
    """draw the curves of two or more runs over each other"""
    parser = argparse.ArgumentParser(prog="entrocraft compare", description=compare.__doc__)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="folders of two or more runs")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/compare"), help="folder to write into (default: %(default)s)"
    )
    options = parser.parse_args(argv)
    if len(options.runs) < 2:
        parser.error(f"one run given, {options.runs[0]}: name at least two")
    from entrocraft.train.report import compare_runs

    print(compare_runs(options.runs, options.out))
    return 0


def doctor(argv: Sequence[str]) -> int | None:
    """check versions, GPU, Triton and optional packages; each finding names its remedy"""
    from entrocraft.train.doctor import main

    return main(argv)


def demo(argv: Sequence[str]) -> int | None:
    """train a tiny model three ways on the CPU and draw its entropy curves"""
    from entrocraft.train.demo import main

    return main(argv)


def bench(argv: Sequence[str]) -> int | None:
    """print saved benchmarks as a table, or two files beside each other; with --out write Markdown and a figure"""
    from entrocraft.train.bench_command import main

    return main(argv)


def serve(argv: Sequence[str]) -> int | None:
    """start a vLLM server that a trainer can publish its weights to (`engine.name: vllm_server`)"""
    from entrocraft.train.serve import main

    return main(argv)


COMMANDS: dict[str, Callable[[Sequence[str]], int | None]] = {
    "train": train,
    "eval": evaluate,
    "report": report,
    "compare": compare,
    "bench": bench,
    "doctor": doctor,
    "demo": demo,
    "serve": serve,
}


def report_errors(run: Callable[[], int | None], *, show_traceback: bool = False) -> int:
    """Calls `run` and returns its exit code; a mistake of the user's is one clear line and exit code 2.

    `show_traceback`, or ENTROCRAFT_TRACEBACK=1, shows where the error arose. Ctrl-C ends with 130, as a shell expects.
    """
    show_traceback = show_traceback or os.environ.get("ENTROCRAFT_TRACEBACK") == "1"

    def complain(error: Exception, message: str) -> None:
        if show_traceback:
            traceback.print_exception(error)
        rank = os.environ.get("RANK", "0")  # torchrun's
        print(f"error{'' if rank == '0' else f' on rank {rank}'}: {message}", file=sys.stderr)

    try:
        return run() or 0
    except USER_ERRORS as error:
        complain(error, str(error) or type(error).__name__)
        return 2
    except ImportError as error:
        complain(error, f"{error}; `entrocraft doctor` says what does not fit together")
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    width = max(len(name) for name in COMMANDS)
    listing = "\n".join(f"  {name:<{width}}  {command.__doc__}" for name, command in COMMANDS.items())
    parser = argparse.ArgumentParser(
        prog="entrocraft",
        description="Reinforcement learning of language models along an entropy curve that you draw.",
        epilog=f"commands:\n{listing}\n\n`entrocraft COMMAND --help` explains its options.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--traceback", action="store_true", help="show where an error arose (so does ENTROCRAFT_TRACEBACK=1)"
    )
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND", help="one of those below")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code: 2 for a mistake of the user's, told in one line."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    show_traceback = "--traceback" in arguments
    if show_traceback:  # before or after the command, whose own parser does not know it
        arguments.remove("--traceback")
    first = next((i for i, word in enumerate(arguments) if not word.startswith("-")), len(arguments))
    command = _parser().parse_args(arguments[: first + 1]).command
    return report_errors(lambda: COMMANDS[command](arguments[first + 1 :]), show_traceback=show_traceback)


if __name__ == "__main__":
    sys.exit(main())
