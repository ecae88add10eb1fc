"""How found atoms agree with the true ones: what representations of molecules can be compared by."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from fastnuggets.ops.inverse import Atoms

GATE = 0.5  # angstrom, between an atom and what counts as finding it


class Score(NamedTuple):
    """How found atoms agree with the true ones, of one channel (or of all together)."""

    true: int
    found: int
    matched: int
    squared: float  # of the distances of the matched, summed

    @property
    def precision(self) -> float:
        return self.matched / self.found if self.found else math.nan

    @property
    def recall(self) -> float:
        return self.matched / self.true if self.true else math.nan

    @property
    def f1(self) -> float:
        """The harmonic mean of precision and recall."""
        return 2 * self.matched / (self.true + self.found) if self.true + self.found else math.nan

    @property
    def rmse(self) -> float:
        return math.sqrt(self.squared / self.matched) if self.matched else math.nan


def sorted_atoms(positions: Tensor, channels: Tensor, owner: Tensor, molecules: int) -> Atoms:
    """Atoms in any order, sorted by molecule and channel as `find_atoms` sorts them; `owner` [M] is the molecule."""
    most = int(channels.max()) + 1 if len(channels) else 1
    order = (owner * most + channels).argsort(stable=True)
    ptr = torch.searchsorted(owner[order], torch.arange(molecules + 1, device=owner.device))
    residual = torch.zeros(molecules, most, device=positions.device)
    return Atoms(positions[order], channels[order], torch.ones_like(positions[order, 0]), ptr, residual)


def voxel_atoms(grid: Tensor, spacing: float, threshold: float = 0.5) -> Atoms:
    """The atoms of a one-hot grid [B, C, D, H, W], which has no kernel to undo: the centres of the voxels above
    `threshold` that none of their 26 neighbours exceeds."""
    peaks = (grid > threshold) & (grid == torch.nn.functional.max_pool3d(grid, 3, 1, 1))
    molecule, channel, *index = peaks.nonzero().unbind(1)
    middle = (torch.tensor(grid.shape[2:], device=grid.device) - 1) / 2
    atoms = sorted_atoms((torch.stack(index, 1) - middle) * spacing, channel, molecule, len(grid))
    return atoms._replace(residual=torch.zeros(grid.shape[:2], device=grid.device))


def match(found: Atoms, truth: Atoms) -> tuple[Tensor, Tensor]:
    """For each found atom the true atom of its molecule and channel it stands for, or -1; and their distance [M].

    Pairs nearer than GATE, the nearest first, each atom once.
    """
    partner = torch.full((len(found.positions),), -1)
    distance = torch.full((len(found.positions),), math.nan)
    taken: set[int] = set()
    for one, other, apart in _pairs(found, truth):
        if partner[one] < 0 and other not in taken:
            partner[one], distance[one] = other, apart
            taken.add(other)
    return partner, distance


def _pairs(found: Atoms, truth: Atoms) -> list[tuple[int, int, float]]:
    pairs: list[tuple[int, int, float]] = []
    for b in range(len(truth.ptr) - 1):
        (f0, f1), (t0, t1) = found.ptr[b : b + 2].tolist(), truth.ptr[b : b + 2].tolist()
        apart = torch.cdist(found.positions[f0:f1], truth.positions[t0:t1])
        near = (apart < GATE) & (found.channels[f0:f1, None] == truth.channels[t0:t1])
        rows, columns = near.nonzero(as_tuple=True)
        pairs += zip((rows + f0).tolist(), (columns + t0).tolist(), apart[rows, columns].tolist(), strict=True)
    return sorted(pairs, key=lambda pair: pair[2])


def compare(found: Atoms, truth: Atoms, channels: int) -> list[Score]:
    """One score a channel, and one of all atoms."""
    partner, distance = match(found, truth)
    scores = []
    for channel in range(channels):
        own = found.channels == channel
        matched = own & (partner >= 0)
        scores.append(
            Score(
                int((truth.channels == channel).sum()),
                int(own.sum()),
                int(matched.sum()),
                distance[matched].double().square().sum().item(),
            )
        )
    true, number, matched_in_all, squared = (sum(values) for values in zip(*scores, strict=True))
    return [*scores, Score(int(true), int(number), int(matched_in_all), squared)]


def recovered(found: Atoms, truth: Atoms) -> Tensor:
    """Molecules of which every atom was found and nothing else, [B] bool."""
    partner, _ = match(found, truth)
    owner = torch.arange(len(truth.ptr) - 1).repeat_interleave(found.ptr.diff())
    matched = torch.zeros(len(truth.ptr) - 1, dtype=torch.int64).index_add_(0, owner, (partner >= 0).long())
    return (matched == found.ptr.diff()) & (matched == truth.ptr.diff())
