"""What the metrics want to know of a block of molecules. Worker processes load this file alone."""

from __future__ import annotations

import csv
import math
import os
import re
from array import array
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import cache
from typing import Any

PROPERTIES = ("logp", "sa", "qed", "weight")
_ELEMENTS = {1, 6, 7, 8, 9, 16, 17, 35}  # what MOSES allows
_LARGEST_RING = 7
_SCAFFOLD_RINGS = 2
_TROUBLE = (ValueError, RuntimeError, ArithmeticError)  # what RDKit and its Python parts raise

# SMILES; how much is wanted: names alone, all but the filters, or all; SMARTS of what must not be in a molecule.
Task = tuple[Sequence[str], int, tuple[str, ...]]
NAMES, PARTS, ALL = range(3)

# Of n SMILES of which v are valid: canonical SMILES [n], empty where broken; Morgan bits [v, 128] uint8; properties
# [v, 4] float64, nan where there is none; whether it passes the filters [v] uint8; fragments and scaffolds.
Block = tuple[list[str], bytes, bytes, bytes, dict[str, int], dict[str, int]]


def describe(smiles: Sequence[str], level: int, alerts: tuple[str, ...]) -> Block:
    from rdkit import DataStructs, rdBase

    names: list[str] = []
    bits, properties, passed = bytearray(), array("d"), bytearray()
    fragments: Counter[str] = Counter()
    scaffolds: Counter[str] = Counter()
    with rdBase.BlockLogs():
        for text in smiles:
            name, mol = _read(text)
            names.append(name)
            if not name or level == NAMES:
                continue
            bits += DataStructs.BitVectToBinaryText(_morgan()(mol))
            properties.extend(_properties(mol))
            fragments.update(_fragments(mol))
            scaffolds.update(_scaffold(mol))
            if level == ALL:
                passed.append(_passes(mol, name, alerts))
    return names, bytes(bits), properties.tobytes(), bytes(passed), dict(fragments), dict(scaffolds)


def _read(text: str) -> tuple[str, Any]:
    """Canonical SMILES and the molecule it stands for: all that follows is the same however a SMILES was written."""
    from rdkit import Chem

    try:
        mol = Chem.MolFromSmiles(text)
        if mol is None or mol.GetNumAtoms() == 0:
            return "", None
        name = Chem.MolToSmiles(mol)
        again = mol if name == text else Chem.MolFromSmiles(name)
    except _TROUBLE:
        return "", None
    return name, mol if again is None else again


@cache
def _morgan() -> Any:
    from rdkit.Chem import rdFingerprintGenerator

    return rdFingerprintGenerator.GetMorganGenerator(radius=2, fpSize=1024).GetFingerprint


def _properties(mol: Any) -> tuple[float, ...]:
    """In the order of PROPERTIES; all nan if one of them is not defined, as QED of a molecule too large for it."""
    from rdkit.Chem import QED
    from rdkit.Contrib.SA_Score import sascorer

    undefined = (math.nan,) * len(PROPERTIES)
    try:
        parts = QED.properties(mol)
        values = (parts.ALOGP, sascorer.calculateScore(mol), QED.qed(mol, qedProperties=parts), parts.MW)
    except _TROUBLE:
        return undefined
    return values if all(map(math.isfinite, values)) else undefined


def _fragments(mol: Any) -> list[str]:
    """What is left when the bonds of BRICS are cut, each with its ends marked."""
    from rdkit import Chem

    try:
        return Chem.MolToSmiles(Chem.FragmentOnBRICSBonds(mol)).split(".")
    except _TROUBLE:
        return []


def _scaffold(mol: Any) -> list[str]:
    """The Bemis-Murcko scaffold, if it has two rings or more."""
    from rdkit import Chem
    from rdkit.Chem.Scaffolds import MurckoScaffold

    try:
        scaffold = MurckoScaffold.GetScaffoldForMol(mol)
        return [Chem.MolToSmiles(scaffold)] if scaffold.GetRingInfo().NumRings() >= _SCAFFOLD_RINGS else []
    except _TROUBLE:
        return []


def _passes(mol: Any, name: str, alerts: tuple[str, ...]) -> bool:
    """Small rings, no charge, usual elements, no PAINS, no alert, and readable without its stereochemistry."""
    from rdkit import Chem

    if any(len(ring) > _LARGEST_RING for ring in mol.GetRingInfo().AtomRings()):
        return False
    if any(atom.GetFormalCharge() or atom.GetAtomicNum() not in _ELEMENTS for atom in mol.GetAtoms()):
        return False
    if _is_pains(mol):
        return False
    if alerts:
        with_hydrogens = Chem.AddHs(mol)
        if any(with_hydrogens.HasSubstructMatch(pattern) for pattern in _patterns(alerts)):
            return False
    if not re.search(r"[@/\\]|\[\d", name):
        return True
    return Chem.MolFromSmiles(Chem.MolToSmiles(mol, isomericSmiles=False)) is not None


@cache
def _patterns(smarts: tuple[str, ...]) -> list[Any]:
    from rdkit import Chem

    return [Chem.MolFromSmarts(text) for text in smarts]


def _is_pains(mol: Any) -> bool:
    """Whether RDKit's FilterCatalog of PAINS matches; a quarter of its time, as most patterns are ruled out by bits."""
    from rdkit import Chem

    patterns, masks = _pains()
    missing = ~_bits(Chem.PatternFingerprint(mol))
    return any(mol.HasSubstructMatch(patterns[i]) for i, mask in enumerate(masks) if not mask & missing)


@cache
def _pains() -> tuple[list[Any], list[int]]:
    """The 480 patterns that RDKit carries, hydrogens made a property of their atoms, and the bits each must have."""
    from rdkit import Chem, RDConfig

    with open(os.path.join(RDConfig.RDDataDir, "Pains", "wehi_pains.csv"), newline="") as file:
        patterns = [Chem.MergeQueryHs(Chem.MolFromSmarts(row[0])) for row in csv.reader(file) if row]
    for pattern in patterns:
        pattern.UpdatePropertyCache(strict=False)
        Chem.FastFindRings(pattern)
    return patterns, [_bits(Chem.PatternFingerprint(pattern)) for pattern in patterns]


def _bits(fingerprint: Any) -> int:
    from rdkit import DataStructs

    return int.from_bytes(DataStructs.BitVectToBinaryText(fingerprint), "little")


def not_smarts(texts: Iterable[str]) -> list[str]:
    """Those of the texts that RDKit cannot read as SMARTS."""
    from rdkit import Chem, rdBase

    with rdBase.BlockLogs():
        return [text for text in texts if not text or Chem.MolFromSmarts(text) is None]


def warm_up() -> None:
    describe(["C"], ALL, ())
