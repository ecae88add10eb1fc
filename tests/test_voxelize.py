"""fastnuggets.ops.voxelize against its definition in fastnuggets.reference, in values, gradients and errors."""

import math
import os
import subprocess
import sys

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from fastnuggets import build_info, ops, reference

DENSITIES = {  # what each density is given; nearest and trilinear have no size
    "nearest": {},
    "trilinear": {},
    "sphere": {"radius": 1.1},
    "gaussian": {"sigma": 0.7},
    "wave": {"sigma": 0.8, "omega": 0.6},
    "molgrid": {"radius": 1.2},
    "molvoxel": {"radius": 1.2},
    "pyuul": {"radius": 1.0},
    "moleculekit": {"radius": 1.3},
    "deepfrag": {"radius": 1.2},
}
COMBINE = ["sum", "max", "union"]
SHAPE, SPACING = (7, 5, 9), (0.5, 0.75, 0.625)
EXACT = 1e-18  # a cut-off beyond the last digit of float64


def walk(n, seed=0, step=1.45):
    """[n, 3] angstrom: a chain that does not meet itself, near the origin, as dense as a molecule."""
    generator = torch.Generator().manual_seed(seed)
    points = torch.zeros(1, 3, dtype=torch.float64)
    while len(points) < n:
        start = points[torch.randint(len(points), (1,), generator=generator)]
        new = start + step * torch.nn.functional.normalize(torch.randn(1, 3, generator=generator, dtype=torch.float64))
        if (points - new).norm(dim=1).min() > 0.9 * step:
            points = torch.cat([points, new])
    return points - points.mean(0)


def batch(sizes=(6, 0, 4), channels=3, soft=False, seed=0, dtype=torch.float64, device="cpu"):
    """coords, channels (index or features), ptr of a ragged batch; the values fit float32."""
    generator = torch.Generator().manual_seed(seed)
    coords = torch.cat([torch.zeros(0, 3, dtype=torch.float64)] + [walk(n, seed + i) for i, n in enumerate(sizes) if n])
    index = torch.randint(channels, (len(coords),), generator=generator)
    features = torch.rand(len(coords), channels, generator=generator)
    ptr = torch.tensor([0, *sizes]).cumsum(0)
    channel = features.to(device, dtype) if soft else index.to(device)
    return coords.float().to(device, dtype), channel, ptr.to(device)


def rotations(*sizes, seed=0, dtype=torch.float64, device="cpu"):
    generator = torch.Generator().manual_seed(seed)
    q, r = torch.linalg.qr(torch.randn(*sizes, 3, 3, generator=generator, dtype=torch.float64))
    q = q * torch.sign(torch.diagonal(r, dim1=-2, dim2=-1)).unsqueeze(-2)
    q[..., 0] *= torch.linalg.det(q).unsqueeze(-1)
    return q.float().to(device, dtype)


def poses(*sizes, seed=0, dtype=torch.float64, device="cpu"):
    generator = torch.Generator().manual_seed(seed)
    return {
        "center": torch.randn(*sizes, 3, generator=generator).to(device, dtype) * 0.5,
        "rotation": rotations(*sizes, seed=seed, dtype=dtype, device=device),
        "translation": torch.randn(*sizes, 3, generator=generator).to(device, dtype) * 0.5,
    }


def double(value):
    return value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value


def expected(coords, channels, ptr=None, **options):
    options = {name: double(value) for name, value in options.items() if name not in ("cutoff", "dtype")}
    return reference.voxelize(double(coords), double(channels), ptr, **options)


def assert_near(actual, wanted, tolerance):
    """Largest error, of the largest value (or 1)."""
    assert actual.shape == wanted.shape
    if actual.numel():
        error = (actual.detach().double() - wanted.detach().double()).abs().max().item()
        scale = max(1.0, wanted.detach().abs().max().item())
        assert error <= tolerance * scale, f"{error / scale:.3g}"


def assert_same(actual, wanted):
    assert (actual.shape, actual.dtype) == (wanted.shape, wanted.dtype)
    assert torch.equal(actual, wanted)


def pull(function, leaves, coords, channels, ptr=None, **options):
    """Gradients of the named arguments for a fixed random cotangent."""
    values = {"coords": coords, "channels": channels, **options}
    values.update({name: values[name].detach().clone().requires_grad_() for name in leaves})
    recorded = [values[name] for name in leaves]
    grid = function(values.pop("coords"), values.pop("channels"), ptr, **values)
    if grid.numel() == 0:
        return [torch.zeros_like(leaf) for leaf in recorded]
    cotangent = torch.randn(grid.shape, generator=torch.Generator().manual_seed(1)).to(grid)
    return torch.autograd.grad(grid, recorded, cotangent, allow_unused=True, materialize_grads=True)


def assert_gradients_near(tolerance, coords, channels, ptr=None, **options):
    """Every floating argument's gradient: the largest error, of the largest component (or 1)."""
    values = {"coords": coords, "channels": channels, **options}
    leaves = [name for name, v in values.items() if isinstance(v, torch.Tensor) and v.is_floating_point()]
    actual = pull(ops.voxelize, leaves, coords, channels, ptr, **options)
    wanted = pull(expected, leaves, *map(double, (coords, channels)), ptr, **{n: double(v) for n, v in options.items()})
    for name, a, w in zip(leaves, actual, wanted, strict=True):
        assert a.dtype == values[name].dtype
        assert torch.isfinite(a).all(), name
        try:
            assert_near(a, w, tolerance)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from None


# --- values and gradients ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("soft", [False, True], ids=["index", "features"])
@pytest.mark.parametrize("combine", COMBINE)
@pytest.mark.parametrize("density", DENSITIES)
def test_every_density(density, combine, soft, device):
    coords, channels, ptr = batch(soft=soft, device=device)
    weights = torch.linspace(0.3, 1, len(coords), dtype=coords.dtype, device=device)
    options = {**DENSITIES[density], **poses(3, device=device), "weights": weights, "cutoff": EXACT}
    options.update(shape=SHAPE, spacing=SPACING, density=density, combine=combine)
    if not soft:
        options["num_channels"] = 3
    actual = ops.voxelize(coords, channels, ptr, **options)
    assert actual.shape == (3, 3, *SHAPE)
    assert actual.count_nonzero() > 0
    assert_near(actual, expected(coords, channels, ptr, **options), 1e-12)
    assert_gradients_near(1e-12, coords, channels, ptr, **options)


@pytest.mark.parametrize("density", DENSITIES)
def test_magnitude_adds_up_what_each_atom_is_alone(density, device):
    coords, channels, ptr = batch(device=device)
    weights = torch.linspace(-1, 1, len(coords), dtype=torch.float64, device=device)
    options = {"shape": SHAPE, "num_channels": 3, "density": density, "cutoff": EXACT, **DENSITIES[density]}
    alone = torch.arange(len(coords) + 1, device=device)

    def wanted(coords, channels, ptr, weights, **options):
        each = expected(coords, channels, alone, weights=weights, combine="sum", **options).abs()
        return torch.stack([molecule.sum(0) for molecule in each.split(ptr.diff().tolist())])

    def actual(*args, **options):
        return ops.voxelize(*args, combine="magnitude", **options)

    assert_near(
        actual(coords, channels, ptr, weights=weights, **options),
        wanted(coords, channels, ptr, weights, **options),
        1e-12,
    )
    given = {"weights": weights, **options}
    pairs = [pull(function, ["coords", "weights"], coords, channels, ptr, **given) for function in (actual, wanted)]
    for a, w in zip(*pairs, strict=True):
        assert_near(a, w, 1e-12)


@pytest.mark.parametrize("density", DENSITIES)
def test_defaults(density, device):
    """One molecule, the density's own rule of combination, the default spacing."""
    coords, channels, _ = batch((9,), device=device)
    options = {"shape": 6, "num_channels": 3, "density": density, "cutoff": EXACT, **DENSITIES[density]}
    actual = ops.voxelize(coords, channels, **options)
    assert actual.shape == (1, 3, 6, 6, 6)
    assert_near(actual, expected(coords, channels, **options), 1e-12)


def test_radius_in_place_of_sigma(device):
    coords, channels, ptr = batch(device=device)
    options = {"shape": SHAPE, "num_channels": 3}
    for density, omega in (("gaussian", {}), ("wave", {"omega": 0.5})):
        from_radius = ops.voxelize(coords, channels, ptr, radius=1.5, density=density, **omega, **options)
        assert_same(from_radius, ops.voxelize(coords, channels, ptr, sigma=0.75, density=density, **omega, **options))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("density", DENSITIES)
def test_every_width(density, dtype, device):
    """The last axis is vectorised: rows shorter than a vector, whole vectors, tails."""
    coords, channels, ptr = batch((5, 3), dtype=dtype, device=device)
    for width in (1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 24, 31, 33):
        options = {"shape": (3, 2, width), "spacing": (0.9, 0.9, 4.0 / width), "num_channels": 3, "density": density}
        options.update(cutoff=EXACT, **DENSITIES[density])
        actual = ops.voxelize(coords, channels, ptr, **options)
        assert_near(actual, expected(coords, channels, ptr, **options), 1e-12 if dtype == torch.float64 else 2e-6)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("density", DENSITIES)
def test_float32_gradients_of_every_width(density, weighted, device):
    """Rows of one to three whole vectors, whose sums stay in registers, and others; positions alone, and all sums."""
    coords, channels, ptr = batch((5, 3), dtype=torch.float32, device=device)
    for width in (3, 8, 13, 16, 21, 24, 32, 33):
        options = {"shape": (3, 2, width), "spacing": (0.9, 0.9, 4.0 / width), "num_channels": 3, "density": density}
        options.update(cutoff=EXACT, **DENSITIES[density])
        if weighted:
            options["weights"] = torch.linspace(0.3, 1, len(coords), device=device)
        assert_gradients_near(2e-6, coords, channels, ptr, **options)  # measured: 9.2e-7


SIZES = {
    "number": lambda n, c: 0.8,
    "tensor": lambda n, c: torch.tensor(0.8, dtype=torch.float64),
    "channel": lambda n, c: torch.linspace(0.5, 0.9, c, dtype=torch.float64),
    "atom": lambda n, c: torch.linspace(0.5, 0.9, n, dtype=torch.float64)[:, None],
    "both": lambda n, c: torch.linspace(0.5, 0.9, n * c, dtype=torch.float64).reshape(n, c),
}


@pytest.mark.parametrize("soft", [False, True], ids=["index", "features"])
@pytest.mark.parametrize("given", SIZES)
def test_sizes_for_all_or_a_channel_or_an_atom(given, soft, device):
    coords, channels, ptr = batch(soft=soft, device=device)
    size = SIZES[given](len(coords), 3)
    size = size.to(device) if isinstance(size, torch.Tensor) else size
    options = {"shape": SHAPE, "spacing": SPACING, "cutoff": EXACT}
    if not soft:
        options["num_channels"] = 3
    for density in ("wave", "molgrid", "pyuul", "moleculekit"):
        own = {"sigma": size, "omega": size} if density == "wave" else {"radius": size}
        actual = ops.voxelize(coords, channels, ptr, density=density, **own, **options)
        assert_near(actual, expected(coords, channels, ptr, density=density, **own, **options), 1e-12)
        assert_gradients_near(1e-12, coords, channels, ptr, density=density, **own, **options)


POSES = {
    "center": lambda p: {"center": p["center"]},
    "rotation": lambda p: {"rotation": p["rotation"]},
    "translation": lambda p: {"translation": p["translation"]},
    "all": lambda p: p,
}


@pytest.mark.parametrize("given", POSES)
@pytest.mark.parametrize("sizes", [(), (3,), (3, 1), (3, 4)], ids=str)
def test_poses(sizes, given, device):
    coords, channels, ptr = batch(device=device)
    pose = POSES[given](poses(*sizes, device=device))
    options = {"shape": SHAPE, "spacing": SPACING, "num_channels": 3, "sigma": 0.6, "cutoff": EXACT, **pose}
    actual = ops.voxelize(coords, channels, ptr, **options)
    assert actual.shape == (3, *sizes[1:], 3, *SHAPE)
    assert_near(actual, expected(coords, channels, ptr, **options), 1e-12)
    assert_gradients_near(1e-12, coords, channels, ptr, **options)


def test_poses_of_different_kinds(device):
    """Seven rotations about a centre for each molecule, one translation for all."""
    coords, channels, ptr = batch(device=device)
    pose = {"center": (3,), "rotation": (3, 7), "translation": ()}
    pose = {name: poses(*sizes, device=device)[name] for name, sizes in pose.items()}
    options = {"shape": 5, "num_channels": 3, "sigma": 0.6, "cutoff": EXACT, **pose}
    actual = ops.voxelize(coords, channels, ptr, **options)
    assert actual.shape == (3, 7, 3, 5, 5, 5)
    assert_near(actual, expected(coords, channels, ptr, **options), 1e-12)
    assert_gradients_near(1e-12, coords, channels, ptr, **options)


def test_each_pose_is_the_call_with_that_pose(device):
    coords, channels, ptr = batch(dtype=torch.float32, device=device)
    pose = poses(3, 4, dtype=torch.float32, device=device)
    options = {"shape": SHAPE, "num_channels": 3, "density": "molgrid", "radius": 1.5}
    together = ops.voxelize(coords, channels, ptr, **pose, **options)
    for k in range(4):
        one = ops.voxelize(coords, channels, ptr, **{name: p[:, k] for name, p in pose.items()}, **options)
        assert_same(together[:, k], one)


def at_voxel(*index):
    """Box coordinates of a voxel centre."""
    return [(i - (n - 1) / 2) * h for i, n, h in zip(index, SHAPE, SPACING, strict=True)]


EDGE = [n * h / 2 for n, h in zip(SHAPE, SPACING, strict=True)]
SPECIAL = {  # coordinates of the atoms, sizes of the molecules
    "outside, near": ([[EDGE[0] + 0.2, 0, 0], [0, -EDGE[1] - 0.3, EDGE[2] + 0.1]], (2,)),
    "outside, far": ([[1e3, 0, 0], [0, -1e9, 0], [3e18, -3e18, 1e30]], (3,)),
    "on a voxel centre": ([at_voxel(0, 0, 0), at_voxel(3, 2, 4), at_voxel(6, 4, 8)], (3,)),
    "on the border": ([EDGE, [-e for e in EDGE], [EDGE[0], 0, 0], [0, -EDGE[1], 0]], (4,)),
    "two on a spot": ([[0.1, 0.2, 0.3], [0.1, 0.2, 0.3], at_voxel(1, 1, 1), at_voxel(1, 1, 1)], (4,)),
    "one atom": ([[0.1, 0.2, 0.3]], (1,)),
    "molecules without an atom": ([[0.1, 0.2, 0.3]], (0, 0, 1, 0)),
    "no atom": ([], (0, 0)),
    "no molecule": ([], ()),
}


@pytest.mark.parametrize("soft", [False, True], ids=["index", "features"])
@pytest.mark.parametrize("place", SPECIAL)
def test_special_places(place, soft, device):
    points, sizes = SPECIAL[place]
    coords = torch.tensor(points, dtype=torch.float64, device=device).reshape(-1, 3)
    n = len(coords)
    features = torch.linspace(0.3, 1, 2 * n, dtype=torch.float64, device=device).reshape(n, 2)
    channels = features if soft else torch.zeros(n, dtype=torch.int64, device=device)
    ptr = torch.tensor([0, *sizes], device=device).cumsum(0)
    for density, own in DENSITIES.items():
        for combine in COMBINE:
            if place == "two on a spot" and (combine, density) == ("max", "trilinear"):
                continue  # a kink of the tie's derivative: any answer between is right
            options = {"shape": SHAPE, "spacing": SPACING, "density": density, "combine": combine, "cutoff": EXACT}
            options.update({name: torch.tensor(v, dtype=torch.float64, device=device) for name, v in own.items()})
            if not soft:
                options["num_channels"] = 2
            actual = ops.voxelize(coords, channels, ptr, **options)
            assert_near(actual, expected(coords, channels, ptr, **options), 1e-12)
            assert_gradients_near(1e-12, coords, channels, ptr, **options)


@pytest.mark.parametrize("density", [name for name, own in DENSITIES.items() if own])
def test_size_zero_or_less_is_no_atom(density, device):
    coords, channels, ptr = batch((6,), device=device)
    size = torch.tensor([1.0, 0.0, 0.9, -1.0, -0.0, 0.8], dtype=torch.float64, device=device)[:, None]
    name = "sigma" if density in ("gaussian", "wave") else "radius"
    options = {**DENSITIES[density], "shape": SHAPE, "num_channels": 3, "density": density, "cutoff": EXACT}
    options[name] = size
    there = (size > 0).squeeze(1)
    actual = ops.voxelize(coords, channels, ptr, **options)
    wanted = expected(coords[there], channels[there], **{**options, name: size[there]})
    assert_near(actual, wanted, 1e-12)
    grads = pull(ops.voxelize, ["coords", name], coords, channels, ptr, **options)
    for grad in grads:
        assert grad[~there].count_nonzero() == 0
    assert_gradients_near(1e-12, coords, channels, ptr, **options)


@pytest.mark.parametrize("density", ["gaussian", "molgrid", "moleculekit"])
@pytest.mark.parametrize("combine", COMBINE)
def test_many_atoms(combine, density, device):
    """700 atoms in one channel: more than any tile or list of fixed length holds."""
    coords, _, _ = batch((700,), device=device)
    channels = torch.zeros(700, dtype=torch.int64, device=device)
    weights = torch.linspace(0.05, 0.2, 700, dtype=torch.float64, device=device)
    options = {"shape": (6, 7, 8), "num_channels": 1, "density": density, "combine": combine, "cutoff": EXACT}
    options.update(**DENSITIES[density], weights=weights)
    assert_near(ops.voxelize(coords, channels, **options), expected(coords, channels, **options), 1e-12)
    assert_gradients_near(1e-12, coords, channels, **options)


@pytest.mark.parametrize("soft", [False, True], ids=["index", "features"])
@pytest.mark.parametrize("combine", [*COMBINE, "magnitude"])
@pytest.mark.parametrize("density", DENSITIES)
def test_second_derivatives(density, combine, soft, device):
    coords, channels, ptr = batch((2, 1), channels=2, soft=soft, device=device)
    values = {"coords": coords, **poses(2, device=device)}
    values["weights"] = torch.tensor([0.3, 0.7, 0.5], dtype=torch.float64, device=device)
    for name, number in DENSITIES[density].items():
        values[name] = torch.full((3, 1), number, dtype=torch.float64, device=device)
    if soft:
        values["channels"] = channels
    options = {"shape": (3, 2, 3), "spacing": (0.9, 0.8, 0.7), "density": density, "combine": combine}
    options.update(cutoff=EXACT, num_channels=None if soft else 2)

    def function(*leaves):
        given = dict(zip(values, leaves, strict=True))
        return ops.voxelize(given.pop("coords"), given.pop("channels", channels), ptr, **given, **options)

    leaves = [v.detach().clone().requires_grad_() for v in values.values()]
    # Steps of 1e-6 in float64: a central difference is good to 1e-9 of the (steep) slopes.
    assert gradcheck(function, leaves, eps=1e-6, atol=1e-7, rtol=1e-5)
    assert gradgradcheck(function, leaves, eps=1e-6, atol=1e-6, rtol=1e-5)


# --- accuracy ---------------------------------------------------------------------------------------------------------

BONDI = torch.tensor([1.70, 1.55, 1.52, 1.47, 1.80, 1.75, 1.85, 1.20])  # C N O F S Cl Br H, angstrom
# Forward, of the largest sum; gradients, of the largest component. Measured at the default cut-off: forward 4.6e-7,
# 1.1e-7, 2.2e-7, 4.7e-7; gradients 1.1e-6, 2.2e-7, 1.3e-6, 1.1e-6. Arithmetic alone (cut-off 1e-10): forward 1.6e-7,
# 1.1e-7, 2.0e-7, 4.4e-7; gradients 1.5e-7, 2.2e-7, 2.9e-7, 5.5e-7.
GATES = {
    "gaussian": (lambda c: {"sigma": BONDI[c] / 2}, 1e-6, 2e-6),
    "molgrid": (lambda c: {"radius": BONDI[c]}, 1e-6, 2e-6),
    "wave, demo": (lambda c: {"sigma": torch.full(c.shape, 1.0), "omega": torch.full(c.shape, 0.5)}, 2e-6, 2e-6),
    "wave, steep": (lambda c: {"sigma": torch.full(c.shape, 0.85), "omega": torch.full(c.shape, 1 / 0.85)}, 2e-6, 2e-6),
}


@pytest.mark.parametrize("cutoff", [None, 1e-10], ids=["default", "arithmetic"])
@pytest.mark.parametrize("case", GATES)
def test_accuracy_of_float32(case, cutoff, device):
    """Against the untruncated float64 definition, on drug-sized molecules; every atom has sizes of its own."""
    own, forward, gradient = GATES[case]
    coords, channels, ptr = batch((33, 27), channels=8, dtype=torch.float32, device=device)
    own = {name: v[:, None].to(device) for name, v in own(channels.cpu()).items()}
    options = {"shape": 24, "num_channels": 8, "density": case.split(",")[0], **own}
    options.update({} if cutoff is None else {"cutoff": cutoff})
    wanted = expected(coords, channels, ptr, **options)
    error = (ops.voxelize(coords, channels, ptr, **options).double() - wanted).abs().max() / wanted.abs().max()
    assert error <= forward, f"{error:.3g}"
    leaves = ["coords", *own]
    actual = pull(ops.voxelize, leaves, coords, channels, ptr, **options)
    options.update({name: double(v) for name, v in own.items()})
    wanted = pull(expected, leaves, coords.double(), channels, ptr, **options)
    for name, a, w in zip(leaves, actual, wanted, strict=True):
        error = (a.double() - w).abs().max() / w.abs().max()
        assert error <= gradient, f"{name}: {error:.3g}"


@pytest.mark.parametrize("density", ["gaussian", "wave"])
@pytest.mark.parametrize("cutoff", [1e-1, 1e-3, 1e-6, 1e-9])
def test_cutoff_is_the_largest_value_left_out(density, cutoff, device):
    coords = torch.tensor([[0.3, -0.2, 0.1]], dtype=torch.float64, device=device)
    channels = torch.zeros(1, dtype=torch.int64, device=device)
    options = {"shape": 32, "num_channels": 1, "density": density, **DENSITIES[density]}
    grid = ops.voxelize(coords, channels, cutoff=cutoff, **options)
    wanted = expected(coords, channels, **options)
    assert (grid - wanted).abs().max() <= cutoff * (1 + 1e-12)
    assert grid[wanted.abs() > 2 * cutoff].all()


# --- properties -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("combine", COMBINE)
@pytest.mark.parametrize("density", DENSITIES)
class TestProperties:
    """Laws that need no reference; coordinates and edges are multiples of 1/64, so moving atoms rounds nothing."""

    @staticmethod
    def grid(coords, channels, density, combine, shape=(8, 8, 8)):
        options = {**DENSITIES[density], "density": density, "combine": combine, "cutoff": EXACT}
        return ops.voxelize(coords, channels, shape=shape, spacing=0.5, num_channels=2, **options)

    @staticmethod
    def atoms(n=6, seed=0):
        coords, channels, _ = batch((n,), channels=2, seed=seed)
        return (coords * 64).round() / 64 + 1 / 128, channels

    def test_permutation(self, density, combine):
        coords, channels = self.atoms()
        order = torch.randperm(len(coords))
        shuffled = self.grid(coords[order], channels[order], density, combine)
        assert_near(shuffled, self.grid(coords, channels, density, combine), 1e-14)

    def test_shift_by_voxels(self, density, combine):
        coords, channels = self.atoms()
        steps = torch.tensor([2, -1, 1])
        still = self.grid(coords, channels, density, combine, (12, 12, 12))
        moved = self.grid(coords + 0.5 * steps, channels, density, combine, (12, 12, 12))
        inner = slice(3, -3)
        rolled = still.roll(steps.tolist(), (2, 3, 4))
        assert_near(moved[..., inner, inner, inner], rolled[..., inner, inner, inner], 1e-14)

    @pytest.mark.parametrize("axes", [(0, 1), (1, 2), (0, 2)], ids=str)
    def test_quarter_turn(self, density, combine, axes):
        coords, channels = self.atoms()
        turn = torch.eye(3, dtype=torch.float64)
        turn[list(axes), list(axes)] = 0
        turn[axes[0], axes[1]], turn[axes[1], axes[0]] = -1, 1
        turned = self.grid(coords @ turn.T, channels, density, combine)
        assert_near(turned, torch.rot90(self.grid(coords, channels, density, combine), 1, [a + 2 for a in axes]), 1e-14)

    def test_union_of_two_molecules(self, density, combine):
        coords, channels = self.atoms()
        a, b = (self.grid(coords[half], channels[half], density, combine) for half in (slice(0, 3), slice(3, None)))
        both = {"sum": a + b, "max": torch.maximum(a, b), "union": 1 - (1 - a) * (1 - b)}[combine]
        assert_near(self.grid(coords, channels, density, combine), both, 1e-14)

    def test_molecules_do_not_see_each_other(self, density, combine):
        coords, channels = self.atoms()
        options = {**DENSITIES[density], "density": density, "combine": combine, "num_channels": 2, "shape": 8}
        together = ops.voxelize(coords, channels, torch.tensor([0, 2, 6]), **options)
        assert_same(together[:1], ops.voxelize(coords[:2], channels[:2], **options))
        assert_same(together[1:], ops.voxelize(coords[2:], channels[2:], **options))

    def test_features_of_one_are_an_index(self, density, combine):
        coords, channels = self.atoms()
        soft = torch.nn.functional.one_hot(channels, 2).double()
        options = {**DENSITIES[density], "density": density, "combine": combine, "shape": 8, "cutoff": EXACT}
        index = ops.voxelize(coords, channels, num_channels=2, **options)
        assert_near(ops.voxelize(coords, soft, **options), index, 1e-14)


# --- outputs ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("density", DENSITIES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("computed", [torch.float32, torch.float64])
def test_output_is_rounded_once(density, dtype, computed, device):
    coords, channels, ptr = batch(dtype=computed, device=device)
    options = {"shape": SHAPE, "spacing": SPACING, "num_channels": 3, "density": density, **DENSITIES[density]}
    full = ops.voxelize(coords, channels, ptr, **options)
    assert full.dtype == computed
    assert_same(ops.voxelize(coords, channels, ptr, dtype=dtype, **options), full.to(dtype))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_gradient_through_a_half_output(dtype, device):
    """The cotangent arrives in half; what it is worth is pulled back in float32."""
    coords, channels, ptr = batch(dtype=torch.float32, device=device)
    options = {"shape": SHAPE, "num_channels": 3, "sigma": 0.7}
    leaf = coords.clone().requires_grad_()
    grid = ops.voxelize(leaf, channels, ptr, dtype=dtype, **options)
    cotangent = torch.randn(grid.shape).to(grid)
    (actual,) = torch.autograd.grad(grid, leaf, cotangent)
    (wanted,) = torch.autograd.grad(ops.voxelize(leaf, channels, ptr, **options), leaf, cotangent.float())
    assert_same(actual, wanted)


@pytest.mark.parametrize("soft", [False, True], ids=["index", "features"])
@pytest.mark.parametrize("density", DENSITIES)
def test_sparse_is_dense(density, soft, device):
    coords, channels, ptr = batch(soft=soft, dtype=torch.float32, device=device)
    options = {"shape": SHAPE, "spacing": SPACING, "density": density, **DENSITIES[density]}
    if not soft:
        options["num_channels"] = 3
    dense = ops.voxelize(coords, channels, ptr, **options)
    sparse = ops.voxelize(coords, channels, ptr, layout=torch.sparse_coo, **options)
    assert sparse.layout == torch.sparse_coo
    assert sparse.shape == dense.shape
    assert sparse.is_coalesced()
    assert_same(sparse.to_dense(), dense)
    assert sparse._nnz() < dense.numel()


@pytest.mark.parametrize("density", DENSITIES)
def test_sparse_gradient_is_the_dense_one(density, device):
    coords, channels, ptr = batch(dtype=torch.float64, device=device)
    options = {"shape": SHAPE, "num_channels": 3, "density": density, "weights": torch.rand_like(coords[:, 0])}
    options.update(
        {name: torch.tensor(v, dtype=torch.float64, device=device) for name, v in DENSITIES[density].items()}
    )
    leaves = ["coords", "weights", *DENSITIES[density]]

    def through_sparse(*args, **kwargs):
        return ops.voxelize(*args, layout=torch.sparse_coo, **kwargs).to_dense()

    dense = pull(ops.voxelize, leaves, coords, channels, ptr, **options)
    for actual, wanted in zip(pull(through_sparse, leaves, coords, channels, ptr, **options), dense, strict=True):
        assert_near(actual, wanted, 1e-14)


def test_sparse_beyond_2_31_voxels(device):
    """2048^3 voxels and three channels: no dense grid of that size is made, and no index wraps."""
    coords = torch.tensor([[-500.1, -499.8, -500.3], [500.2, 499.7, 500.1]], dtype=torch.float64, device=device)
    channels = torch.tensor([0, 2], device=device)
    options = {"spacing": 0.5, "num_channels": 3, "density": "trilinear"}
    sparse = ops.voxelize(coords, channels, shape=2048, layout=torch.sparse_coo, **options).coalesce()
    assert sparse.shape == (1, 3, 2048, 2048, 2048)
    corner = torch.tensor([[-500.0] * 3, [500.0] * 3], dtype=torch.float64, device=device)
    for n, channel in ((0, 0), (1, 2)):
        small = ops.voxelize(coords[n : n + 1] - corner[n], channels[n : n + 1], shape=8, **options)[0, channel]
        inside = sparse.indices()[1] == channel
        index, value = sparse.indices()[2:, inside], sparse.values()[inside]
        first = 1024 - 4 + round(corner[n, 0].item() / 0.5)
        assert_near(value, small[tuple(index - first)], 1e-12)
        assert value.sum() == pytest.approx(1, abs=1e-12)


OUT = {"shape": SHAPE, "spacing": SPACING, "num_channels": 3, "density": "molgrid", "radius": 1.2}


def test_dense_beyond_2_31_voxels():
    """The last of 2.2e9 voxels in half precision, forward and backward (4.4 GB, most of it zeros)."""
    if os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") < 12 << 30:
        pytest.skip("less than 12 GiB of memory left")
    shape = (2200, 1000, 1000)
    end = torch.tensor([[(n - 1) / 2 * 0.5 for n in shape]], dtype=torch.float64)
    leaf = (end - 0.1).requires_grad_()
    options = {"num_channels": 1, "sigma": 0.5, "cutoff": EXACT}
    grid = ops.voxelize(leaf, torch.tensor([0]), shape=shape, dtype=torch.float16, **options)
    corner = grid[0, 0, -8:, -8:, -8:]
    near = end - torch.tensor([7 / 2 * 0.5] * 3, dtype=torch.float64)  # the centre of those eight
    small = (leaf - near).detach().requires_grad_()
    wanted = ops.voxelize(small, torch.tensor([0]), shape=8, dtype=torch.float16, **options)
    assert torch.equal(corner, wanted[0, 0])
    assert grid[0, 0, :1100].count_nonzero() == 0
    (actual,) = torch.autograd.grad(grid, leaf, grid.detach())
    assert_near(actual, torch.autograd.grad(wanted, small, wanted.detach())[0], 1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_large_outputs_are_the_same(dtype, device):
    """Beyond 8 MiB the CPU writes past its cache, here from an address that is no multiple of a line."""
    coords, channels, ptr = batch((5, 7, 0, 6, 3, 4, 5, 6), channels=2, dtype=torch.float32, device=device)
    options = {"shape": (61, 67, 73), "num_channels": 2, "density": "wave", "sigma": 0.5, "omega": 0.6}
    room = torch.full((8 * 2 * 61 * 67 * 73 + 7,), math.nan, dtype=dtype, device=device)
    out = room[5:-2].view(8, 2, 61, 67, 73)
    ops.voxelize(coords, channels, ptr, out=out, **options)
    assert room[:5].isnan().all()
    assert room[-2:].isnan().all()
    for grid, first, last in zip(out, ptr[:-1], ptr[1:], strict=True):
        alone = ops.voxelize(coords[first:last], channels[first:last], dtype=dtype, **options)
        assert_same(grid, alone[0])


@pytest.mark.parametrize("level", ["generic", "avx2"])
def test_every_instruction_set(level):
    """The processor's best is chosen once for a process, so the lesser ones are tested in one of their own."""
    if level == build_info()["simd"]:
        pytest.skip("this is the best of this processor")
    chosen = "(every_density and sum) or every_width or many_atoms or arithmetic or large_outputs"
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__, "-k", chosen]
    result = subprocess.run(
        command, env={**os.environ, "FASTNUGGETS_SIMD": level}, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout


def test_memory_is_the_output():
    coords, channels, ptr = batch((20, 20), dtype=torch.float32)
    with torch.profiler.profile(profile_memory=True) as profile:
        grid = ops.voxelize(coords, channels, ptr, shape=32, num_channels=3, sigma=0.7)
    taken = sum(max(e.self_cpu_memory_usage, 0) for e in profile.events())
    assert taken < 1.01 * grid.nbytes + 20_000


class TestOut:
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
    def test_fills_every_voxel(self, dtype, device):
        coords, channels, ptr = batch(dtype=torch.float32, device=device)
        out = torch.full((3, 3, *SHAPE), math.nan, dtype=dtype, device=device)
        result = ops.voxelize(coords, channels, ptr, out=out, **OUT)
        assert result is out
        assert_same(out, ops.voxelize(coords, channels, ptr, dtype=dtype, **OUT))

    def test_poses(self, device):
        coords, channels, ptr = batch(dtype=torch.float32, device=device)
        pose = poses(3, 2, dtype=torch.float32, device=device)
        out = torch.full((3, 2, 3, *SHAPE), math.nan, device=device)
        ops.voxelize(coords, channels, ptr, out=out, **pose, **OUT)
        assert_same(out, ops.voxelize(coords, channels, ptr, **pose, **OUT))

    def test_gradient(self, device):
        coords, channels, ptr = batch(device=device)

        def into(*args, **kwargs):
            out = torch.full((3, 3, *SHAPE), math.nan, dtype=torch.float64, device=device)
            return ops.voxelize(*args, out=out, **kwargs)

        options = {**OUT, "radius": torch.tensor(1.2, dtype=torch.float64, device=device)}
        wanted = pull(ops.voxelize, ["coords", "radius"], coords, channels, ptr, **options)
        for a, w in zip(pull(into, ["coords", "radius"], coords, channels, ptr, **options), wanted, strict=True):
            assert_same(a, w)

    def test_used_twice(self, device):
        """The second call detaches the buffer from the first one's graph."""
        coords, channels, ptr = batch(device=device)
        out = torch.empty(3, 3, *SHAPE, dtype=torch.float64, device=device)
        for _ in range(2):
            leaf = coords.clone().requires_grad_()
            ops.voxelize(leaf, channels, ptr, out=out, **OUT).sum().backward()
            assert leaf.grad.count_nonzero() > 0
            out = out.detach()
        ops.voxelize(coords, channels, ptr, out=out, **OUT)
        assert not out.requires_grad

    @pytest.mark.parametrize(
        ("out", "error"),
        [
            (torch.empty(3, 3, 7, 5, 8), ValueError),
            (torch.empty(9, *SHAPE), ValueError),
            (torch.empty(3, 3, *SHAPE, dtype=torch.int32), (TypeError, ValueError)),
            (torch.empty(3, 3, *SHAPE, device="meta"), ValueError),
            (torch.empty(3, 3, 9, 5, 7).transpose(2, 4), ValueError),
            (torch.zeros(1).expand(3, 3, *SHAPE), ValueError),
        ],
        ids=["shape", "dimensions", "dtype", "device", "strides", "expanded"],
    )
    def test_refuses(self, out, error):
        coords, channels, ptr = batch(dtype=torch.float32)
        with pytest.raises(error, match="out"):
            ops.voxelize(coords, channels, ptr, out=out, **OUT)

    def test_refuses_a_dtype_beside_it(self):
        coords, channels, ptr = batch(dtype=torch.float32)
        with pytest.raises(ValueError, match=r"dtype|out"):
            ops.voxelize(coords, channels, ptr, out=torch.empty(3, 3, *SHAPE), dtype=torch.float64, **OUT)

    def test_refuses_a_leaf_that_requires_grad(self):
        coords, channels, ptr = batch(dtype=torch.float32)
        with pytest.raises((RuntimeError, ValueError)):
            ops.voxelize(coords, channels, ptr, out=torch.empty(3, 3, *SHAPE, requires_grad=True), **OUT)


# --- compilers --------------------------------------------------------------------------------------------------------


class TestCompiled:
    """The public function; the op underneath has the checks of test_contract.py."""

    @staticmethod
    def inputs(sizes, soft, device):
        coords, channels, ptr = batch(sizes, soft=soft, device=device)
        radius = torch.linspace(1, 1.4, 3, dtype=torch.float64, device=device)
        return (coords, channels, ptr, radius, poses(len(sizes), device=device)["rotation"])

    @staticmethod
    def step(soft):
        count = {} if soft else {"num_channels": 3}

        def function(coords, channels, ptr, radius, rotation):
            grid = ops.voxelize(
                coords, channels, ptr, shape=SHAPE, density="molgrid", radius=radius, rotation=rotation, **count
            )
            return torch.nn.functional.avg_pool3d(grid, 2).square()

        return function

    def check(self, compiled, function, given):
        given = [a.clone().requires_grad_() if a.is_floating_point() else a for a in given]
        leaves = [a for a in given if a.requires_grad]
        actual, wanted = compiled(*given), function(*given)
        assert_near(actual, wanted, 1e-13)
        pairs = [torch.autograd.grad(out.sum(), leaves) for out in (actual, wanted)]
        for a, w in zip(*pairs, strict=True):
            assert_near(a, w, 1e-13)

    @pytest.mark.parametrize("soft", [False, True], ids=["index", "features"])
    @pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
    def test_aot(self, dynamic, soft, device):
        torch._dynamo.reset()
        function = self.step(soft)
        compiled = torch.compile(function, fullgraph=True, dynamic=dynamic, backend="aot_eager")
        separate = torch.fx.experimental._config.patch(use_duck_shape=False)
        with separate, torch._dynamo.config.patch(error_on_recompile=dynamic):
            for sizes in ((6, 4), (5, 0, 7)):
                self.check(compiled, function, self.inputs(sizes, soft, device))

    def test_inductor(self, device):
        """Forward alone: each graph costs a run of the C++ compiler."""
        torch._dynamo.reset()
        coords, channels, ptr = batch(device=device)

        def function(coords):
            return ops.voxelize(coords, channels, ptr, **OUT) + 1

        assert_near(torch.compile(function, fullgraph=True)(coords), function(coords), 1e-13)

    def test_one_molecule_without_ptr(self, device):
        torch._dynamo.reset()
        coords, channels, _ = batch((6,), device=device)

        def function(coords, channels):
            return ops.voxelize(coords, channels, shape=SHAPE, num_channels=3, sigma=0.6)

        compiled = torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")
        assert_same(compiled(coords, channels), function(coords, channels))

    def test_out(self, device):
        torch._dynamo.reset()
        coords, channels, ptr = batch(device=device)

        def function(coords, out):
            return ops.voxelize(coords, channels, ptr, out=out, **OUT) * 2

        results = []
        for call in (function, torch.compile(function, fullgraph=True, backend="aot_eager")):
            leaf = coords.clone().requires_grad_()
            out = torch.full((3, 3, *SHAPE), math.nan, dtype=torch.float64, device=device)
            grid = call(leaf, out)
            results.append((grid, out, *torch.autograd.grad(grid.square().sum(), leaf)))
        for actual, wanted in zip(*results, strict=True):
            assert_same(actual, wanted)

    def test_export(self, device):
        class Grid(torch.nn.Module):
            def forward(self, coords, channels, ptr):
                return ops.voxelize(coords, channels, ptr, shape=SHAPE, num_channels=3, sigma=0.6)

        atoms, molecules = torch.export.Dim("atoms", min=2), torch.export.Dim("molecules", min=2)
        sizes = {"coords": {0: atoms}, "channels": {0: atoms}, "ptr": {0: molecules + 1}}
        program = torch.export.export(Grid(), batch((6, 4), device=device), dynamic_shapes=sizes).module()
        for given in (batch((6, 4), device=device), batch((5, 0, 7, 1), device=device)):
            assert_same(program(*given), Grid()(*given))

    def test_autocast(self, device):
        """Coordinates keep their type; features that a layer made in half are read as float32."""
        coords, features, ptr = batch(soft=True, dtype=torch.float32, device=device)
        options = {"shape": SHAPE, "sigma": 0.6}
        with torch.autocast(device.type, torch.bfloat16):
            leaf = features.bfloat16().requires_grad_()
            grid = ops.voxelize(coords, leaf, ptr, **options)
        assert_same(grid.detach(), ops.voxelize(coords, features.bfloat16().float(), ptr, **options))
        (grad,) = torch.autograd.grad(grid.sum(), leaf)
        assert grad.dtype == torch.bfloat16


# --- CUDA -------------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
class TestCuda:
    @staticmethod
    def step(device, soft=False):
        coords, channels, ptr = batch(soft=soft, dtype=torch.float32, device=device)
        options = {**OUT, **poses(3, 2, dtype=torch.float32, device=device)}
        return coords.requires_grad_(), channels, ptr, {**options, "num_channels": None if soft else 3}

    @pytest.mark.parametrize("soft", [False, True], ids=["index", "features"])
    def test_no_synchronisation(self, soft):
        coords, channels, ptr, options = self.step("cuda", soft)
        cotangent = torch.ones(3, 2, 3, *SHAPE, device="cuda")
        ops.voxelize(coords, channels, ptr, **options).backward(cotangent)
        torch.cuda.synchronize()
        try:
            torch.cuda.set_sync_debug_mode("error")
            ops.voxelize(coords, channels, ptr, **options).backward(cotangent)
            ops.voxelize(coords, channels, **{**options, "center": None, "rotation": None, "translation": None})
        finally:
            torch.cuda.set_sync_debug_mode("default")

    def test_graph(self):
        """A training step, captured once and replayed for other coordinates."""
        coords, channels, ptr, options = self.step("cuda")

        def step():
            return torch.autograd.grad(ops.voxelize(coords, channels, ptr, **options).square().sum(), coords)[0]

        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = step()
        with torch.no_grad():
            coords.mul_(0.8)
        graph.replay()
        torch.cuda.synchronize()
        assert_same(captured, step())

    def test_memory_is_the_output(self):
        coords, channels, ptr, options = self.step("cuda")
        del options["shape"]
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        with torch.no_grad():
            grid = ops.voxelize(coords, channels, ptr, shape=64, **options)
        assert torch.cuda.max_memory_allocated() - before < 1.01 * grid.nbytes + 100_000


# --- relevance --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [(), (3,), (3, 2)], ids=str)
@pytest.mark.parametrize("soft", [False, True], ids=["index", "features"])
@pytest.mark.parametrize("density", DENSITIES)
def test_relevance(density, soft, sizes, device):
    coords, channels, ptr = batch(soft=soft, device=device)
    options = {
        "shape": SHAPE,
        "spacing": SPACING,
        "density": density,
        **DENSITIES[density],
        **poses(*sizes, device=device),
    }
    if not soft:
        options["num_channels"] = 3
    grid = expected(coords, channels, ptr, combine="sum", **options)
    relevance = torch.randn(grid.shape, dtype=torch.float64).to(device) * (grid != 0)
    shares = ops.atom_relevance(relevance, coords, channels, ptr, cutoff=EXACT, **options)
    wanted = reference.atom_relevance(relevance, coords, channels, ptr, **options)
    assert_near(shares, wanted, 1e-12)
    assert shares.sum().item() == pytest.approx(relevance.sum().item(), abs=1e-10)


# --- bad input --------------------------------------------------------------------------------------------------------

GOOD = {
    "coords": torch.tensor([[0.1, 0.2, 0.3], [0.4, 0.0, -0.2], [0.0, 0.1, 0.0], [0.3, 0.3, 0.3]]),
    "channels": torch.tensor([0, 1, 1, 0]),
    "ptr": torch.tensor([0, 2, 4]),
    "shape": 4,
    "num_channels": 2,
    "sigma": 0.5,
}
FEATURES = {"channels": torch.rand(4, 2), "num_channels": None}
BAD = {
    "coords: two columns": ({"coords": torch.zeros(4, 2)}, ValueError),
    "coords: one axis": ({"coords": torch.zeros(12)}, ValueError),
    "coords: batched": ({"coords": torch.zeros(2, 2, 3)}, ValueError),
    "coords: integers": ({"coords": torch.zeros(4, 3, dtype=torch.int64)}, TypeError),
    "coords: half": ({"coords": torch.zeros(4, 3, dtype=torch.float16)}, TypeError),
    "coords: list": ({"coords": [[0.0, 0.0, 0.0]] * 4}, TypeError),
    "coords: nan": ({"coords": torch.tensor([[0.0, math.nan, 0.0]] * 4)}, ValueError),
    "coords: infinity": ({"coords": torch.tensor([[0.0, math.inf, 0.0]] * 4)}, ValueError),
    "channels: too few": ({"channels": torch.tensor([0, 1, 1])}, ValueError),
    "channels: three axes": ({"channels": torch.rand(4, 2, 1)}, ValueError),
    "channels: too large": ({"channels": torch.tensor([0, 1, 2, 0])}, ValueError),
    "channels: negative": ({"channels": torch.tensor([0, 1, -1, 0])}, ValueError),
    "channels: floats": ({"channels": torch.tensor([0.0, 1, 1, 0])}, ValueError),
    "channels: integer features": ({"channels": torch.ones(4, 2, dtype=torch.int64)}, ValueError),
    "channels: features too few": ({**FEATURES, "channels": torch.rand(3, 2)}, ValueError),
    "channels: elsewhere": ({"channels": torch.zeros(4, dtype=torch.int64, device="meta")}, ValueError),
    "num_channels: missing": ({"num_channels": None}, ValueError),
    "num_channels: zero": ({"num_channels": 0}, ValueError),
    "num_channels: not that of the features": ({**FEATURES, "num_channels": 3}, ValueError),
    "ptr: descends": ({"ptr": torch.tensor([0, 3, 2, 4])}, ValueError),
    "ptr: starts late": ({"ptr": torch.tensor([1, 4])}, ValueError),
    "ptr: ends early": ({"ptr": torch.tensor([0, 3])}, ValueError),
    "ptr: ends late": ({"ptr": torch.tensor([0, 5])}, ValueError),
    "ptr: empty": ({"ptr": torch.zeros(0, dtype=torch.int64)}, ValueError),
    "ptr: two axes": ({"ptr": torch.tensor([[0, 4]])}, ValueError),
    "ptr: int32": ({"ptr": torch.tensor([0, 4], dtype=torch.int32)}, TypeError),
    "ptr: elsewhere": ({"ptr": torch.tensor([0, 4], device="meta")}, ValueError),
    "shape: two": ({"shape": (4, 4)}, ValueError),
    "shape: negative": ({"shape": (4, -4, 4)}, ValueError),
    "shape: zero": ({"shape": 0}, ValueError),
    "shape: fraction": ({"shape": 4.5}, TypeError),
    "shape: larger than memory": ({"shape": 40_000}, (ValueError, MemoryError)),
    "shape: more than an int64 counts": ({"shape": 2**40}, (ValueError, MemoryError)),
    "spacing: zero": ({"spacing": 0.0}, ValueError),
    "spacing: negative": ({"spacing": (0.5, -0.5, 0.5)}, ValueError),
    "spacing: nan": ({"spacing": math.nan}, ValueError),
    "spacing: infinity": ({"spacing": math.inf}, ValueError),
    "spacing: two": ({"spacing": (0.5, 0.5)}, ValueError),
    "density: unknown": ({"density": "gausian"}, ValueError),
    "combine: unknown": ({"combine": "mean"}, ValueError),
    "cutoff: zero": ({"cutoff": 0.0}, ValueError),
    "cutoff: one": ({"cutoff": 1.0}, ValueError),
    "cutoff: nan": ({"cutoff": math.nan}, ValueError),
    "dtype: integers": ({"dtype": torch.int32}, TypeError),
    "layout: csr": ({"layout": torch.sparse_csr}, ValueError),
    "sigma: missing": ({"sigma": None}, ValueError),
    "sigma: of five atoms": ({"sigma": torch.ones(5, 1)}, ValueError),
    "sigma: of three channels": ({"sigma": torch.ones(3)}, ValueError),
    "sigma: elsewhere": ({"sigma": torch.ones(2, device="meta")}, ValueError),
    "radius: missing": ({"sigma": None, "density": "molgrid"}, ValueError),
    "omega: missing": ({"density": "wave"}, ValueError),
    "weights: too few": ({"weights": torch.ones(3)}, ValueError),
    "weights: of channels": ({"weights": torch.ones(4, 2)}, ValueError),
    "weights: elsewhere": ({"weights": torch.ones(4, device="meta")}, ValueError),
    "weights: elsewhere, features": ({**FEATURES, "weights": torch.ones(4, device="meta")}, ValueError),
    "center: two numbers": ({"center": torch.zeros(2)}, ValueError),
    "center: three molecules": ({"center": torch.zeros(3, 3)}, ValueError),
    "rotation: of a vector": ({"rotation": torch.zeros(2, 3)}, ValueError),
    "rotation: elsewhere": ({"rotation": torch.zeros(3, 3, device="meta")}, ValueError),
    "rotation: not as many poses as translations": (
        {"rotation": torch.zeros(2, 4, 3, 3), "translation": torch.zeros(2, 5, 3)},
        ValueError,
    ),
}


def test_good_input_is_good():
    ops.voxelize(**GOOD)
    ops.voxelize(**{**GOOD, **FEATURES})


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    change, error = BAD[case]
    with pytest.raises(error, match=rf"^{case.split(':')[0]}\b"):
        ops.voxelize(**{**GOOD, **change})


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize(
    "case", ["coords: nan", "channels: too large", "channels: negative", "ptr: descends", "ptr: ends late"]
)
def test_values_are_checked_on_the_gpu_when_asked(case):
    change, error = BAD[case]
    given = {name: v.cuda() if isinstance(v, torch.Tensor) else v for name, v in {**GOOD, **change}.items()}
    with pytest.raises(error, match=rf"^{case.split(':')[0]}\b"):
        ops.voxelize(**given, validate=True)


def test_other_dtypes_are_converted(device):
    """Everything but `coords`, whose type is the one that is computed in."""
    coords, channels, ptr = batch(dtype=torch.float32, device=device)
    options = {
        "weights": torch.rand(len(coords)),
        "sigma": torch.tensor([0.5, 0.6, 0.7]),
        **poses(3, dtype=torch.float32),
    }
    options = {name: v.to(device) for name, v in options.items()}
    common = {"shape": SHAPE, "num_channels": 3}
    wanted = ops.voxelize(coords, channels, ptr, **options, **common)
    doubled = {name: v.double() for name, v in options.items()}
    assert_same(ops.voxelize(coords, channels.int(), ptr, **doubled, **common), wanted)
    features = torch.nn.functional.one_hot(channels, 3).to(torch.float64)
    assert_near(ops.voxelize(coords, features, ptr, **options, shape=SHAPE), wanted, 1e-6)


def test_meta_and_cpu_do_not_mix():
    with pytest.raises(ValueError, match=r"channels|ptr|coords"):
        ops.voxelize(**{**GOOD, "coords": GOOD["coords"].to("meta")})


# ---- GridBuffer


def _some(seed, n=30, batch=4):
    generator = torch.Generator().manual_seed(seed)
    ends = torch.randint(0, n + 1, (batch - 1,), generator=generator).sort().values
    coords = (torch.rand(n, 3, generator=generator) - 0.5) * 9
    channels = torch.randint(0, 3, (n,), generator=generator)
    return coords, channels, torch.cat([torch.tensor([0]), ends, torch.tensor([n])])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("combine", ["sum", "max"])
def test_a_buffer_holds_what_a_fresh_grid_would(dtype, combine, device):
    buffer = ops.GridBuffer()
    options = {"shape": (9, 14, 21), "num_channels": 3, "radius": 1.6, "combine": combine, "dtype": dtype}
    for seed, batch in ((0, 4), (1, 4), (2, 2), (3, 6), (4, 1), (5, 6)):
        given = [t.to(device) for t in _some(seed, batch=batch)]
        density = ("molgrid", "gaussian", "sphere")[seed % 3]
        got = ops.voxelize(*given, density=density, out=buffer, **options)
        assert torch.equal(got, ops.voxelize(*given, density=density, **options))


def test_a_buffer_with_poses_and_another_shape(device):
    buffer = ops.GridBuffer()
    given = [t.to(device) for t in _some(7)]
    for shape in (12, 16, 12):
        for poses in (3, 2):
            shift = torch.linspace(-1, 1, 4 * poses * 3, device=device).view(4, poses, 3)
            options = {"shape": shape, "num_channels": 3, "density": "molgrid", "radius": 1.5, "translation": shift}
            assert torch.equal(ops.voxelize(*given, out=buffer, **options), ops.voxelize(*given, **options))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode], ids=["no_grad", "inference"])
def test_a_buffer_notices_that_others_wrote_to_it(mode, device):
    buffer = ops.GridBuffer()
    options = {"shape": 16, "num_channels": 3, "density": "molgrid", "radius": 1.5}
    first, second = ([t.to(device) for t in _some(seed)] for seed in (8, 9))
    with mode():
        ops.voxelize(*first, out=buffer, **options).add_(1)
        assert torch.equal(ops.voxelize(*second, out=buffer, **options), ops.voxelize(*second, **options))
    assert torch.equal(ops.voxelize(*first, out=buffer, **options), ops.voxelize(*first, **options))


def test_a_backward_through_an_overwritten_buffer_is_an_error(device):
    buffer = ops.GridBuffer()
    coords, channels, ptr = (t.to(device) for t in _some(10))
    leaf = coords.clone().requires_grad_()
    options = {"shape": 16, "num_channels": 3, "density": "molgrid", "radius": 1.5, "out": buffer}
    loss = ops.voxelize(leaf, channels, ptr, **options).square().sum()  # square keeps the grid
    ops.voxelize(coords, channels, ptr, **options)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
