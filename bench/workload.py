"""One batch of 64 drug-like molecules, stored as coordinates so that the benchmark needs no chemistry.

`python -m bench.workload` makes it again (needs RDKit): molecules of the NCI set that ships with RDKit, one fragment,
29 to 42 heavy atoms of C N O F S Cl Br, QED at least 0.2, in an order shuffled with seed 58, whose first 64 hold 31.6
heavy atoms each; ETKDGv3 with seed 42, then MMFF94.
"""

from __future__ import annotations

import itertools
import random
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

CHANNELS = ("C", "N", "O", "F", "S", "Cl", "Br", "H")
BONDI_RADIUS = (1.70, 1.55, 1.52, 1.47, 1.80, 1.75, 1.85, 1.20)  # angstrom, doi 10.1021/j100785a001
FILE = Path(__file__).with_name("workload.npz")
STEP = 1e-3  # angstrom, that of the stored coordinates


@dataclass(frozen=True)
class Batch:
    """A ragged batch; each molecule is centred on the mean of its atoms."""

    coords: Tensor  # [N, 3] float32, angstrom
    channels: Tensor  # [N] int64
    ptr: Tensor  # [B + 1] int64

    def __len__(self) -> int:
        return len(self.ptr) - 1

    @cached_property
    def radius(self) -> Tensor:  # [N] float32, angstrom
        return self.coords.new_tensor(BONDI_RADIUS)[self.channels]

    @cached_property
    def slices(self) -> list[slice]:
        ends = self.ptr.tolist()
        return [slice(a, b) for a, b in itertools.pairwise(ends)]

    def first(self, molecules: int) -> Batch:
        stop = int(self.ptr[molecules])
        return Batch(self.coords[:stop], self.channels[:stop], self.ptr[: molecules + 1])

    def to(self, device: str) -> Batch:
        return Batch(self.coords.to(device), self.channels.to(device), self.ptr.to(device))


@lru_cache
def load(hydrogens: bool = False) -> Batch:
    """The batch, heavy atoms only or all atoms."""
    stored = np.load(FILE)
    channels = torch.from_numpy(stored["channels"].astype(np.int64))
    molecule = torch.repeat_interleave(torch.from_numpy(stored["sizes"].astype(np.int64)))
    coords = torch.from_numpy(stored["coords"].astype(np.float32) * np.float32(STEP))
    if not hydrogens:
        heavy = channels != CHANNELS.index("H")
        channels, molecule, coords = channels[heavy], molecule[heavy], coords[heavy]
    sizes = torch.bincount(molecule)
    mean = torch.zeros(len(sizes), 3).index_add_(0, molecule, coords) / sizes[:, None]
    ptr = torch.cat([torch.zeros(1, dtype=torch.int64), sizes.cumsum(0)])
    return Batch(coords - mean[molecule], channels, ptr)


def build(molecules: int = 64, order: int = 58, seed: int = 42) -> None:
    """Writes the file that `load` reads."""
    from rdkit import Chem, RDConfig
    from rdkit.Chem import AllChem, Descriptors

    def drug_like(molecule: Chem.Mol) -> bool:
        atoms = molecule.GetAtoms()
        return (
            29 <= len(atoms) <= 42
            and len(Chem.GetMolFrags(molecule)) == 1
            and all(a.GetSymbol() in CHANNELS and not a.GetNumRadicalElectrons() for a in atoms)
            and Descriptors.qed(molecule) >= 0.2
        )

    smiles = [line.split()[0] for line in Path(RDConfig.RDDataDir, "NCI", "first_5K.smi").read_text().splitlines()]
    random.Random(order).shuffle(smiles)
    coords, channels = [], []
    for text in smiles:
        molecule = Chem.MolFromSmiles(text)
        if molecule is None or not drug_like(molecule):
            continue
        molecule = Chem.AddHs(molecule)
        settings = AllChem.ETKDGv3()
        settings.randomSeed = seed
        if AllChem.EmbedMolecule(molecule, settings) != 0 or AllChem.MMFFOptimizeMolecule(molecule, maxIters=2000) < 0:
            continue
        positions = molecule.GetConformer().GetPositions()
        coords.append(np.round((positions - positions.mean(0)) / STEP).astype(np.int16))
        channels.append(np.array([CHANNELS.index(a.GetSymbol()) for a in molecule.GetAtoms()], dtype=np.uint8))
        if len(coords) == molecules:
            break
    sizes = np.array([len(c) for c in coords], dtype=np.int32)
    np.savez_compressed(FILE, coords=np.concatenate(coords), channels=np.concatenate(channels), sizes=sizes)


if __name__ == "__main__":
    build()
