"""Fingerprints and properties of a file's molecules, split, for the systems that learn from them."""

from __future__ import annotations

import csv
import gzip
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastnuggets.molecules import Fingerprints, fingerprints_of_file, read
from fastnuggets.molecules.files import need

LEAST = 20  # distinct fingerprints that something can be learned from
_MANY = 50_000  # molecules beyond which nothing is computed of them unasked, at some 0.2 ms each
COMPUTED = ("logP", "TPSA", "QED", "weight")


@dataclass(frozen=True, eq=False)
class Rows:
    """Fingerprints of molecules, and what is known of each."""

    packed: Tensor  # [N, bytes] uint8
    smiles: Sequence[str]  # [N] or none
    values: Tensor | None = None  # [N] float32 of the property
    doses: Tensor | None = None  # [N] float32

    def __len__(self) -> int:
        return len(self.packed)

    def take(self, places: Tensor) -> Rows:
        smiles = [self.smiles[place] for place in places.tolist()] if len(self.smiles) else ()
        values, doses = (None if of is None else of[places] for of in (self.values, self.doses))
        return Rows(self.packed[places], smiles, values, doses)


class Split(NamedTuple):
    """No fingerprint is in both."""

    train: Rows
    test: Rows


def load(path: Path, kind: str, *, progress: bool = False) -> Fingerprints:
    """Of a file of molecules, or saved ones. ValueError if there are none, or they are of another kind."""
    if path.suffix == ".npz":
        found = Fingerprints.load(path)
        if found.kind != kind:
            raise ValueError(f"{path}: its fingerprints are {found.kind}, not {kind}")
    else:
        found = fingerprints_of_file(path, kind, progress=progress)
    if not len(found):
        why = f": {found.skipped[0].error}" if found.skipped else ""
        raise ValueError(f"{path}: there is no molecule in it that can be read{why}")
    return found


def rows_of(path: Path, kind: str, *, value: str = "", dose: str = "", progress: bool = False) -> Rows:
    """All molecules of a file, with a property: one of COMPUTED, or the column of a table; and with a column of doses.

    Rows without a number are left out, with a warning that says how many. ValueError if nothing is left, or a column
    is missing or the same everywhere.
    """
    found = load(path, kind, progress=progress)
    rows = Rows(torch.from_numpy(np.array(found.packed)), found.smiles)
    kept = torch.ones(len(found), dtype=torch.bool)
    columns: list[Tensor | None] = []
    for name in (value, dose):
        numbers = _values(path, found, name, progress) if name else None
        if numbers is not None:
            if not numbers.isfinite().any():
                raise ValueError(f"{path}: there is no number in the column {name!r}")
            kept &= numbers.isfinite()
        columns.append(numbers)
    rows = replace(rows, values=columns[0], doses=columns[1])
    if not kept.all():
        warnings.warn(
            f"{path}: {int((~kept).sum())} of {len(kept)} molecules have no number and are left out", stacklevel=2
        )
        rows = rows.take(kept.nonzero().flatten())
    for name, numbers in ((value, rows.values), (dose, rows.doses)):
        if numbers is not None and (not len(numbers) or bool((numbers == numbers[0]).all())):
            raise ValueError(
                f"{path}: {name!r} is the same for all {len(numbers)} molecules: there is nothing to learn"
            )
    return rows


def split(rows: Rows, tested: float, seed: int, source: Path, *, repeated: bool = False) -> Split:
    """At random, by fingerprint. Of each fingerprint the first row alone, or all if `repeated`.

    ValueError if there are too few.
    """
    keys = np.ascontiguousarray(rows.packed.numpy()).view(f"V{rows.packed.shape[1]}").ravel()
    _, first, group = np.unique(keys, return_index=True, return_inverse=True)
    if len(first) < LEAST:
        raise ValueError(f"{source}: {len(first)} distinct fingerprints, {LEAST} are needed")
    order = torch.randperm(len(first), generator=torch.Generator().manual_seed(seed))
    held = max(2, round(tested * len(first)))
    chosen = torch.zeros(len(first), dtype=torch.bool)
    chosen[order[:held]] = True
    if repeated:
        places = torch.arange(len(rows))
        inside = chosen[torch.from_numpy(group)]
    else:
        places = torch.from_numpy(np.sort(first))
        inside = chosen[torch.from_numpy(group)[places]]
    return Split(rows.take(places[~inside]), rows.take(places[inside]))


def properties(smiles: Sequence[str], name: str, *, progress: bool = False) -> Tensor:
    """One of COMPUTED of each molecule, [N] float32, by RDKit; NaN where there is none."""
    chem = need("rdkit.Chem")
    of = _method(name)
    bar = need("tqdm").tqdm(smiles, unit="mol", desc=name, disable=None if progress else True)
    with need("rdkit.rdBase").BlockLogs():
        molecules = (chem.MolFromSmiles(text) if text else None for text in bar)
        return torch.tensor([float("nan") if mol is None else of(mol) for mol in molecules], dtype=torch.float32)


def numbers(path: Path, found: Fingerprints) -> dict[str, Tensor]:
    """What is known of a file's molecules, [N] each, NaN where it is not: logP, TPSA, and the columns of numbers."""
    if len(found) > _MANY:
        return {}
    names = list(COMPUTED[:2]) if len(found.smiles) and any(found.smiles) else []
    made = {name: _values(path, found, name, False) for name in (*names, *_header(path))}
    some = {name: values[values.isfinite()] for name, values in made.items()}
    return {name: made[name] for name, values in some.items() if len(values) >= LEAST and values.std() > 0}


def _header(path: Path) -> list[str]:
    """Names of a text table's columns."""
    name = path.name.lower().removesuffix(".gz")
    if not name.endswith((".csv", ".tsv")):
        return []
    with gzip.open(path, "rt") if path.suffix.lower() == ".gz" else open(path) as file:
        line = file.readline().lstrip("\ufeff")
    return [field.strip() for field in next(csv.reader([line], delimiter=max(",;\t", key=line.count)))]


def _method(name: str) -> Callable[[object], float]:
    if name == "QED":
        return need("rdkit.Chem.QED").qed
    descriptors = need("rdkit.Chem.rdMolDescriptors")
    if name == "logP":
        return lambda mol: descriptors.CalcCrippenDescriptors(mol)[0]
    return {"TPSA": descriptors.CalcTPSA, "weight": descriptors._CalcMolWt}[name]


def _values(path: Path, found: Fingerprints, name: str, progress: bool) -> Tensor:
    if name in COMPUTED:
        if not len(found.smiles) or not any(found.smiles[:LEAST]):
            raise ValueError(f"{path}: {name} is computed from SMILES, and there are none in this file")
        return properties(found.smiles, name, progress=progress)
    if path.name.lower().removesuffix(".gz").rsplit(".", 1)[-1] not in ("csv", "tsv", "parquet"):
        raise ValueError(f"{path}: {name!r} is none of {', '.join(COMPUTED)}, and a file like this has no columns")
    try:
        # The reader is asked to take the column for the molecules' names: so a value is where its molecule is.
        numbers = [_number(record.name) for record in read(path, name_column=name)]
    except ValueError as error:
        raise ValueError(f"{path}: {str(error).removeprefix('name_column: ')}") from error
    return torch.tensor(numbers)[torch.from_numpy(found.positions())]


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return float("nan")
