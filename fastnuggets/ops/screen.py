"""The nearest rows of a database of packed bits."""

from __future__ import annotations

import torch
from torch import Tensor

_OPS = torch.ops.fastnuggets


def tanimoto_topk(
    queries: Tensor,  # [Q, B] uint8, B a multiple of 8
    database: Tensor,  # [N, B] uint8
    k: int,
    *,
    threshold: float = 0.0,
) -> tuple[Tensor, Tensor]:  # similarity [Q, k] float64, index [Q, k] int64
    """For each query, the ``k`` rows of the database with the largest Tanimoto similarity, the most similar first.

    The similarity of two rows is the number of bits set in both over the number set in either; of two empty rows it is
    0, as in RDKit.
    Rows are compared as fractions of whole numbers, without rounding, and the quotient comes out as the float64 that
    RDKit gives. Of equally similar rows the one with the lower index comes first and is kept first.

    Args:
        queries: packed bits, bit i of a row in byte i // 8 (``molecules.fingerprints.pack``).
        database: as the queries, on the same device. On the CPU it may be mapped from a file that is larger than
            memory; for other sources see ``molecules.screening.tanimoto_topk``.
        k: how many rows. Where there are fewer, the similarity is 0 and the index -1. At most 1024 on a GPU.
        threshold: least similarity of a row that counts, in [0, 1].

    Raises:
        TypeError: a dtype is not uint8.
        ValueError: a shape, a device, ``k`` or ``threshold`` is wrong; more than 4088 bytes a row or 2^32 - 1 rows.

    Not differentiable. Deterministic: the same values for every number of threads and on every device. Never
    synchronises and can be captured in a CUDA graph.
    """
    similarity, index = _OPS.tanimoto_topk(queries, database, k, threshold)
    return similarity, index


@torch.library.register_fake("fastnuggets::tanimoto_topk")
def _(queries, database, k, threshold):  # type: ignore[no-untyped-def]
    shape = (queries.shape[0], k)
    return queries.new_empty(shape, dtype=torch.float64), queries.new_empty(shape, dtype=torch.int64)
