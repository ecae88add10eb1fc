"""What all commands share: exit codes, errors of usage, and the types of their arguments."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable
from typing import Any

import torch

OK, FAILED, USAGE, SKIPPED, INTERRUPTED = 0, 1, 2, 3, 130


class UsageError(Exception):
    """Arguments that do not fit together."""


def say(message: str, code: int = OK) -> int:
    print(f"fastnuggets: {message}", file=sys.stderr)
    return code


def three(text: str, kind: Callable[[str], Any], what: str) -> tuple[Any, Any, Any]:
    try:
        values = [kind(part) for part in text.split(",")]
    except ValueError:
        values = []
    if len(values) not in (1, 3) or not all(0 < value < 1e9 for value in values):
        raise argparse.ArgumentTypeError(f"expected one or three {what} above zero, got {text!r}")
    x, y, z = values * 3 if len(values) == 1 else values
    return x, y, z


def shape(text: str) -> tuple[int, int, int]:
    return three(text, int, "whole numbers")


def spacing(text: str) -> tuple[float, float, float]:
    return three(text, float, "numbers")


def positive(text: str) -> float:
    value = float(text)
    if not 0 < value < 1e9:
        raise argparse.ArgumentTypeError(f"expected a number above zero, got {text!r}")
    return value


def pair(text: str, kind: Callable[[str], Any] = float) -> tuple[Any, Any]:
    try:
        first, second = map(kind, text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected two numbers such as 3,8, got {text!r}") from None
    return first, second


def place(text: str) -> tuple[int, int]:
    return pair(text, int)


def whole(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number above zero, got {text!r}")
    return value


def size(text: str) -> int:
    """Bytes; GB is 10^9 and GiB is 2^30."""
    found = re.fullmatch(r"(\d+|\d*\.\d+)\s*(?:([KMGT])(I?))?B?", text.strip().upper())
    if not found:
        raise argparse.ArgumentTypeError(f"expected a size such as 5GB or 500MiB, got {text!r}")
    number, letter, binary = found.groups()
    return max(1, int(float(number) * (1024 if binary else 1000) ** " KMGT".index(letter or " ")))


def device(text: str) -> str:
    """A device that can be used."""
    try:
        torch.empty(0, device=text)
    except (AssertionError, RuntimeError) as error:
        raise argparse.ArgumentTypeError(f"{text!r} cannot be used: {str(error).splitlines()[0]}") from None
    return text


def elements(text: str) -> tuple[str, ...]:
    from fastnuggets.molecules import atomic_numbers

    elements = tuple(part.strip() for part in text.split(","))
    try:
        atomic_numbers(elements)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return elements
