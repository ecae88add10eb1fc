"""The CUDA kernels of the search, run on the CPU: what the CPU kernel finds, bit for bit."""

import ctypes
from functools import cache

import pytest
import torch
from building import CSRC, HERE, both_orders, load

from fastnuggets import ops

SOURCES = HERE / "screen_driver.cpp", CSRC / "screen" / "screen_kernels.cu"


class Search(ctypes.Structure):
    """That of screen.h."""

    _fields_ = [
        *[(name, ctypes.c_void_p) for name in ("queries", "database")],
        *[(name, ctypes.c_int64) for name in ("Q", "N", "W", "k")],
        ("threshold", ctypes.c_double),
        *[(name, ctypes.c_void_p) for name in ("similarity", "index")],
    ]


@cache
def kernels() -> ctypes.CDLL:
    library = load(*SOURCES, functions=("screen_search",))
    library.screen_scratch_bytes.restype = ctypes.c_size_t
    return library


thread_order = both_orders(kernels)


def rows(count: int, width: int, seed: int, density: float = 0.2) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    bits = torch.rand(count, width, 8, generator=generator) < density
    bits[3::11] = False
    return (bits * (1 << torch.arange(8))).sum(2).to(torch.uint8)


def check(queries: torch.Tensor, database: torch.Tensor, k: int, threshold: float = 0.0) -> None:
    """Outputs and scratch lie between fences that nothing may touch."""
    expected = ops.tanimoto_topk(queries, database, k, threshold=threshold)
    outputs = [torch.full((len(queries) * k + 2,), 7, dtype=t.dtype) for t in expected]
    sizes = len(queries), len(database), queries.shape[1] // 8, k
    pointers = [t.data_ptr() + 8 for t in outputs]
    how = Search(queries.data_ptr(), database.data_ptr(), *sizes, threshold, *pointers)
    scratch = torch.full((kernels().screen_scratch_bytes(ctypes.byref(how)) + 1,), 7, dtype=torch.uint8)
    message = kernels().screen_search(ctypes.byref(how), ctypes.c_void_p(scratch.data_ptr()))
    assert message is None, message.decode()
    for out, wanted in zip(outputs, expected, strict=True):
        assert torch.equal(out[1:-1].view(wanted.shape), wanted)
        assert out[0] == 7
        assert out[-1] == 7
    assert scratch[-1] == 7


@pytest.mark.parametrize("width", [0, 8, 24, 128, 136, 264])
@pytest.mark.parametrize("count", [0, 1, 127, 128, 300])
def test_finds_what_the_cpu_finds(width, count):
    check(rows(3, width, 1), rows(count, width, 2), 5)


def test_more_than_there_are():
    check(rows(2, 24, 1), rows(150, 24, 2), 200)


def test_the_room_is_sorted_while_rows_come():
    """Rows in ascending order of similarity: each is better than all before it."""
    query = rows(1, 128, 5, 0.9)
    bits = (query[:, :, None] >> torch.arange(8) & 1).flatten()
    nested = (bits.bool() & (torch.arange(1024) < torch.arange(0, 1024, 0.4)[:, None])).view(-1, 128, 8)
    database = (nested * (1 << torch.arange(8))).sum(2).to(torch.uint8)
    check(query, database, 9)
    check(query, database, 1024)


def test_several_parts_and_ties():
    database = rows(700, 8, 3).repeat(50, 1)
    check(rows(2, 8, 4), database, 60)


def test_threshold():
    database = rows(400, 16, 2)
    check(database[:4], database, 30, 0.25)
    check(database[:4], database, 30, 1.0)
