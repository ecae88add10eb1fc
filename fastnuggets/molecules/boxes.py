"""Molecules of a file that a box can hold: each once, of one part and of known elements, with coordinates."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import NamedTuple

import torch

from fastnuggets.molecules.batch import Molecules, atomic_numbers
from fastnuggets.molecules.embedding import conformers
from fastnuggets.molecules.readers import Record, count_records, read
from fastnuggets.molecules.table import load_table, open_parquet

SMALLEST = 4  # heavy atoms


class Boxed(NamedTuple):
    """Molecules about the centre of their heavy atoms, and how they were chosen."""

    molecules: Molecules  # only atoms of the elements asked for
    read: int  # records
    left_out: dict[str, int]  # reason -> molecules
    embedded: int  # molecules whose conformer was made, or was in the cache


def boxed(
    path: Path,
    elements: Collection[str],
    largest: float,
    *,
    seed: int = 0,
    optimize: bool = True,
    cache: Path | None = None,
    most: int | None = None,
    progress: bool = False,
) -> Boxed:
    """Molecules of a file that ``read`` takes, or of a coordinate table, which is read at once.

    Args:
        elements: symbols of the atoms that are kept. A molecule with another element is left out; hydrogens are
            dropped where they are not asked for.
        largest: angstrom from the centre to the farthest atom that is kept.
        seed, optimize, cache: of `conformers`.
        most: records that are read.

    Raises ValueError if no molecule is left, saying why; FileNotFoundError; as ``read``.
    """
    left_out: Counter[str] = Counter()
    if _is_table(path):
        every = load_table(path)
        every = every[:most] if most is not None else every
        total, chosen = len(every), _wanted_rows(every, elements, left_out)
        # Whose every molecule was relaxed already: its coordinates are as they are.
        molecules, embedded = every[torch.tensor(chosen, dtype=torch.int64)], 0
    else:
        total = count_records(path)
        total = total if most is None else min(total, most)
        made = list(
            conformers(
                _wanted(path, total, elements, left_out),
                optimize=optimize,
                seed=seed,
                cache=cache,
                progress=progress,
                total=total,
            )
        )
        molecules, embedded = Molecules.from_conformers(made), len(made)
        left_out["no conformer"] = len(made) - len(molecules)
    molecules = _centred(molecules.keep(list(elements)))
    fits = (_radius(molecules) <= largest).nonzero().flatten()
    left_out["too large for the box"] = len(molecules) - len(fits)
    if not len(fits):
        reasons = ", ".join(f"{count} {reason}" for reason, count in (+left_out).items())
        raise ValueError(f"{path}: none of its {total} molecules can be used" + (f" ({reasons})" if reasons else ""))
    return Boxed(molecules[fits], total, dict(+left_out), embedded)


def _is_table(path: Path) -> bool:
    if path.suffix.lower() != ".parquet":
        return False
    with open_parquet(path) as file:
        return {"z", "xyz"} <= set(file.schema_arrow.names)


def _wanted(path: Path, total: int, elements: Collection[str], left_out: Counter[str]) -> Iterator[Record]:
    seen: set[str] = set()
    numbers = {1, *atomic_numbers(list(elements))}
    for record in read(path):
        if record.index > total:
            return
        if record.error:
            reason: str | None = "cannot be read"
        else:
            reason = _unwanted(record.smiles, [atom.GetAtomicNum() for atom in record.mol.GetAtoms()], numbers, seen)
        if reason:
            left_out[reason] += 1
        else:
            yield record


def _wanted_rows(molecules: Molecules, elements: Collection[str], left_out: Counter[str]) -> list[int]:
    seen: set[str] = set()
    known = {1, *atomic_numbers(list(elements))}
    numbers, ptr = molecules.numbers.tolist(), molecules.ptr.tolist()
    chosen = []
    for row, smiles in enumerate(molecules.smiles):
        reason = _unwanted(smiles, numbers[ptr[row] : ptr[row + 1]], known, seen)
        if reason:
            left_out[reason] += 1
        else:
            chosen.append(row)
    return chosen


def _unwanted(smiles: str, numbers: list[int], known: set[int], seen: set[str]) -> str | None:
    if smiles and smiles in seen:
        return "seen before"
    seen.add(smiles)
    if "." in smiles:
        return "more than one part"
    if not known.issuperset(numbers):
        return "another element"
    heavy = len(numbers) - numbers.count(1)
    return f"fewer than {SMALLEST} heavy atoms" if heavy < SMALLEST else None


def _centred(molecules: Molecules) -> Molecules:
    coords = molecules.coords - molecules.center().repeat_interleave(molecules.ptr.diff(), 0)
    return Molecules(coords, molecules.numbers, molecules.ptr, molecules.names, molecules.smiles)


def _radius(molecules: Molecules) -> torch.Tensor:
    """[B] angstrom, from the origin to the farthest atom."""
    owner = torch.arange(len(molecules)).repeat_interleave(molecules.ptr.diff())
    return torch.zeros(len(molecules)).scatter_reduce(0, owner, molecules.coords.norm(dim=1), "amax")
