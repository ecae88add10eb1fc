"""Names that stand for numbers of an enum in C++."""

from __future__ import annotations

from collections.abc import Sequence


def number_of(argument: str, given: str, names: Sequence[str]) -> int:
    """The place of a name among those there are; ValueError that says which."""
    if given not in names:
        raise ValueError(f"{argument} must be one of {', '.join(names)}, got {given!r}")
    return names.index(given)
