"""fastnuggets.ops.deconvolve and find_atoms: the transform, the filter, and atoms found again under noise."""

import math
import warnings

import pytest
import torch
from torch.autograd import gradcheck

from fastnuggets import nn, ops
from fastnuggets.ops import inverse

WAVE = {"sigma": 1.0, "omega": 0.5}
CHANNELS, SHAPE = 4, (32, 30, 34)


def molecule(atoms=16, seed=0, bond=1.4):
    """[n, 3] angstrom and [n] channels: a chain that does not meet itself, mostly of one kind, about the origin."""
    generator = torch.Generator().manual_seed(seed)
    points = torch.zeros(1, 3)
    while len(points) < atoms:
        start = points[torch.randint(len(points), (1,), generator=generator)]
        new = start + bond * torch.nn.functional.normalize(torch.randn(1, 3, generator=generator))
        if (points - new).norm(dim=1).min() > 0.95 * bond and (new.abs() < 5).all():
            points = torch.cat([points, new])
    kinds = torch.multinomial(torch.tensor([0.7, 0.15, 0.15, 0.0]), atoms, replacement=True, generator=generator)
    return points, kinds


def molecules(count=4, **options):
    made = [molecule(seed=seed, **options) for seed in range(count)]
    sizes = torch.tensor([0] + [len(p) for p, _ in made])
    return torch.cat([p for p, _ in made]), torch.cat([c for _, c in made]), sizes.cumsum(0)


def grid_of(coords, channels, ptr=None, *, noise=0.0, shape=SHAPE, seed=0, **kernel):
    options = {"shape": shape, "num_channels": CHANNELS, "density": "wave", **(kernel or WAVE)}
    grid = ops.voxelize(coords, channels, ptr, **options)
    white = torch.randn(grid.shape, generator=torch.Generator().manual_seed(seed))
    return grid + noise * white.to(grid)


def matched(atoms, coords, channels, ptr, gate=0.5):
    """Recall, precision and root-mean-square distance of what is found within `gate` angstrom in the right channel."""
    hits, squares = 0, 0.0
    for b in range(len(ptr) - 1):
        true, found = slice(ptr[b], ptr[b + 1]), slice(atoms.ptr[b], atoms.ptr[b + 1])
        distance = torch.cdist(coords[true].double(), atoms.positions[found].cpu().double())
        distance[channels[true][:, None] != atoms.channels[found].cpu()] = math.inf
        if distance.numel() == 0:
            continue
        nearest = distance.min(1).values
        hits += int((nearest < gate).sum())
        squares += float(nearest[nearest < gate].square().sum())
    return hits / len(coords), hits / max(1, len(atoms.positions)), math.sqrt(squares / max(1, hits))


# --- the kernel -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("sigma", "omega"), [(1.0, 0.5), (0.75, 0.5), (0.5, 0.0), (1.5, 0.667), (2.0, 0.1)])
def test_transform_is_the_integral(sigma, omega):
    q = torch.tensor([0.0, 1e-3, 0.1, omega, 0.5, 0.77, 1.3], dtype=torch.float64)
    r = torch.linspace(0, 14 * sigma, 200_001, dtype=torch.float64)
    kernel = torch.exp(-(r**2) / (2 * sigma**2)) * torch.cos(2 * math.pi * omega * r)
    integral = torch.trapezoid(kernel * 4 * math.pi * r**2 * torch.sinc(2 * q[:, None] * r), r)
    actual = inverse.wave_transform(q, sigma, omega)
    # Seen: 3e-12 of the largest value.
    assert (actual - integral).abs().max() < 1e-9 * (2 * math.pi) ** 1.5 * sigma**3


def test_sampled_transform_is_the_analytic_one_where_the_grid_resolves_the_kernel():
    shape, spacing = (40, 36, 45), (0.5, 0.45, 0.4)
    analytic = inverse.transform(shape, 1.0, 0.5, spacing)
    sampled = inverse.sampled_transform(shape, 1.0, 0.5, spacing)
    # Seen: 3e-6 of the energy, what is aliased.
    assert (analytic - sampled).square().sum() < 1e-5 * sampled.square().sum()
    aliased = inverse.wave_transform(inverse.frequencies(shape, (0.5,) * 3), 0.5, 1.0) / 0.125
    assert not torch.equal(inverse.transform(shape, 0.5, 1.0, (0.5,) * 3), aliased)


@pytest.mark.parametrize(
    ("sigma", "omega", "number"), [(0.35, 0, 1.8e2), (0.5, 0, 3.4e5), (0.5, 2, 1.3e4), (0.7, 1 / 0.7, 8.9e3)]
)
def test_condition_number(sigma, omega, number):
    assert ops.condition_number(48, sigma=sigma, omega=omega).number == pytest.approx(number, rel=0.06)


def test_blind_kernels_are_those_that_lose_atoms():
    assert ops.condition_number(48, sigma=1.0, omega=0.5).blind < 0.1
    assert ops.condition_number(48, sigma=1.0).blind > 0.8


def test_kernel_warnings():
    for sigma, omega in [(1.0, 0.5), (0.75, 0.5), (1.0, 0.6), (1.5, 0.667), (2.0, 0.5)]:
        assert ops.kernel_warnings(sigma, omega) == []
    assert "does not resolve" in ops.kernel_warnings(1.0, 0.2)[0]
    assert "aliased" in ops.kernel_warnings(1.0, 1.0)[0]
    assert "aliased" in ops.kernel_warnings(1.0, 0.5, spacing=(0.5, 1.0, 0.5))[0]
    assert len(ops.kernel_warnings(0.3, 0.2, spacing=1.0)) == 1


# --- deconvolve -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("padding", [0.0, None])
@pytest.mark.parametrize("spacing", [0.5, (0.5, 0.4, 0.45)])
def test_one_atom_becomes_a_peak_of_height_one(spacing, padding, device):
    edge = torch.tensor(spacing if isinstance(spacing, tuple) else (spacing,) * 3)
    index = torch.tensor([20, 11, 16])
    at = (index - (torch.tensor(SHAPE) - 1) / 2) * edge
    grid = grid_of(at[None].to(device), torch.tensor([1], device=device), spacing=spacing, **WAVE)
    estimate = ops.deconvolve(grid, **WAVE, spacing=spacing, noise=0.05, padding=padding)
    assert estimate.shape == grid.shape
    assert estimate[0, 1].argmax() == (index[0] * SHAPE[1] + index[1]) * SHAPE[2] + index[2]
    # Seen: 1.00003; the padded filter sees the cut tail of the kernel.
    assert estimate[0, 1].max().item() == pytest.approx(1, abs=2e-3)
    assert estimate[0, [0, 2, 3]].abs().max() == 0
    far = torch.ones(SHAPE, dtype=torch.bool)
    far[tuple(slice(i - 4, i + 5) for i in index)] = False
    assert estimate[0, 1].cpu()[far].abs().max() < 0.1


def test_deconvolve_separates_atoms_that_the_grid_melts(device):
    coords = torch.tensor([[-0.7, 0.0, 0.0], [0.7, 0.0, 0.0]], device=device)
    channels = torch.zeros(2, dtype=torch.int64, device=device)
    line = ops.deconvolve(grid_of(coords, channels, shape=(33, 33, 33)), **WAVE, noise=0.01)[0, 0, :, 16, 16]
    assert line[16] < 0.6 * line[[15, 17]].min()


@pytest.mark.filterwarnings("ignore:.*ill-posed")
@pytest.mark.parametrize("noise", [0.1, [[0.1, 0.3]]])
def test_deconvolve_is_differentiable(noise):
    grid = torch.randn(1, 2, 5, 4, 6, dtype=torch.float64, requires_grad=True)
    kernels = {"sigma": [0.8, 1.0], "omega": [0.4, 0.5], "padding": 1.0}
    assert gradcheck(lambda g: ops.deconvolve(g, noise=torch.tensor(noise), **kernels), grid)


def test_each_channel_has_its_kernel_and_noise(device):
    coords, channels, ptr = (t.to(device) for t in molecules(2))
    sigma, omega = torch.tensor([1.0, 0.9, 0.75, 1.0]), torch.tensor([0.5, 0.5, 0.45, 0.6])
    grid = grid_of(coords, channels, ptr, sigma=sigma.to(device), omega=omega.to(device))
    noise = torch.tensor([[0.1, 0.2, 0.1, 0.4], [0.3, 0.2, 0.01, 0.0]], device=device)
    together = ops.deconvolve(grid, sigma=sigma, omega=omega.tolist(), noise=noise)
    for b in range(2):
        for c in range(CHANNELS):
            one = grid[b : b + 1, c : c + 1]
            alone = ops.deconvolve(one, sigma=float(sigma[c]), omega=float(omega[c]), noise=noise[b, c], padding=3.0)
            # Seen: 2e-6. The channels together are padded for the widest kernel, which is 3 angstrom too.
            torch.testing.assert_close(together[b, c], alone[0, 0], rtol=0, atol=2e-5)


def test_padding_keeps_the_walls_apart(device):
    at = torch.tensor([[-7.9, 0.0, 0.0]], device=device)  # the wall is at 8 angstrom
    grid = grid_of(at, torch.tensor([0], device=device))
    opposite = [ops.deconvolve(grid, **WAVE, noise=0.1, padding=p)[0, 0, -4:].abs().max() for p in (0.0, None)]
    assert opposite[0] > 3 * opposite[1]


def test_noise_is_estimated_where_no_atom_is():
    coords, channels, ptr = molecules(2)
    level = inverse._noise_level(grid_of(coords, channels, ptr, noise=0.2))
    # The median of 1 000 voxels is good to 3.7 % (one standard deviation), of 8 000 to 1.3 %.
    assert ((level - 0.2).abs() < 0.03).all()
    assert (level.mean() - 0.2).abs() < 0.006


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_deconvolve_keeps_the_dtype(dtype, device):
    grid = grid_of(*(t.to(device) for t in molecules(1)))
    estimate = ops.deconvolve(grid.to(dtype), **WAVE, noise=0.1)
    assert estimate.dtype == dtype
    exact = ops.deconvolve(grid.to(dtype).double(), **WAVE, noise=0.1)
    assert (estimate.double() - exact).abs().max() < {2: 0.05, 4: 1e-5, 8: 1e-15}[dtype.itemsize]


def test_ill_posed_kernels_are_announced():
    grid = torch.zeros(1, 1, 16, 16, 16)
    with pytest.warns(UserWarning, match=r"ill-posed: \d+% of the frequencies .* \(condition number"):
        ops.deconvolve(grid, sigma=1.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ops.deconvolve(torch.zeros(1, 1, 48, 48, 48), **WAVE)


# --- find_atoms -------------------------------------------------------------------------------------------------------

# Largest root-mean-square distance; the Cramer-Rao bound is 0.019 angstrom for each 10 % of noise, and this was seen:
# 1e-4 (the fit cuts the kernel at 1e-3 of its peak), 0.019, 0.037, 0.076.
ACCURACY = {0.0: 3e-4, 0.1: 0.025, 0.2: 0.05, 0.4: 0.1}


@pytest.mark.parametrize("noise", ACCURACY)
def test_every_atom_is_found_and_no_other(noise, device):
    coords, channels, ptr = molecules()
    grid = grid_of(coords, channels, ptr, noise=noise)
    for given in (noise, None):
        atoms = ops.find_atoms(grid.to(device), **WAVE, noise=given)
        recall, precision, distance = matched(atoms, coords, channels, ptr)
        assert (recall, precision) == (1, 1)
        assert distance < ACCURACY[noise]
        assert (atoms.amplitudes - 1).abs().max() < 5 * 0.085 * noise / 0.4 + 1e-3


def test_a_gaussian_as_wide_loses_atoms():
    coords, channels, ptr = molecules()
    atoms = ops.find_atoms(grid_of(coords, channels, ptr, noise=0.1, sigma=1.0, omega=0.0), sigma=1.0, noise=0.1)
    assert matched(atoms, coords, channels, ptr)[0] < 0.8


def test_other_spacings_and_kernels(device):
    coords, channels, ptr = molecules(2)
    kernel = {"sigma": torch.tensor([1.0, 0.75, 0.9, 1.0]), "omega": torch.tensor([0.5, 0.5, 0.5, 0.5])}
    spacing, shape = (0.5, 0.4, 0.45), (30, 36, 33)
    grid = grid_of(coords, channels, ptr, noise=0.1, spacing=spacing, shape=shape, **kernel)
    atoms = ops.find_atoms(grid.to(device), **kernel, spacing=spacing)
    recall, precision, distance = matched(atoms, coords, channels, ptr)
    assert (recall, precision) == (1, 1)
    assert distance < 0.03


@pytest.mark.parametrize("padding", [0.0, None])
def test_atoms_at_the_walls(padding, device):
    wall = 7.5  # angstrom; the outermost voxels have their centres at 7.75
    coords = wall * torch.tensor([[1.0, 0, 0], [-1, 0.1, 0], [0, 1, 0.2], [0, -0.9, -1], [0.2, 0.1, 0.9], [1, -1, 0]])
    channels = torch.tensor([0, 0, 0, 0, 1, 1])
    grid = grid_of(coords, channels, noise=0.05, shape=(32, 32, 32))
    atoms = ops.find_atoms(grid.to(device), **WAVE, padding=padding)
    recall, precision, distance = matched(atoms, coords, channels, torch.tensor([0, 6]))
    assert (recall, precision) == (1, 1)
    assert distance < 0.05


def test_noise_alone_holds_no_atoms(device):
    grid = 0.4 * torch.randn(2, 3, 32, 32, 32, generator=torch.Generator().manual_seed(0))
    atoms = ops.find_atoms(grid.to(device), **WAVE)
    assert atoms.positions.shape == (0, 3)
    assert atoms.ptr.tolist() == [0, 0, 0]
    torch.testing.assert_close(atoms.residual.cpu(), grid.square().sum((2, 3, 4)), rtol=1e-5, atol=0)


@pytest.mark.parametrize("shape", [(0, 3, 8, 8, 8), (2, 0, 8, 8, 8), (2, 3, 1, 1, 1), (1, 1, 2, 1, 30)])
def test_nothing_to_find(shape, device):
    grid = torch.zeros(shape, device=device)
    atoms = ops.find_atoms(grid, **WAVE)
    assert atoms.positions.shape == (0, 3)
    assert atoms.ptr.tolist() == [0] * (shape[0] + 1)
    assert torch.equal(atoms.residual, grid.new_zeros(shape[:2]))
    assert ops.deconvolve(grid, **WAVE, noise=0.1).shape == shape


def test_molecules_without_atoms_between_others(device):
    coords, channels, _ = molecules(2)
    ptr = torch.tensor([0, 0, 16, 16, 32, 32])
    atoms = ops.find_atoms(grid_of(coords, channels, ptr).to(device), **WAVE)
    assert atoms.ptr.tolist() == ptr.tolist()
    assert matched(atoms, coords, channels, ptr)[:2] == (1, 1)


def test_order_residual_and_types(device):
    coords, channels, ptr = (t.to(device) for t in molecules(3))
    grid = grid_of(coords, channels, ptr, noise=0.1)
    atoms = ops.find_atoms(grid, **WAVE)
    assert [t.dtype for t in atoms] == [torch.float32, torch.int64, torch.float32, torch.int64, torch.float32]
    for b in range(3):
        own = atoms.channels[atoms.ptr[b] : atoms.ptr[b + 1]]
        assert torch.equal(own, own.sort().values)
    model = ops.voxelize(
        atoms.positions, atoms.channels, atoms.ptr, shape=SHAPE, num_channels=CHANNELS, density="wave",
        weights=atoms.amplitudes, **WAVE,
    )  # fmt: skip
    torch.testing.assert_close(atoms.residual, (grid - model).square().sum((2, 3, 4)), rtol=1e-4, atol=1e-4)


def test_of_two_channels_at_one_place_the_stronger_stays(device):
    coords = torch.tensor([[0.0, 0.0, 0.0], [0.5, 0.0, 0.0], [3.0, 0.0, 0.0], [4.2, 0.0, 0.0]])
    channels = torch.tensor([0, 1, 0, 1])
    grid = ops.voxelize(
        coords, channels, shape=32, num_channels=2, density="wave", weights=torch.tensor([1.0, 0.8, 1.0, 1.0]), **WAVE
    )
    atoms = ops.find_atoms(grid.to(device), **WAVE)
    assert atoms.channels.tolist() == [0, 0, 1]
    # Energy of a wave of 0.8 on this grid is 22.3 * 0.64.
    assert atoms.residual[0, 1].item() == pytest.approx(14.3, rel=0.02)


def test_amplitudes_are_fitted(device):
    coords, channels, ptr = molecules(1)
    weights = torch.linspace(0.85, 1.2, len(coords))
    grid = ops.voxelize(
        coords, channels, ptr, shape=SHAPE, num_channels=CHANNELS, density="wave", weights=weights, **WAVE
    )
    atoms = ops.find_atoms(grid.to(device), **WAVE)
    nearest = torch.cdist(coords, atoms.positions.cpu()).argmin(1)
    torch.testing.assert_close(atoms.amplitudes.cpu()[nearest], weights, rtol=0, atol=1e-3)


def test_the_residual_shows_what_the_seeds_missed():
    """The first atom of the chain has neighbours on all sides, which hide it from the filter."""
    coords, channels, ptr = molecules(1)
    grid = grid_of(coords, channels, ptr)
    recall = [matched(ops.find_atoms(grid, **WAVE, rounds=r), coords, channels, ptr)[0] for r in (0, 1)]
    assert recall == [15 / 16, 1]


def test_a_batch_is_its_molecules(device):
    coords, channels, ptr = molecules(5)
    grid = grid_of(coords, channels, ptr, noise=0.1).to(device)
    together = ops.find_atoms(grid, **WAVE)
    for b in range(5):
        alone = ops.find_atoms(grid[b : b + 1], **WAVE)
        own = slice(together.ptr[b], together.ptr[b + 1])
        assert torch.equal(alone.channels, together.channels[own])
        # Transforms of one grid and of several need not round alike.
        torch.testing.assert_close(alone.positions, together.positions[own], rtol=0, atol=1e-4)


@pytest.mark.parametrize("padding", [0.0, None])
def test_same_bits_for_any_number_of_threads(threads, padding):
    coords, channels, ptr = molecules()
    grid = grid_of(coords, channels, ptr, noise=0.3)
    results = []
    for n in (1, 2, 3):
        threads(n)
        results.append(ops.find_atoms(grid, **WAVE, padding=padding))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_layout_and_history_of_the_grid_do_not_matter():
    coords, channels, ptr = molecules(2)
    grid = grid_of(coords, channels, ptr, noise=0.1)
    expected = ops.find_atoms(grid, **WAVE)
    turned = grid.permute(4, 2, 0, 3, 1).contiguous().permute(2, 4, 1, 3, 0).requires_grad_()
    assert not turned.is_contiguous()
    with torch.autocast("cpu", torch.bfloat16):
        atoms = ops.find_atoms(turned, **WAVE)
    assert all(torch.equal(a, b) for a, b in zip(atoms, expected, strict=True))
    assert not any(t.requires_grad for t in atoms)


# --- bad input --------------------------------------------------------------------------------------------------------

BAD = [
    ({"grid": torch.zeros(2, 3, 4, 5)}, ValueError, "grid: expected"),
    ({"grid": torch.zeros(1, 1, 4, 4, 0)}, ValueError, "grid: expected"),
    ({"grid": torch.zeros(1, 1, 4, 4, 4, dtype=torch.int64)}, TypeError, "grid: expected a floating"),
    ({"grid": [[1.0]]}, TypeError, "grid: expected a floating"),
    ({"grid": torch.full((1, 1, 4, 4, 4), math.nan)}, ValueError, "grid: expected finite"),
    ({"grid": torch.full((1, 1, 4, 4, 4), math.inf)}, ValueError, "grid: expected finite"),
    ({"sigma": 0.0}, ValueError, "sigma: expected"),
    ({"sigma": -1.0}, ValueError, "sigma: expected"),
    ({"sigma": math.nan}, ValueError, "sigma: expected"),
    ({"sigma": [1.0, 1.0]}, ValueError, "sigma: expected one number or one for each of 1"),
    ({"omega": -0.1}, ValueError, "omega: expected"),
    ({"omega": math.inf}, ValueError, "omega: expected"),
    ({"spacing": 0.0}, ValueError, "spacing: expected"),
    ({"spacing": (0.5, -0.5, 0.5)}, ValueError, "spacing: expected"),
    ({"spacing": (0.5, 0.5)}, ValueError, "spacing: expected"),
    ({"noise": -0.1}, ValueError, "noise: expected"),
    ({"noise": torch.ones(3, 2)}, ValueError, "noise: expected"),
    ({"padding": -1.0}, ValueError, "padding: expected"),
    ({"padding": math.nan}, ValueError, "padding: expected"),
]


@pytest.mark.filterwarnings("ignore:.*ill-posed")
@pytest.mark.parametrize("function", [ops.deconvolve, ops.find_atoms], ids=lambda f: f.__name__)
@pytest.mark.parametrize(("changes", "error", "message"), BAD)
def test_bad_input(function, changes, error, message):
    with pytest.raises(error, match=message):
        function(**{"grid": torch.zeros(1, 1, 4, 4, 4), **WAVE, **changes})


def test_bad_rounds():
    with pytest.raises(ValueError, match="rounds: expected"):
        ops.find_atoms(torch.zeros(1, 1, 4, 4, 4), **WAVE, rounds=-1)


def fit_arguments():
    coords, channels, ptr = molecules(1)
    grid = grid_of(coords, channels, ptr)[0]
    one = torch.ones(4)
    ends = torch.tensor([0, 16, 16, 16, 16])
    return [grid, coords, torch.ones(16), ends, one, 0.5 * one, [0.5] * 3, 1e-3, 4]


@pytest.mark.parametrize(
    ("index", "value", "error", "message"),
    [
        (0, torch.zeros(4, 4, 4), ValueError, "grid must be"),
        (0, torch.zeros(4, 8, 8, 8, dtype=torch.float16), TypeError, "grid must be float32 or float64"),
        (1, torch.zeros(16, 2), ValueError, "positions must be"),
        (1, torch.zeros(16, 3, dtype=torch.float64), TypeError, "positions must be"),
        (2, torch.zeros(3), ValueError, "amplitudes must be"),
        (3, torch.tensor([0, 9, 3, 16, 16]), ValueError, "ptr must ascend"),
        (3, torch.tensor([0, 1, 2, 3, 4]), ValueError, "ptr must ascend"),
        (3, torch.tensor([0, 16]), ValueError, "ptr must be"),
        (3, torch.zeros(5), TypeError, "ptr must be int64"),
        (4, torch.ones(3), ValueError, "sigma must be"),
        (5, torch.ones(3), ValueError, "omega must be"),
        (6, [0.5, 0.0, 0.5], ValueError, "spacing must be"),
        (7, 0.0, ValueError, "cutoff must be"),
        (8, -1, ValueError, "iterations must"),
    ],
)
def test_fit_atoms_names_what_is_wrong(index, value, error, message):
    arguments = fit_arguments()
    arguments[index] = value
    with pytest.raises(error, match=message):
        torch.ops.fastnuggets.fit_atoms(*arguments)


# --- the layer --------------------------------------------------------------------------------------------------------


def test_layer_is_the_op(device):
    grid = grid_of(*(t.to(device) for t in molecules(1)), noise=0.1)
    layer = nn.Deconvolution(1.0, 0.5, noise=0.1)
    assert torch.equal(layer(grid), ops.deconvolve(grid, **WAVE, noise=0.1))
    assert "sigma=1.0, omega=0.5" in repr(layer)


def test_layer_warns_at_construction():
    with pytest.warns(UserWarning, match="does not resolve"):
        nn.Deconvolution([1.0, 1.0, 1.0], [0.5, 0.5, 0.0])
    with pytest.warns(UserWarning, match="aliased"):
        nn.Deconvolution(1.0, 0.5, spacing=1.0)
    with pytest.raises(ValueError, match="sigma: expected"):
        nn.Deconvolution(0.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        nn.Deconvolution([1.0, 0.75], 0.5)


def test_a_noise_level_far_too_low_is_refused_before_the_fit():
    grid = torch.randn(1, 1, 40, 40, 40, generator=torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match="noise is too low for this grid"):
        ops.find_atoms(grid, sigma=1.0, omega=0.5, noise=1e-3)
