"""Atoms without bonds, as an inverted grid gives them, made into molecules."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from fastnuggets.molecules.files import need

BOND_LEVELS = ("bond orders", "single bonds", "atoms only")
_ITERATIONS = 1000  # of RDKit's search for bond orders, which is exponential in the worst case


def bonded(numbers: Sequence[int], coords: np.ndarray) -> tuple[Any, str]:
    """An RDKit molecule of atoms at coords [n, 3] (angstrom), and which of ``BOND_LEVELS`` it reached.

    Bond orders need all hydrogens and a neutral molecule (``rdDetermineBonds``); without hydrogens the atoms that are
    near enough are joined by single bonds; where that breaks a valence they stay apart.
    """
    chem, base, determine = (need(f"rdkit.{name}") for name in ("Chem", "rdBase", "Chem.rdDetermineBonds"))
    mol = chem.RWMol()
    for number in numbers:
        mol.AddAtom(chem.Atom(int(number)))
    conformer = chem.Conformer(len(numbers))
    conformer.Set3D(True)
    if len(numbers):
        conformer.SetPositions(np.asarray(coords, np.float64))
    mol.AddConformer(conformer, assignId=True)
    with base.BlockLogs():
        if 1 in numbers:
            try:
                full = chem.Mol(mol)
                determine.DetermineBonds(full, charge=0, maxIterations=_ITERATIONS)
                return full, BOND_LEVELS[0]
            except (ValueError, RuntimeError):
                pass
        try:
            joined = chem.Mol(mol)
            determine.DetermineConnectivity(joined)
            chem.SanitizeMol(joined)
            return joined, BOND_LEVELS[1]
        except (ValueError, RuntimeError):
            return mol.GetMol(), BOND_LEVELS[2]


def sdf_record(mol: Any, name: str, properties: dict[str, str]) -> str:
    """One record of an SDF file, ``$$$$`` included."""
    chem, base = need("rdkit.Chem"), need("rdkit.rdBase")
    mol.SetProp("_Name", " ".join(name.split()))
    with base.BlockLogs():
        block = str(chem.MolToMolBlock(mol, kekulize=False))
    lines = [f">  <{key}>\n{value}\n\n" for key, value in properties.items()]
    return block + "".join(lines) + "$$$$\n"
