"""The CUDA kernel of fit_atoms, run on the CPU, against the definition in fastnuggets.reference."""

import ctypes
from functools import cache

import pytest
import torch
from building import CSRC, HERE, both_orders, load

from fastnuggets import reference

SOURCES = HERE / "fit_driver.cpp", CSRC / "voxelize" / "fit_kernels.cu"
# Seen: 2.5e-7 and 3e-14 angstrom.
TOLERANCE = {torch.float32: 2e-6, torch.float64: 1e-12}


@cache
def kernels() -> ctypes.CDLL:
    return load(*SOURCES, functions=("fit_float", "fit_double"))


thread_order = both_orders(kernels)


def fit(grid, positions, amplitudes, ptr, sigma, omega, spacing, cutoff, iterations):
    positions, amplitudes = positions.clone(), amplitudes.clone()
    function = kernels().fit_double if grid.dtype == torch.float64 else kernels().fit_float
    message = function(
        *(ctypes.c_void_p(t.data_ptr()) for t in (grid, sigma, omega, ptr, positions, amplitudes)),
        ctypes.c_int64(len(grid)),
        (ctypes.c_int64 * 3)(*grid.shape[1:]),
        (ctypes.c_double * 3)(*spacing),
        ctypes.c_double(cutoff),
        ctypes.c_int64(iterations),
    )
    assert message is None, message.decode()
    return positions, amplitudes


def problems(counts, shape, dtype, noise=0.1, spacing=(0.5, 0.6, 0.4)):
    """Grids of so many atoms each, somewhere in the box or just outside, and a start 0.1 angstrom off."""
    generator = torch.Generator().manual_seed(0)

    def uniform(*size):
        return torch.rand(*size, generator=generator, dtype=torch.float64)

    ptr = torch.tensor([0, *counts]).cumsum(0)
    extent = torch.tensor(shape) * torch.tensor(spacing)
    positions = (uniform(sum(counts), 3) - 0.5) * extent
    sigma, omega = 0.5 + 0.3 * uniform(len(counts)), 0.4 + 0.2 * uniform(len(counts))
    group = torch.repeat_interleave(torch.arange(len(counts)), ptr.diff())
    grid = reference.voxelize(
        positions,
        torch.zeros(len(positions), dtype=torch.int64),
        ptr,
        shape=shape,
        spacing=spacing,
        num_channels=1,
        density="wave",
        sigma=sigma[group, None],
        omega=omega[group, None],
    ).squeeze(1)
    grid += noise * (uniform(*grid.shape) - 0.5)
    start = positions + 0.2 * (uniform(*positions.shape) - 0.5)
    tensors = (grid, start, torch.ones(len(start)), ptr, sigma, omega)
    return *(t.to(dtype) if t is not ptr else t for t in tensors), spacing, 1e-3


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("iterations", [0, 1, 8])
@pytest.mark.parametrize(
    ("counts", "shape"),
    [
        ((2, 0, 1), (7, 6, 9)),
        ((9, 1), (11, 12, 10)),
        ((1,), (1, 1, 1)),
        ((3,), (2, 1, 40)),
        ((0, 0), (3, 3, 3)),
        ((), (3, 3, 3)),
    ],
)
def test_fit_is_the_definition(counts, shape, iterations, dtype):
    arguments = problems(counts, shape, dtype)
    expected = reference.fit_atoms(
        *(t.double() if torch.is_tensor(t) and t.is_floating_point() else t for t in arguments), iterations
    )
    for actual, wanted in zip(fit(*arguments, iterations), expected, strict=True):
        assert actual.shape == wanted.shape
        assert actual.isfinite().all()
        assert torch.allclose(actual.double(), wanted, rtol=0, atol=TOLERANCE[dtype]), (actual - wanted).abs().max()


def test_an_atom_out_of_reach_stays():
    grid, start, amplitudes, ptr, sigma, omega, spacing, cutoff = problems((3,), (8, 8, 8), torch.float32)
    start[1] = 100.0
    positions, _ = fit(grid, start, amplitudes, ptr, sigma, omega, spacing, cutoff, 8)
    assert torch.equal(positions[1], start[1])
    assert positions.isfinite().all()
