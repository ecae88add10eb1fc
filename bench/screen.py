"""Screening: the nearest rows of a database of fingerprints, beside RDKit and a matrix product."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.cases import Contender, Gate, Group, Missing
from fastnuggets import ops, reference

K = 10
CHECKED = 3  # queries whose result is compared
BITS = {"maccs": 166, "morgan": 1024}


def rows(kind: str, count: int) -> Tensor:
    """Packed rows [count, B] as many as asked for: words of two real molecules of RDKit's NCI file, mixed at random."""
    from rdkit import RDConfig

    from fastnuggets.molecules.fingerprints import fingerprints

    with open(Path(RDConfig.RDDataDir) / "NCI" / "first_5K.smi") as file:
        made = fingerprints((line.split()[0] for line in islice(file, 2000)), kind, processes=0)
    words = made.tensor().view(torch.int64)
    generator = torch.Generator().manual_seed(0)
    parents = torch.randint(len(words), (2, count), generator=generator)
    first = torch.rand(count, words.shape[1], generator=generator) < 0.5
    return torch.where(first, words[parents[0]], words[parents[1]]).view(torch.uint8)


def rdkit_group(kind: str, queries: Tensor, database: Tensor, against: str) -> Contender:
    """All similarities as lists of numbers; nothing sorted. On one core: it keeps the interpreter's lock."""
    from rdkit import DataStructs

    from fastnuggets.molecules.fingerprints import unpack

    def vectors(packed: Tensor) -> list[Any]:
        bits = unpack(packed, BITS[kind]).numpy() + ord("0")
        return [DataStructs.CreateFromBitString(row.tobytes().decode()) for row in bits]

    asked, every = vectors(queries[:CHECKED]), vectors(database)
    expected = reference.tanimoto(queries[:CHECKED], database)

    def error(found: list[list[float]]) -> float:
        return (torch.tensor(found, dtype=torch.float64) - expected).abs().max().item()

    return Contender(
        "RDKit, BulkTanimotoSimilarity",
        lambda: [DataStructs.BulkTanimotoSimilarity(one, every) for one in asked],
        error,
        0.0,
        against,
        CHECKED / len(queries),
        "one core; similarities alone",
    )


def nearest_group(device: str, kind: str, count: int, queries: int) -> Iterator[Contender | Missing]:
    try:
        database = rows(kind, count)
    except ImportError as missing:
        yield Missing("all of it", str(missing))
        return
    given = database[:: max(1, count // queries)][:queries].clone()
    here, near = given.to(device), database.to(device)
    expected = reference.tanimoto_topk(given[:CHECKED], database, K, 0.0)

    def error(found: tuple[Tensor, Tensor]) -> float:
        similarity, index = (t[:CHECKED].cpu() for t in found)
        return (similarity - expected[0]).abs().max().item() + (index != expected[1]).sum().item()

    mine = f"ours, {queries} queries"
    yield Contender(mine, lambda: ops.tanimoto_topk(here, near, K), error, 0.0)
    one = f"ours, {queries} queries one by one"
    yield Contender(one, lambda: [ops.tanimoto_topk(q, near, K) for q in here.split(1)], against=mine)
    yield rdkit_group(kind, given, database, mine)
    yield product(kind, here, near, mine)


def product(kind: str, queries: Tensor, database: Tensor, against: str) -> Contender:
    """Bits as float32, their product, and torch.topk: ties in any order."""
    from fastnuggets.molecules.fingerprints import unpack

    part = database[: max(1, len(database) // 5)]
    a, b = unpack(queries, BITS[kind]).float(), unpack(part, BITS[kind]).float().T.contiguous()
    bits = a.sum(1)[:, None], b.sum(0)

    def run() -> Any:
        common = a @ b
        return (common / (bits[0] + bits[1] - common).clamp_min(1)).topk(min(K, len(part)))

    return Contender(
        "PyTorch, product of float32", run, None, 0.0, against, len(part) / len(database), "32 times the memory"
    )


def groups(device: str, quick: bool) -> list[Group]:
    count, queries = (5000, 5) if quick else (100_000, 100)
    bulk, mine = "RDKit, BulkTanimotoSimilarity", f"ours, {queries} queries"

    def made(kind: str) -> Group:
        def make() -> Iterator[Contender | Missing]:
            return nearest_group(device, kind, count, queries)

        title = f"The {K} nearest of {count} rows for {queries} queries, {kind}, {BITS[kind]} bits"
        return Group(kind, title, make, [Gate(f"{kind}, against RDKit on as many cores", bulk, mine, (5, 10))],
                     family="screen")  # fmt: skip

    return [made("morgan"), made("maccs")]
