"""SMILES as numbers: millions of them in one flat array, and the vocabulary of their characters."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

BEGIN, END = 0, 1  # of every vocabulary
_SPECIAL = ("<begin>", "<end>")
_PART = 1 << 16  # strings worked on at a time: what is computed for each character takes 8 bytes and more


@dataclass(frozen=True, eq=False)
class Strings:
    """Strings of bytes, one after the other: a byte a character and eight bytes a string."""

    data: np.ndarray  # [N] uint8
    ptr: np.ndarray  # [B + 1] int64, ascending, ptr[0] = 0, ptr[-1] = N

    @classmethod
    def of(cls, texts: Iterable[str]) -> Strings:
        """ValueError, naming the text, if one is not ASCII."""
        parts = []
        for text in texts:
            if not text.isascii():
                raise ValueError(
                    f"{text!r}: the character {next(c for c in text if not c.isascii())!r} is not of SMILES"
                )
            parts.append(text.encode())
        lengths = np.fromiter(map(len, parts), np.int64, len(parts))
        return cls(np.frombuffer(b"".join(parts), np.uint8), _ends(lengths))

    @classmethod
    def cat(cls, parts: Sequence[Strings]) -> Strings:
        """The strings of all parts, in order."""
        lengths = np.concatenate([np.empty(0, np.int64), *(part.lengths for part in parts)])
        return cls(np.concatenate([np.empty(0, np.uint8), *(part.data for part in parts)]), _ends(lengths))

    def __len__(self) -> int:
        return len(self.ptr) - 1

    def __getitem__(self, index: int) -> str:
        """As text, if the bytes are characters."""
        if not 0 <= index < len(self):
            raise IndexError(f"index {index} is out of range for {len(self)} strings")
        return self.data[self.ptr[index] : self.ptr[index + 1]].tobytes().decode("ascii")

    @cached_property
    def lengths(self) -> np.ndarray:
        """[B] int64."""
        return np.diff(self.ptr)

    def take(self, rows: np.ndarray) -> Strings:
        """Those of some rows [n], or of a mask [B], in that order."""
        rows = np.flatnonzero(rows) if rows.dtype == bool else rows
        return Strings.cat([self._gather(rows[i : i + _PART]) for i in range(0, len(rows), _PART)])

    def _gather(self, rows: np.ndarray) -> Strings:
        ptr = _ends(self.lengths[rows])
        places = np.arange(ptr[-1]) + np.repeat(self.ptr[rows] - ptr[:-1], np.diff(ptr))
        return Strings(self.data[places], ptr)

    def parts(self) -> Iterator[Strings]:
        """The same strings, some after the other; they share the memory."""
        for i in range(0, len(self), _PART):
            ptr = self.ptr[i : i + _PART + 1]
            yield Strings(self.data[ptr[0] : ptr[-1]], ptr - ptr[0])

    def padded(self, rows: np.ndarray, value: int) -> np.ndarray:
        """[longest of the rows, n] uint8: a column for each row, with `value` after its end."""
        lengths = self.lengths[rows]
        places = np.arange(lengths.max(initial=0))[:, None]
        inside = places < lengths
        columns = np.full(inside.shape, value, np.uint8)
        columns[inside] = self.data[(places + self.ptr[rows])[inside]]
        return columns


class Vocabulary:
    """The characters of a set of SMILES, in order, after two tokens that begin and end each.

    A token is one character, as in the MOSES benchmark (doi:10.3389/fphar.2020.565644): Cl is C and l, and what stands
    in brackets is spelled out. MOSES' tokens for padding and for unknown characters are not here: nothing learns from
    padding, and an unknown character is an error.
    """

    def __init__(self, characters: Iterable[str]) -> None:
        self.characters = tuple(characters)
        wrong = [c for c in self.characters if len(c) != 1 or not c.isascii()]
        if wrong or len(set(self.characters)) != len(self.characters) or not self.characters:
            raise ValueError(f"characters: expected single ASCII characters, each once, got {list(self.characters)}")
        self._codes = np.frombuffer("".join(self.characters).encode(), np.uint8)
        self._token = np.full(256, END, np.uint8)  # END stands for what is unknown
        self._token[self._codes] = np.arange(len(_SPECIAL), len(self))

    @classmethod
    def of(cls, strings: Strings) -> Vocabulary:
        """Of all characters that occur."""
        occurs = np.zeros(256, bool)
        for part in strings.parts():
            occurs |= np.bincount(part.data, minlength=256) > 0
        return cls(map(chr, np.flatnonzero(occurs)))

    @classmethod
    def from_tokens(cls, tokens: Sequence[str]) -> Vocabulary:
        """The vocabulary whose `tokens` these are. ValueError if they are no vocabulary's."""
        if tuple(tokens[:2]) != _SPECIAL:
            raise ValueError(f"a vocabulary begins with {', '.join(_SPECIAL)}, got {list(tokens[:2])}")
        return cls(tokens[2:])

    @property
    def tokens(self) -> list[str]:
        """Plain data to save; a token's number is its place."""
        return [*_SPECIAL, *self.characters]

    def __len__(self) -> int:
        return len(_SPECIAL) + len(self.characters)

    def knows(self, strings: Strings) -> np.ndarray:
        """[B] bool: whether all characters of a string are in the vocabulary."""
        return np.concatenate([np.empty(0, bool), *map(self._knows, strings.parts())])

    def _knows(self, strings: Strings) -> np.ndarray:
        unknown = np.concatenate([[0], np.cumsum(self._token[strings.data] == END)])
        known: np.ndarray = unknown[strings.ptr[1:]] == unknown[strings.ptr[:-1]]
        return known

    def encode(self, strings: Strings) -> Strings:
        """Tokens, with BEGIN before and END after each string. ValueError that names the first SMILES with an unknown
        character, and the character."""
        known = self.knows(strings)
        if not known.all():
            smiles = strings[int(np.argmin(known))]
            character = next(c for c in smiles if c not in self.characters)
            raise ValueError(
                f"{smiles!r}: the character {character!r} is not in the vocabulary {''.join(self.characters)}"
            )
        return Strings.cat([self._encode(part) for part in strings.parts()])

    def _encode(self, strings: Strings) -> Strings:
        lengths = strings.lengths
        ptr = _ends(lengths + 2)
        tokens = np.full(ptr[-1], END, np.uint8)
        tokens[ptr[:-1]] = BEGIN
        places = np.arange(len(strings.data)) + np.repeat(2 * np.arange(len(strings)) + 1, lengths)
        tokens[places] = self._token[strings.data]
        return Strings(tokens, ptr)

    def decode(self, tokens: np.ndarray) -> list[str]:
        """SMILES of rows of tokens [B, T], each up to its first END; BEGIN is nothing."""
        if tokens.size and int(tokens.max()) >= len(self):
            raise ValueError(f"tokens: expected numbers below {len(self)}, got {int(tokens.max())}")
        table = np.concatenate([np.zeros(2, np.uint8), self._codes])
        lengths = np.where((ends := tokens == END).any(1), ends.argmax(1), tokens.shape[1])
        rows = table[tokens]
        return [
            row[:n].tobytes().replace(b"\0", b"").decode("ascii") for row, n in zip(rows, lengths.tolist(), strict=True)
        ]


def _ends(lengths: np.ndarray) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
