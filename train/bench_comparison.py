"""`entrocraft bench BEFORE AFTER`: two files of results beside each other."""

from entrocraft.train.bench_file import Saved
from entrocraft.train.bench_table import about, aligned, mebibytes, milliseconds, quotient

HEAD = ["", "", "ms before", "after", "ratio", "MiB before", "after", "ratio"]
SAME = ("device", "cores", "threads", "interpreted")  # of two machines whose times can be compared


def as_comparison(before: Saved, after: Saved, *, markdown: bool = False) -> str:
    """Groups and contenders that both files have: milliseconds, memory and their ratios, after over before; then those
    of one file only. A warning where the machines differ.

    Raises:
        ValueError: they have nothing in common.
    """
    there = {(row.group, row.rival): row for row in before.rows}
    lines = []
    for row in after.rows:
        old = there.get((row.group, row.rival))
        if old is not None:
            times = [milliseconds(old), milliseconds(row), quotient(row.seconds, old.seconds)]
            sizes = [mebibytes(old), mebibytes(row), quotient(row.info.get("peak_bytes"), old.info.get("peak_bytes"))]
            lines.append([row.group, row.rival, *times, *sizes])
    if not lines:
        raise ValueError(f"{before.path} and {after.path} have no benchmark in common; {_only(before, after)[0]}")
    mark = "- " if markdown else ""
    head = [f"{mark}before: {about(before)}", f"{mark}after:  {about(after)}"]
    head += [f"{mark}warning: {text}" for text in _differences(before, after)]
    if markdown:
        table = ["| " + " | ".join(line) + " |" for line in (HEAD, *lines)]
        table.insert(1, "|---" * len(HEAD) + "|")
    else:
        table = aligned([HEAD, *lines], 2)
    alone = [f"{mark}{text}" for text in _only(before, after)]
    return "\n".join([*head, "", *table, *([""] if alone else []), *alone])


def _differences(before: Saved, after: Saved) -> list[str]:
    """What makes times of the two no measure of a change of the code."""
    pairs = [(key, before.machine.get(key), after.machine.get(key)) for key in SAME]
    told = [f"{key} {old} before, {new} after" for key, old, new in pairs if old != new and None not in (old, new)]
    return [f"different machines: {', '.join(told)}: the ratios say little"] if told else []


def _only(before: Saved, after: Saved) -> list[str]:
    """Contenders of one file alone, a line a group."""
    texts = []
    for one, other, word in ((before, after, "before"), (after, before, "after")):
        there = {(row.group, row.rival) for row in other.rows}
        for group, rows in one.groups().items():
            names = [row.rival for row in rows if (group, row.rival) not in there]
            texts += [f"only {word}: {group}: {', '.join(names)}"] if names else []
    return texts
