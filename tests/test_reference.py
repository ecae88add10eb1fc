"""The reference against numbers worked out by hand, published constants and quadrature."""

import math

import pytest
import torch

from fastnuggets import reference
from fastnuggets.reference.voxelize import DENSITIES

E2 = math.exp(-2)


def line(distances, density, **options):
    """One atom at the origin seen from voxels at these distances along x: the atom moves, the one voxel stays."""
    coords = torch.tensor([[-d, 0.0, 0.0] for d in distances], dtype=torch.float64)
    channels = torch.zeros(len(distances), dtype=torch.int64)
    ptr = torch.arange(len(distances) + 1)
    grid = reference.voxelize(coords, channels, ptr, shape=1, num_channels=1, density=density, **options)
    return grid.flatten().tolist()


@pytest.mark.parametrize(
    ("density", "options", "distances", "values"),
    [
        ("nearest", {"spacing": 0.5}, [0.0, 0.25, -0.25, 0.3], [1, 1, 0, 0]),
        ("trilinear", {"spacing": 0.5}, [0.0, 0.125, 0.25, 0.5, 2.0], [1, 0.75, 0.5, 0, 0]),
        ("sphere", {"radius": 1.5}, [0.0, 1.5, 1.51], [1, 1, 0]),
        ("gaussian", {"sigma": 0.5}, [0.0, 0.5, 1.0], [1, math.exp(-0.5), E2]),
        ("gaussian", {"radius": 1.0}, [0.0, 0.5, 1.0], [1, math.exp(-0.5), E2]),
        ("wave", {"sigma": 1.0, "omega": 0.5}, [0.0, 0.5, 1.0, 2.0], [1, 0, -math.exp(-0.5), E2]),
        # libmolgrid: exp(-2) at the radius, a quarter of 4 exp(-2) 0.25 half way down the tail, its double root at 1.5
        ("molgrid", {"radius": 2.0}, [0.0, 1.0, 2.0, 2.5, 3.0, 3.5], [1, math.exp(-0.5), E2, E2 / 4, 0, 0]),
        ("molvoxel", {"radius": 2.0}, [0.0, 1.0, 2.0, 2.001], [1, math.exp(-0.5), E2, 0]),
        ("deepfrag", {"radius": 2.0}, [0.0, 1.0, 2.0, 2.001], [1, math.exp(-0.5), E2, 0]),
        ("pyuul", {"radius": 1.0, "spacing": 0.25}, [0.0, 0.93, 1.37, 1.38], [1, math.exp(-1), 0.114169, 0]),
        ("moleculekit", {"radius": 1.7}, [0.0, 1.7, 4.9, 5.0], [1, 1 - math.exp(-1), 3.04111915e-06, 0]),
    ],
)
def test_one_atom_by_hand(density, options, distances, values):
    # 5e-7 is the number of digits written above.
    assert line(distances, density, **options) == pytest.approx(values, abs=5e-7, rel=1e-6)


def test_axes_and_spacing():
    coords = torch.tensor([[1.0, -2.0, 0.5]])
    grid = reference.voxelize(
        coords, torch.tensor([1]), shape=(3, 5, 2), spacing=(1.0, 1.0, 1.0), num_channels=2, density="nearest"
    )
    assert grid.shape == (1, 2, 3, 5, 2)
    assert grid.nonzero().tolist() == [[0, 1, 2, 0, 1]]


@pytest.mark.parametrize(("combine", "value"), [("sum", 0.9), ("max", 0.5), ("union", 1 - 0.5 * 0.6)])
def test_combine(combine, value):
    grid = reference.voxelize(
        torch.zeros(2, 3, dtype=torch.float64),
        torch.tensor([[0.5], [0.4]], dtype=torch.float64),
        shape=1,
        density="sphere",
        radius=1.0,
        combine=combine,
    )
    assert grid.item() == pytest.approx(value, abs=1e-15)


def test_pose_is_rotation_of_the_centred_molecule_then_translation():
    coords = torch.tensor([[3.0, 1.0, 1.0]])
    quarter_turn = torch.tensor([[0.0, -1.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 1.0]])  # x -> y
    grid = reference.voxelize(
        coords,
        torch.tensor([0]),
        shape=5,
        spacing=1.0,
        num_channels=1,
        density="nearest",
        center=torch.tensor([1.0, 1.0, 1.0]),
        rotation=torch.stack([torch.eye(3), quarter_turn])[None],
        translation=torch.tensor([0.0, 0.0, -1.0]),
    )
    assert grid.shape == (1, 2, 1, 5, 5, 5)
    assert grid.nonzero().tolist() == [[0, 0, 0, 4, 2, 1], [0, 1, 0, 2, 4, 1]]


def test_molecules_and_channels_do_not_mix():
    grid = reference.voxelize(
        torch.zeros(3, 3),
        torch.tensor([0, 2, 2]),
        torch.tensor([0, 1, 1, 3]),
        shape=1,
        num_channels=3,
        density="sphere",
        radius=torch.tensor([1.0, 1.0, 0.5]),
        weights=torch.tensor([1.0, 2.0, 4.0]),
    )
    assert grid.flatten(1).tolist() == [[1, 0, 0], [0, 0, 0], [0, 0, 6]]


def test_wave_integrates_to_its_transform_at_zero():
    # F(0) = (2 pi)^(3/2) sigma^3 exp(-A omega^2) (1 - 4 pi^2 sigma^2 omega^2), A = 2 pi^2 sigma^2. The sum over voxels
    # is that integral but for aliasing, F at 1 / spacing, below 1e-15 here, and the tail outside the box.
    sigma, omega, spacing = 0.8, 0.2, 0.4
    grid = reference.voxelize(
        torch.tensor([[0.1, -0.15, 0.05]], dtype=torch.float64),
        torch.tensor([0]),
        shape=41,
        spacing=spacing,
        num_channels=1,
        density="wave",
        sigma=sigma,
        omega=omega,
    )
    y = (2 * math.pi * sigma * omega) ** 2
    expected = (2 * math.pi) ** 1.5 * sigma**3 * math.exp(-y / 2) * (1 - y)
    assert (grid.sum() * spacing**3).item() == pytest.approx(expected, rel=1e-12)


def test_molgrid_integrates_to_its_radial_quadrature():
    # 4 pi r^3 times the integral of f u^2; the second derivative jumps at u = 1 and 1.5, hence not more digits.
    radius, spacing = 2.0, 0.1
    grid = reference.voxelize(
        torch.tensor([[0.01, 0.02, -0.03]], dtype=torch.float64),
        torch.tensor([0]),
        shape=64,
        spacing=spacing,
        num_channels=1,
        density="molgrid",
        radius=radius,
    )
    u = (torch.arange(15000, dtype=torch.float64) + 0.5) / 10000
    f = torch.where(u <= 1, torch.exp(-2 * u**2), 4 * E2 * (u - 1.5) ** 2)
    expected = 4 * math.pi * radius**3 * (f * u**2).sum().item() / 10000
    assert (grid.sum() * spacing**3).item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("combine", ["sum", "max", "union"])
@pytest.mark.parametrize("density", sorted(DENSITIES))
def test_gradients(density, combine):
    # No atom within the finite difference of a step or a kink of the density.
    generator = torch.Generator().manual_seed(0)
    coords = torch.rand(2, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    features = torch.rand(2, 2, generator=generator, dtype=torch.float64, requires_grad=True)
    radius = torch.tensor([[1.1], [0.9]], dtype=torch.float64, requires_grad=True)
    omega = torch.tensor([0.3, 0.4], dtype=torch.float64, requires_grad=True)

    def function(coords, features, radius, omega):
        return reference.voxelize(
            coords,
            features,
            shape=(2, 1, 3),
            spacing=(0.7, 0.8, 0.9),
            density=density,
            radius=radius,
            omega=omega,
            combine=combine,
        )

    assert torch.autograd.gradcheck(function, (coords, features, radius, omega))
    assert torch.autograd.gradgradcheck(function, (coords, features, radius, omega))


@pytest.mark.parametrize("density", sorted(DENSITIES))
def test_atom_on_a_voxel_centre(density):
    coords = torch.zeros(2, 3, dtype=torch.float64, requires_grad=True)
    radius = torch.tensor([[1.0], [0.0]], dtype=torch.float64, requires_grad=True)

    def centre_voxel(coords, radius):
        return reference.voxelize(
            coords, torch.tensor([0, 0]), shape=3, num_channels=1, density=density, radius=radius, omega=0.5
        )[0, 0, 1, 1, 1]

    value = centre_voxel(coords, radius)
    # An atom without size adds nothing; the two densities that have no size count both atoms.
    assert value.item() == (2 if density in ("nearest", "trilinear") else 1)
    gradients = torch.autograd.grad(value, (coords, radius), materialize_grads=True)
    assert not any(gradient.any() for gradient in gradients)


def test_wave_curvature_at_its_centre():
    # k'(r) / r -> -(1 / sigma^2 + 4 pi^2 omega^2)
    sigma, omega = 0.7, 0.4

    def value(position):
        return reference.voxelize(
            position[None], torch.tensor([0]), shape=1, num_channels=1, density="wave", sigma=sigma, omega=omega
        ).sum()

    curvature = torch.autograd.functional.hessian(value, torch.zeros(3, dtype=torch.float64))
    expected = -(1 / sigma**2 + (2 * math.pi * omega) ** 2) * torch.eye(3, dtype=torch.float64)
    torch.testing.assert_close(curvature, expected, rtol=1e-12, atol=1e-12)


def test_union_has_a_gradient_where_an_atom_fills_the_voxel():
    features = torch.tensor([[1.0], [0.25]], dtype=torch.float64, requires_grad=True)
    value = reference.voxelize(
        torch.zeros(2, 3, dtype=torch.float64), features, shape=1, density="sphere", radius=1.0, combine="union"
    )
    assert value.item() == 1
    (gradient,) = torch.autograd.grad(value.sum(), features)
    assert gradient.flatten().tolist() == [0.75, 0]


def test_relevance_is_shared_by_density_and_conserved():
    coords = torch.tensor([[0.0, 0.0, 0.0], [0.3, 0.2, 0.1], [0.0, 0.1, 0.0]], dtype=torch.float64)
    channels, ptr = torch.tensor([0, 0, 1]), torch.tensor([0, 3])
    options = {"shape": 4, "num_channels": 2, "density": "gaussian", "sigma": 0.5}
    relevance = torch.rand(1, 2, 4, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    shares = reference.atom_relevance(relevance, coords, channels, ptr, **options)
    alone = reference.voxelize(coords[:1], channels[:1], **options)
    both = reference.voxelize(coords, channels, ptr, **options)
    assert shares[0].item() == pytest.approx((alone[0, 0] / both[0, 0] * relevance[0, 0]).sum().item(), rel=1e-12)
    assert shares[2].item() == pytest.approx(relevance[0, 1].sum().item(), rel=1e-12)
    assert shares.sum().item() == pytest.approx(relevance.sum().item(), rel=1e-12)
