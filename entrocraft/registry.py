"""Looking a thing up by name, with an error that helps."""

import difflib
from collections.abc import Mapping
from typing import TypeVar

Entry = TypeVar("Entry")


def lookup(registry: Mapping[str, Entry], name: str, noun: str) -> Entry:
    """`registry[name]`.

    Raises:
        ValueError: unknown name; the message gives the nearest known one and all of them.
    """
    if isinstance(name, str) and name in registry:
        return registry[name]
    near = difflib.get_close_matches(str(name), registry, n=1, cutoff=0.4)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise ValueError(f"unknown {noun} {name!r}: {hint}known are {', '.join(sorted(registry))}")
