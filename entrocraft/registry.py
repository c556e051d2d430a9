"""Looking a thing up by name, with an error that helps."""

import difflib
import importlib
from collections.abc import Mapping
from typing import Any, TypeVar

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


def resolve(registry: Mapping[str, Entry | str], name: str, noun: str) -> Any:
    """`registry[name]`, imported where it is a path; or, for a `name` with a colon, what `package.module:name` holds.

    Raises:
        ValueError: unknown name, or a path that cannot be imported.
    """
    entry = name if isinstance(name, str) and ":" in name else lookup(registry, name, noun)
    if not isinstance(entry, str):
        return entry
    module, _, attribute = entry.partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"{noun} {name!r} cannot be imported as package.module:name: {error}") from None


def build_from(registry: Mapping[str, Entry | str], name: str, arguments: Mapping[str, Any], noun: str) -> Any:
    """What `resolve` finds, called with `arguments`.

    Raises:
        ValueError: as `resolve`; arguments it does not take, or values it refuses.
    """
    make = resolve(registry, name, noun)
    try:
        return make(**arguments)
    except TypeError as error:
        raise ValueError(f"{noun} {name!r} was given {sorted(arguments)}: {error}") from error
