"""Canonical SMILES of a block. Worker processes load this file alone."""

from __future__ import annotations

from collections.abc import Sequence


def compute(texts: Sequence[str]) -> list[str]:
    """The SMILES as ``fastnuggets.molecules.read`` gives them; empty where RDKit cannot read one."""
    from rdkit import Chem, rdBase

    found = []
    with rdBase.BlockLogs():
        for text in texts:
            try:
                mol = Chem.MolFromSmiles(text)
                found.append("" if mol is None else Chem.MolToSmiles(Chem.RemoveHs(mol, sanitize=False)))
            except (ValueError, RuntimeError):
                found.append("")
    return found
