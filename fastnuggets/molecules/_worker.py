"""One conformer. Worker processes load this file alone."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

_GAP = 3.0  # angstrom between the fragments of a salt, about two van der Waals radii

Task = tuple[str, int, bool, float]  # SMILES, seed, optimize, seconds allowed
Result = tuple[bytes, bytes, str, bool]  # numbers [n] uint8, coords [n, 3] float32, reason of failure, final


def embed(smiles: str, seed: int, optimize: bool, timeout: float) -> Result:
    """ETKDGv3 conformer with all hydrogens, in the atom order of AddHs(MolFromSmiles(smiles)).

    ``final`` is False for a failure that might not happen again.
    """
    import numpy as np
    from rdkit import Chem, rdBase
    from rdkit.Chem import rdDistGeom, rdForceFieldHelpers

    start = time.monotonic()
    with rdBase.BlockLogs():
        try:
            mol = Chem.AddHs(Chem.MolFromSmiles(smiles))
            if any(atom.GetAtomicNum() == 0 for atom in mol.GetAtoms()):
                return b"", b"", "it has a dummy atom", True
            parameters: Any = rdDistGeom.ETKDGv3()
            parameters.randomSeed = seed
            if hasattr(parameters, "timeout"):
                parameters.timeout = math.ceil(timeout)
            if rdDistGeom.EmbedMolecule(mol, parameters) < 0:
                parameters.useRandomCoords = True
                if rdDistGeom.EmbedMolecule(mol, parameters) < 0:
                    if time.monotonic() - start >= timeout:
                        return b"", b"", f"no conformer within {timeout:g} s", False
                    return b"", b"", "RDKit finds no conformer", True
            _set_apart(mol.GetConformer(), Chem.GetMolFrags(mol))
            if optimize and rdForceFieldHelpers.MMFFHasAllMoleculeParams(mol):
                rdForceFieldHelpers.MMFFOptimizeMolecule(mol, ignoreInterfragInteractions=False)
            numbers = np.array([atom.GetAtomicNum() for atom in mol.GetAtoms()], np.uint8)
            coords = mol.GetConformer().GetPositions().astype(np.float32)
        except Exception as error:
            return b"", b"", in_one_line(error), not isinstance(error, MemoryError)
    if not np.isfinite(coords).all():
        return b"", b"", "RDKit's coordinates are not finite", True
    return numbers.tobytes(), coords.tobytes(), "", True


def in_one_line(error: Exception) -> str:
    """What an exception says; RDKit's own go on for many lines, of which the second is the reason."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return ": ".join(lines[:2])[:200] or type(error).__name__


def _set_apart(conformer: Any, fragments: Sequence[Sequence[int]]) -> None:
    """Line up the fragments of a salt along x: RDKit embeds each about the origin, one inside the other."""
    positions = conformer.GetPositions()
    for before, fragment in pairwise(map(list, fragments)):
        positions[fragment, 0] += positions[before, 0].max() + _GAP - positions[fragment, 0].min()
    conformer.SetPositions(positions)


def warm_up() -> None:
    import rdkit.Chem.rdDistGeom
    import rdkit.Chem.rdForceFieldHelpers  # noqa: F401
