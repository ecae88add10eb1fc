"""A ragged batch of molecules as flat tensors, and the elements it is made of."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from fastnuggets.molecules.embedding import Conformer

_TABLE = """
H He Li Be B C N O F Ne Na Mg Al Si P S Cl Ar K Ca Sc Ti V Cr Mn Fe Co Ni Cu Zn Ga Ge As Se Br Kr Rb Sr Y Zr Nb Mo Tc Ru
Rh Pd Ag Cd In Sn Sb Te I Xe Cs Ba La Ce Pr Nd Pm Sm Eu Gd Tb Dy Ho Er Tm Yb Lu Hf Ta W Re Os Ir Pt Au Hg Tl Pb Bi Po At
Rn Fr Ra Ac Th Pa U Np Pu Am Cm Bk Cf Es Fm Md No Lr Rf Db Sg Bh Hs Mt Ds Rg Cn Nh Fl Mc Lv Ts Og
"""
_SYMBOLS = _TABLE.split()
_NUMBERS = {symbol: number for number, symbol in enumerate(_SYMBOLS, start=1)}

# The element set of the MOSES benchmark without hydrogen.
ELEMENTS = ("C", "N", "O", "S", "F", "Cl", "Br")

# Van der Waals radii in angstrom. Bondi, J. Phys. Chem. 68, 441 (1964), doi 10.1021/j100785a001; B, Al, Ge and Sb,
# which he does not list, from Mantina et al., J. Phys. Chem. A 113, 5806 (2009), doi 10.1021/jp8111556, made for his
# scale.
BONDI_RADII = {
    "H": 1.20, "He": 1.40, "B": 1.92, "C": 1.70, "N": 1.55, "O": 1.52, "F": 1.47, "Ne": 1.54, "Al": 1.84, "Si": 2.10,
    "P": 1.80, "S": 1.80, "Cl": 1.75, "Ar": 1.88, "Ge": 2.11, "As": 1.85, "Se": 1.90, "Br": 1.85, "Kr": 2.02,
    "Sb": 2.06, "Te": 2.06, "I": 1.98, "Xe": 2.16,
}  # fmt: skip


def symbol(number: int) -> str:
    """Element symbol of an atomic number; ``*`` for a number that is no element."""
    return _SYMBOLS[number - 1] if 1 <= number <= len(_SYMBOLS) else "*"


def atomic_numbers(elements: Sequence[str]) -> list[int]:
    """Atomic numbers of element symbols. ValueError for an unknown symbol or one given twice."""
    if isinstance(elements, str):
        raise TypeError(f"elements: expected a sequence of symbols such as ('C', 'N'), got the string {elements!r}")
    unknown = [element for element in elements if element not in _NUMBERS]
    if unknown:
        raise ValueError(f"elements: expected element symbols such as C or Cl, got {unknown[0]!r}")
    if len(set(elements)) != len(elements) or not elements:
        raise ValueError(f"elements: expected at least one symbol, each once, got {tuple(elements)}")
    return [_NUMBERS[element] for element in elements]


def bondi_radii(elements: Sequence[str]) -> Tensor:
    """Van der Waals radii, [C] float32 in angstrom. ValueError for an element that has none in ``BONDI_RADII``."""
    atomic_numbers(elements)
    missing = [element for element in elements if element not in BONDI_RADII]
    if missing:
        raise ValueError(f"elements: no Bondi radius is known for {', '.join(missing)}")
    return torch.tensor([BONDI_RADII[element] for element in elements])


@dataclass(frozen=True, eq=False)
class Molecules:
    """B molecules with N atoms in all, ready for ``fastnuggets.ops.voxelize``.

    ``molecules[i]`` is a batch of one; a slice, an index list or tensor, or a boolean mask gives a smaller batch (a
    plain slice shares memory). It is a map-style dataset: ``DataLoader(molecules, batch_size=64,
    collate_fn=Molecules.cat)``.

        batch = molecules.keep(elements)
        grid = voxelize(batch.coords, batch.channels(elements), batch.ptr, center=batch.center(), shape=48,
                        num_channels=len(elements), density="wave", sigma=1.0, omega=0.5)
    """

    coords: Tensor  # [N, 3] float32, angstrom
    numbers: Tensor  # [N] uint8, atomic numbers
    ptr: Tensor  # [B + 1] int64, ascending, ptr[0] = 0, ptr[-1] = N
    names: Sequence[str]  # [B]
    smiles: Sequence[str]  # [B], empty where unknown

    def __post_init__(self) -> None:
        atoms = self.numbers.shape[0] if self.numbers.dim() == 1 else -1
        if tuple(self.coords.shape) != (atoms, 3):
            raise ValueError(
                f"coords: expected [N, 3] for numbers [N], got {list(self.coords.shape)} and {list(self.numbers.shape)}"
            )
        if self.ptr.dim() != 1 or len(self.ptr) < 1 or len(self.ptr) != len(self.names) + 1:
            raise ValueError(f"ptr: expected [B + 1] for {len(self.names)} names, got {list(self.ptr.shape)}")
        if len(self.smiles) != len(self.names):
            raise ValueError(f"smiles: expected {len(self.names)}, one for each name, got {len(self.smiles)}")

    @classmethod
    def from_conformers(cls, conformers: Iterable[Conformer]) -> Molecules:
        """The conformers that did not fail, in order."""
        good = [conformer for conformer in conformers if conformer.error is None]
        none = np.empty((0, 3), np.float32)
        lengths = np.array([len(conformer.numbers) for conformer in good], np.int64)
        return cls(
            torch.from_numpy(np.concatenate([none, *(conformer.coords for conformer in good)])),
            torch.from_numpy(np.concatenate([np.empty(0, np.uint8), *(conformer.numbers for conformer in good)])),
            torch.from_numpy(np.concatenate([[0], lengths.cumsum()]).astype(np.int64)),
            [conformer.name for conformer in good],
            [conformer.smiles for conformer in good],
        )

    @classmethod
    def cat(cls, parts: Sequence[Molecules]) -> Molecules:
        """One batch of the molecules of all parts, in order; also the ``collate_fn`` of a DataLoader."""
        shifts = torch.tensor([0] + [len(part.numbers) for part in parts]).cumsum(0)
        return cls(
            torch.cat([part.coords for part in parts]),
            torch.cat([part.numbers for part in parts]),
            torch.cat(
                [parts[0].ptr[:1], *(part.ptr[1:] + int(shift) for part, shift in zip(parts, shifts[:-1], strict=True))]
            ),
            [name for part in parts for name in part.names],
            [smiles for part in parts for smiles in part.smiles],
        )

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int | slice | Sequence[int] | Tensor) -> Molecules:
        if isinstance(index, int):
            if not -len(self) <= index < len(self):
                raise IndexError(f"index {index} is out of range for {len(self)} molecules")
            index = slice(index % len(self), index % len(self) + 1)
        if isinstance(index, slice):
            start, stop, step = index.indices(len(self))
            if step == 1:
                return self._run(start, max(start, stop))
            index = range(start, stop, step)
        return self._gather(torch.arange(len(self))[index].to(self.ptr.device))

    def _run(self, start: int, stop: int) -> Molecules:
        first, last = int(self.ptr[start]), int(self.ptr[stop])
        return Molecules(
            self.coords[first:last],
            self.numbers[first:last],
            self.ptr[start : stop + 1] - first,
            self.names[start:stop],
            self.smiles[start:stop],
        )

    def _gather(self, rows: Tensor) -> Molecules:
        starts, lengths = self.ptr[rows], self.ptr[rows + 1] - self.ptr[rows]
        ptr = torch.cat([self.ptr.new_zeros(1), lengths.cumsum(0)])
        atoms = torch.arange(int(ptr[-1]), device=ptr.device) + torch.repeat_interleave(starts - ptr[:-1], lengths)
        chosen = rows.tolist()
        return Molecules(
            self.coords[atoms],
            self.numbers[atoms],
            ptr,
            [self.names[row] for row in chosen],
            [self.smiles[row] for row in chosen],
        )

    def batches(
        self, size: int, *, shuffle: bool = False, generator: torch.Generator | None = None
    ) -> Iterator[Molecules]:
        """Batches of ``size`` molecules, the last one maybe smaller; in a random order of ``generator`` if asked."""
        if size < 1:
            raise ValueError(f"size: expected at least 1, got {size}")
        order = torch.randperm(len(self), generator=generator) if shuffle else None
        for start in range(0, len(self), size):
            yield self[start : start + size] if order is None else self[order[start : start + size]]

    def to(self, device: torch.device | str) -> Molecules:
        return Molecules(self.coords.to(device), self.numbers.to(device), self.ptr.to(device), self.names, self.smiles)

    def keep(self, elements: Sequence[str]) -> Molecules:
        """The same molecules without the atoms of other elements; a molecule may end with no atom."""
        wanted = torch.tensor(atomic_numbers(elements), dtype=self.numbers.dtype, device=self.numbers.device)
        mask = torch.isin(self.numbers, wanted)
        kept = torch.cat([self.ptr.new_zeros(1), mask.cumsum(0)])
        return Molecules(self.coords[mask], self.numbers[mask], kept[self.ptr], self.names, self.smiles)

    def channels(self, elements: Sequence[str] = ELEMENTS) -> Tensor:
        """Channel of each atom, [N] int64: the place of its element in ``elements``.

        ValueError for an atom of another element; ``keep(elements)`` drops them first.
        """
        lookup = torch.full((256,), -1)
        lookup[atomic_numbers(elements)] = torch.arange(len(elements))
        channels = lookup.to(self.numbers.device)[self.numbers.long()]
        if bool((channels < 0).any()):
            others = sorted({symbol(number) for number in self.numbers[channels < 0].tolist()})
            raise ValueError(f"elements: no channel for {', '.join(others)}; keep(elements) drops such atoms")
        return channels

    def elements(self) -> dict[str, int]:
        """How many atoms of each element there are, the commonest first."""
        counts = torch.bincount(self.numbers).tolist()
        common = sorted((number for number, count in enumerate(counts) if count), key=lambda number: -counts[number])
        return {symbol(number): counts[number] for number in common}

    def center(self) -> Tensor:
        """Centre of geometry of the heavy atoms, [B, 3] in angstrom.

        Of all atoms where there is no heavy one; the origin for a molecule with no atom.
        """
        molecule = torch.repeat_interleave(torch.arange(len(self), device=self.ptr.device), self.ptr.diff())

        def sums(weight: Tensor) -> tuple[Tensor, Tensor]:
            total = torch.zeros(len(self), 3, dtype=torch.float64, device=self.coords.device)
            count = torch.zeros(len(self), 1, dtype=torch.float64, device=self.coords.device)
            total.index_add_(0, molecule, self.coords.double() * weight)
            return total, count.index_add_(0, molecule, weight)

        heavy = (self.numbers != 1).double().unsqueeze(1)
        total, count = sums(heavy)
        every, size = sums(torch.ones_like(heavy))
        mean = torch.where(count > 0, total / count.clamp(min=1), every / size.clamp(min=1))
        return mean.to(self.coords.dtype)
