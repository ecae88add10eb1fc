"""Fingerprints of a block of molecules. Worker processes load this file alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

WIDTHS = {"maccs": 24, "morgan": 128}  # bytes of a row: whole words of 64 bits

# The rows one after the other; positions of those that RDKit cannot read; canonical SMILES of the rows, if asked for.
Block = tuple[bytes, list[int], list[str]]


def compute(kind: str, molecules: Sequence[Any], canonical: bool) -> Block:
    """Rows of the SMILES, or molecules, that can be read."""
    from rdkit import Chem, DataStructs, rdBase

    fingerprint, unused = _method(kind)
    rows, broken, smiles = [], [], []
    with rdBase.BlockLogs():
        for position, molecule in enumerate(molecules):
            try:
                mol = Chem.MolFromSmiles(molecule) if isinstance(molecule, str) else Chem.RemoveHs(molecule)
                if mol is None or mol.GetNumAtoms() == 0:
                    raise ValueError
                row = int.from_bytes(DataStructs.BitVectToBinaryText(fingerprint(mol)), "little") >> unused
            except (ValueError, RuntimeError):
                broken.append(position)
            else:
                rows.append(row.to_bytes(WIDTHS[kind], "little"))
                smiles += [Chem.MolToSmiles(mol)] * canonical
    return b"".join(rows), broken, smiles


@cache
def _method(kind: str) -> tuple[Callable[[Any], Any], int]:
    """RDKit's function, and how many of its first bits are never used."""
    from rdkit.Chem import rdFingerprintGenerator, rdMolDescriptors

    if kind == "maccs":
        return rdMolDescriptors.GetMACCSKeysFingerprint, 1
    return rdFingerprintGenerator.GetMorganGenerator(radius=2, fpSize=1024).GetFingerprint, 0
