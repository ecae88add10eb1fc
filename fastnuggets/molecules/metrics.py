"""The MOSES metrics of generated molecules: Polykovskiy et al., Front. Pharmacol. 11, 565644 (2020).

As the benchmark's own code computes them, also where that differs from the paper.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastnuggets.molecules._describe import PROPERTIES
from fastnuggets.molecules.descriptions import (
    Activations,
    Embed,
    Statistics,
    chemnet,
    describe,
    installed_filters,
    read_filters,
)
from fastnuggets.molecules.fingerprints import unpack
from fastnuggets.ops import tanimoto_topk

__all__ = [
    "PROPERTIES",
    "Activations",
    "Metrics",
    "Statistics",
    "chemnet",
    "compare",
    "count_similarity",
    "describe",
    "evaluate",
    "frechet",
    "installed_filters",
    "internal_diversity",
    "nearest_similarity",
    "novelty",
    "read_filters",
    "unique",
    "wasserstein",
]

_BITS = 1024
_ROWS = 1024  # of a block of similarities, 4 MiB
_FCD_BIAS = 1300  # over the number of molecules: what random training molecules score against the test set
_FEW_FOR_FCD = 10_000
_FEW = 1000

_NAMES = {
    "valid": "valid",
    "unique_1k": "unique@1000",
    "unique_10k": "unique@10000",
    "fcd": "FCD/Test",
    "snn": "SNN/Test",
    "frag": "Frag/Test",
    "scaf": "Scaf/Test",
    "fcd_scaffold": "FCD/TestSF",
    "snn_scaffold": "SNN/TestSF",
    "frag_scaffold": "Frag/TestSF",
    "scaf_scaffold": "Scaf/TestSF",
    "int_div": "IntDiv",
    "int_div2": "IntDiv2",
    "filters": "Filters",
    "logp": "logP",
    "sa": "SA",
    "qed": "QED",
    "weight": "weight",
    "novelty": "Novelty",
}


class Metrics(NamedTuple):
    """The metrics of a set; nan for one that was not asked for, or is not defined (``notes`` says why).

    All but ``valid`` are of the valid molecules, duplicates kept where nothing else is said.
    """

    molecules: int  # SMILES given
    valid: float  # share that RDKit parses
    unique_1k: float  # distinct ones of the first 1000 / 1000, or / their number if there are fewer
    unique_10k: float
    novelty: float  # share of the distinct ones that are not in the training set
    filters: float  # share without PAINS, MCF, rings of 8 atoms or more, charges, or other elements than CNSOFClBrH
    int_div: float  # 1 - mean similarity of all pairs, each with itself included
    int_div2: float  # 1 - mean over molecules of the root of the mean squared similarity to all
    snn: float  # mean similarity to the nearest molecule of the reference
    frag: float  # cosine of the counts of BRICS fragments
    scaf: float  # cosine of the counts of Bemis-Murcko scaffolds of two rings or more
    fcd: float  # Frechet distance of ChemNet's activations
    snn_scaffold: float  # the same four against the second reference, whose scaffolds are in no training set
    frag_scaffold: float
    scaf_scaffold: float
    fcd_scaffold: float
    logp: float  # Wasserstein-1 distances to the reference: Crippen's logP,
    sa: float  # synthetic accessibility,
    qed: float  # drug-likeness,
    weight: float  # molecular weight, g/mol
    notes: tuple[str, ...]  # what to know before these numbers are compared with others

    def named(self) -> dict[str, float]:
        """Those that are not nan, in the order and under the names of MOSES."""
        values = {name: getattr(self, field) for field, name in _NAMES.items()}
        return {name: value for name, value in values.items() if not math.isnan(value)}


def evaluate(
    generated: Iterable[str] | Statistics,
    reference: Iterable[str] | Statistics,
    *,
    train: Iterable[str] | Statistics | None = None,
    scaffold_reference: Iterable[str] | Statistics | None = None,
    filters: Sequence[str] | None = None,
    fcd: bool | Embed = False,
    similar_at_most: int = 50_000,
    device: str = "cpu",
    processes: int | None = None,
    progress: bool = False,
) -> Metrics:
    """Metrics of generated SMILES, broken ones among them, against a reference: MOSES' test set, or any other.

    ``train``: SMILES of the training set, for novelty. ``scaffold_reference``: a second reference. A set may be
    ``Statistics``, so that it is worked out once; ``describe`` makes them, ``save`` keeps them. ``filters``: SMARTS of
    the medicinal chemistry filters; None: those of an installed molsets, or none. ``fcd``: whether to compute FCD with
    ``chemnet()``, or another network. ``similar_at_most``: SNN and the internal diversity of a larger set are those of
    so many molecules of it, at random with a fixed seed. ``device``: of these two and of ChemNet. ``processes`` and
    ``progress`` as in ``describe``.

    Each of the ``notes`` is a warning too. ValueError for a set without molecules.
    """
    embed = chemnet(device) if fcd is True else fcd or None
    if filters is None:
        filters = installed_filters()

    def described(given: Iterable[str] | Statistics, label: str, **options: object) -> Statistics:
        if isinstance(given, Statistics):
            return given
        bar = label if progress else False
        return describe(given, processes=processes, progress=bar, **options)  # type: ignore[arg-type]

    made = described(generated, "generated", filters=filters or (), embed=embed)
    second = None if scaffold_reference is None else described(scaffold_reference, "scaffold reference", embed=embed)
    metrics = compare(
        made,
        described(reference, "reference", embed=embed),
        train=None if train is None else described(train, "train", names_only=True),
        scaffold_reference=second,
        similar_at_most=similar_at_most,
        device=device,
    )
    if not filters and not isinstance(generated, Statistics):
        metrics = metrics._replace(notes=(*metrics.notes, NO_FILTERS))
    for note in metrics.notes:
        warnings.warn(note, stacklevel=2)
    return metrics


NO_FILTERS = "filters: without the medicinal chemistry filters (MCF), of which no table was given"


def compare(
    generated: Statistics,
    reference: Statistics,
    *,
    train: Statistics | None = None,
    scaffold_reference: Statistics | None = None,
    similar_at_most: int = 50_000,
    device: str = "cpu",
) -> Metrics:
    """``evaluate`` of statistics; FCD where both sets have activations."""
    if generated.total == 0:
        raise ValueError("generated: there are no molecules")
    for name, given in (("reference", reference), ("scaffold_reference", scaffold_reference), ("train", train)):
        if given is not None and given.valid == 0:
            raise ValueError(f"{name}: there is no molecule that RDKit can read")
        if given is not None and name != "train" and len(given.fingerprints) != given.valid:
            raise ValueError(f"{name}: these are statistics of names only")
    part = _part(generated.fingerprints, similar_at_most)
    first = _against(generated, part, reference, device)
    second = _against(generated, part, scaffold_reference, device) if scaffold_reference else [math.nan] * 4
    diversity = internal_diversity(part, device=device)
    distances = [_distance(generated.properties[:, i], reference.properties[:, i]) for i in range(len(PROPERTIES))]
    values = (
        generated.total,
        generated.valid / generated.total,
        unique(generated.keys, 1000),
        unique(generated.keys, 10_000),
        math.nan if train is None else novelty(generated.keys, train.keys),
        _ratio(generated.passing, generated.valid),
        *diversity,
        *first,
        *second,
        *distances,
    )
    return Metrics._make((*values, tuple(_notes(generated, reference, scaffold_reference, train, len(part)))))


def unique(keys: np.ndarray, k: int) -> float:
    """Share of distinct values among the first ``k`` of keys [V]; nan if there is none."""
    return _ratio(len(np.unique(keys[:k])), min(k, len(keys)))


def novelty(keys: np.ndarray, train: np.ndarray) -> float:
    """Share of the distinct keys [V] that are not in train [T]; nan if there is none."""
    distinct = np.unique(keys)
    return _ratio(len(distinct) - int(np.isin(distinct, train).sum()), len(distinct))


def nearest_similarity(fingerprints: np.ndarray, reference: np.ndarray, device: str = "cpu") -> float:
    """SNN: mean over packed rows [N, 128] uint8 of the Tanimoto similarity to the nearest of [M, 128]; nan if a set is
    empty."""
    if not len(fingerprints) or not len(reference):
        return math.nan
    database = torch.from_numpy(reference).to(device)
    total = 0.0
    for first in range(0, len(fingerprints), _ROWS):  # so that Ctrl-C is heard in between
        queries = torch.from_numpy(fingerprints[first : first + _ROWS]).to(device)
        total += float(tanimoto_topk(queries, database, 1)[0].sum())
    return total / len(fingerprints)


def internal_diversity(fingerprints: np.ndarray, device: str = "cpu") -> tuple[float, float]:
    """IntDiv and IntDiv2 of packed rows [N, 128] uint8; nan if there is none. All N^2 pairs, each row with itself too;
    the similarity of two rows without a bit is 1.

    For IntDiv2 the root is taken for each molecule and then averaged, as in MOSES' code; its paper has one root of all.
    """
    if not len(fingerprints):
        return math.nan, math.nan
    sums = torch.zeros(2, len(fingerprints), dtype=torch.float64, device=device)
    for i, rows in enumerate(_unpacked(fingerprints, device)):
        here = slice(i * _ROWS, i * _ROWS + len(rows))
        for j, others in enumerate(_unpacked(fingerprints[i * _ROWS :], device), i):
            similar = _similarity(rows, others)
            for power, values in enumerate((similar, similar.square())):
                sums[power, here] += values.sum(1, dtype=torch.float64)
                if i != j:  # the other half of the matrix
                    sums[power, j * _ROWS : j * _ROWS + len(others)] += values.sum(0, dtype=torch.float64)
    means = sums / len(fingerprints)
    return 1 - float(means[0].mean()), 1 - float(means[1].sqrt().mean())


def count_similarity(counts: Mapping[str, int], others: Mapping[str, int]) -> float:
    """Cosine of two vectors of counts; nan if one has none."""
    dot = sum(count * others.get(name, 0) for name, count in counts.items())
    squares = [sum(count * count for count in given.values()) for given in (counts, others)]
    return dot / math.sqrt(squares[0]) / math.sqrt(squares[1]) if all(squares) else math.nan


def wasserstein(values: np.ndarray, others: np.ndarray) -> float:
    """Wasserstein-1 distance of two samples [N] and [M]: the area between their distribution functions; nan if one is
    empty."""
    if not len(values) or not len(others):
        return math.nan
    places = np.sort(np.concatenate([values, others]))
    shares = [np.searchsorted(np.sort(given), places[:-1], "right") / len(given) for given in (values, others)]
    return float((np.abs(shares[0] - shares[1]) * np.diff(places)).sum())


def frechet(activations: Activations, others: Activations) -> float:
    """|m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)), with the root's trace from the eigenvalues of the symmetric
    C1^(1/2) C2 C1^(1/2): real, and never from a matrix root that does not exist."""
    values, vectors = np.linalg.eigh(activations.covariance)
    root = (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T
    crossed = np.linalg.eigvalsh(root @ others.covariance @ root)
    traces = np.trace(activations.covariance) + np.trace(others.covariance)
    shift = activations.mean - others.mean
    return float(shift @ shift + traces - 2 * np.sqrt(np.maximum(crossed, 0)).sum())


def _against(generated: Statistics, part: np.ndarray, reference: Statistics, device: str) -> list[float]:
    """SNN, Frag, Scaf and FCD."""
    ours, theirs = generated.activations, reference.activations
    return [
        nearest_similarity(part, reference.fingerprints, device),
        count_similarity(generated.fragments, reference.fragments),
        count_similarity(generated.scaffolds, reference.scaffolds),
        math.nan if ours is None or theirs is None else frechet(ours, theirs),
    ]


def _part(rows: np.ndarray, most: int) -> np.ndarray:
    if len(rows) <= most:
        return rows
    return rows[np.sort(np.random.default_rng(0).choice(len(rows), most, replace=False))]


def _distance(values: np.ndarray, others: np.ndarray) -> float:
    return wasserstein(values[~np.isnan(values)], others[~np.isnan(others)])


def _ratio(part: int | None, whole: int) -> float:
    return math.nan if part is None or not whole else part / whole


def _unpacked(packed: np.ndarray, device: str) -> Iterator[Tensor]:
    """Bits [n, 1024] float32 of some rows at a time."""
    for first in range(0, len(packed), _ROWS):
        yield torch.from_numpy(unpack(packed[first : first + _ROWS], _BITS)).to(device).float()


def _similarity(rows: Tensor, others: Tensor) -> Tensor:
    """Tanimoto similarities [n, m] float32 of bits [n, 1024] and [m, 1024]: the numbers of bits are exact."""
    common = rows @ others.T
    either = rows.sum(1)[:, None] + others.sum(1) - common
    return common.div_(either).nan_to_num_(nan=1.0)


def _notes(
    generated: Statistics, reference: Statistics, second: Statistics | None, train: Statistics | None, similar: int
) -> Iterator[str]:
    valid = generated.valid
    if not valid:
        yield "there is no valid molecule: valid is 0, the others are not defined"
        return
    for k in (1000, 10_000):
        if valid < k:
            yield f"unique@{k} is of {valid} molecules: there are no more"
    if valid < _FEW:
        yield f"{valid} molecules are few: MOSES compares 30,000, and most metrics depend on their number"
    if similar < valid:
        yield f"SNN and IntDiv are those of {similar} molecules of {valid}, at random"
    if generated.crashed:
        yield f"{generated.crashed} molecules counted as broken, as a process died over them"
    sets = {"reference": reference, "scaffold reference": second, "train": train}
    for name, given in sets.items():
        if given is not None and given.valid < given.total:
            yield f"{name}: {given.total - given.valid} of {given.total} molecules are broken and left out"
    for name, given in {"generated": generated, "reference": reference}.items():
        lost = int(np.isnan(given.properties).any(1).sum())
        if lost:
            yield f"{name}: {lost} molecules have no logP, SA, QED or weight and are left out of these"
        if not given.scaffolds:
            yield f"Scaf is not defined: no molecule of {name} has a scaffold of two rings"
    for name, given in {"reference": reference, "scaffold reference": second}.items():
        yield from _fcd_notes(generated.activations, name, given)


def _fcd_notes(ours: Activations | None, name: str, given: Statistics | None) -> Iterator[str]:
    if ours is None or given is None:
        return
    if given.activations is None:
        yield f"FCD is not computed: the statistics of the {name} were made without it"
        return
    fewest = min(ours.count, given.activations.count)
    if fewest < _FEW_FOR_FCD:
        yield (
            f"FCD of {fewest} molecules is too high by about {_FCD_BIAS / fewest:.2g}; "
            "compare it with none of another number of molecules"
        )
