"""`entrocraft bench`: saved benchmarks printed, compared, written as Markdown and drawn."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from entrocraft.train.bench_comparison import as_comparison
from entrocraft.train.bench_file import load_results
from entrocraft.train.bench_table import as_markdown, as_text


def write_tables(paths: Sequence[Path], out: Path | None, *, markdown: bool = False) -> str:
    """What the command prints: a table of one file, a comparison of two; with `out` also table.md and scaling.png."""
    saved = [load_results(path) for path in paths]
    shape = as_markdown if markdown else as_text
    text = as_comparison(*saved, markdown=markdown) if len(saved) == 2 else shape(saved[0])
    if out is not None:
        from entrocraft.train.bench_figure import draw

        out.mkdir(parents=True, exist_ok=True)
        table = as_markdown(saved[0]) if len(saved) == 1 else as_comparison(*saved, markdown=True)
        (out / "table.md").write_text(table + "\n")
        draw(saved, out / "scaling.png")
        text += f"\n\n{out / 'table.md'}\n{out / 'scaling.png'}"
    return text


def main(argv: Sequence[str]) -> int:
    """Command line entry."""
    parser = argparse.ArgumentParser(
        prog="entrocraft bench",
        description="print saved benchmarks as a table, or two files beside each other",
    )
    parser.add_argument("files", type=Path, nargs="+", metavar="FILE", help="JSON of one run, or of two to compare")
    parser.add_argument("--out", type=Path, help="folder to write table.md and scaling.png into")
    parser.add_argument("--markdown", action="store_true", help="print Markdown")
    options = parser.parse_args(argv)
    if len(options.files) > 2:
        parser.error(f"{len(options.files)} files given: name one, or two to compare")
    print(write_tables(options.files, options.out, markdown=options.markdown))
    return 0
