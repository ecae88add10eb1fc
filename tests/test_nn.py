"""fastnuggets.nn.Voxelizer: what it adds to the op, its random poses and its buffer."""

import copy
import math

import pytest
import torch

from fastnuggets import nn, ops

SHAPE, SPACING, CHANNELS = 24, 0.5, 4
ATOMS = torch.tensor([[1.0, 0.2, -0.4], [-0.3, 1.5, 0.6], [0.2, -0.8, 1.9], [-1.1, -0.5, -0.7]])


def voxelizer(**options):
    return nn.Voxelizer(SHAPE, CHANNELS, spacing=SPACING, **{"density": "gaussian", "sigma": 0.6, **options})


def molecules(n=3, device="cpu"):
    """n molecules of one atom a channel, each around a point of its own."""
    places = torch.randn(n, 1, 3, generator=torch.Generator().manual_seed(3)) * 4
    coords = (ATOMS + places).flatten(0, 1).to(device)
    return coords, torch.arange(CHANNELS, device=device).repeat(n), torch.arange(0, 4 * n + 1, 4, device=device)


def positions(grid):
    """[B, C, 3]: the first moments of a trilinear grid are the positions, to rounding."""
    axis = (torch.arange(SHAPE) - (SHAPE - 1) / 2) * SPACING
    at = torch.stack(torch.meshgrid(axis, axis, axis, indexing="ij"), -1)
    return torch.einsum("bcdhw,dhwi->bci", grid, at.to(grid))


def test_is_the_op(device):
    coords, channels, ptr = molecules(device=device)
    options = {"shape": SHAPE, "num_channels": CHANNELS, "spacing": SPACING, "density": "gaussian", "sigma": 0.6}
    assert torch.equal(voxelizer(center=None)(coords, channels, ptr), ops.voxelize(coords, channels, ptr, **options))
    center = coords.view(-1, 4, 3).mean(1)
    centred = ops.voxelize(coords, channels, ptr, center=center, **options)
    torch.testing.assert_close(voxelizer(center="mean")(coords, channels, ptr), centred, rtol=0, atol=2e-6)


def test_the_centre_of_no_atom(device):
    coords, channels, _ = molecules(device=device)
    grid = voxelizer(center="mean", random_rotation=True, random_shift=1.0)(
        coords[:4], channels[:4], torch.tensor([0, 0, 4, 4], device=device)
    )
    assert grid.isfinite().all()
    assert grid[[0, 2]].count_nonzero() == 0


def test_features(device):
    coords, channels, ptr = molecules(device=device)
    soft = torch.nn.functional.one_hot(channels, CHANNELS).to(coords)
    torch.testing.assert_close(voxelizer()(coords, soft, ptr), voxelizer()(coords, channels, ptr), rtol=0, atol=1e-6)


def test_random_rotation_is_a_rotation(device):
    coords, channels, ptr = molecules(64, device)
    layer = voxelizer(density="trilinear", sigma=None, center="mean", random_rotation=True)
    found = positions(layer(coords, channels, ptr).cpu()).double()
    still = (ATOMS - ATOMS.mean(0)).double()
    rotation = torch.linalg.lstsq(still.expand(64, 4, 3), found).solution.mT
    identity = torch.eye(3, dtype=torch.float64).expand_as(rotation)
    torch.testing.assert_close(rotation @ rotation.mT, identity, rtol=0, atol=1e-4)
    assert (torch.linalg.det(rotation) > 0).all()
    assert rotation.std(0).min() > 0.4  # 0.58 for a uniform one
    assert rotation.mean(0).abs().max() < 0.3  # 0.072 is one standard error


def test_random_shift_is_within_its_bound(device):
    coords, channels, ptr = molecules(64, device)
    layer = voxelizer(density="trilinear", sigma=None, center="mean", random_shift=1.5)
    shift = positions(layer(coords, channels, ptr).cpu()) - (ATOMS - ATOMS.mean(0))
    torch.testing.assert_close(shift, shift[:, :1].expand_as(shift), rtol=0, atol=1e-4)
    assert shift.abs().max() <= 1.5 + 1e-4
    assert shift.abs().amax((0, 1)).min() > 1.2
    assert shift.mean((0, 1)).abs().max() < 0.4  # 0.11 is one standard error


def test_a_generator_repeats_the_poses(device):
    coords, channels, ptr = molecules(device=device)

    def twice(seed):
        generator = torch.Generator().manual_seed(seed)
        layer = voxelizer(random_rotation=True, random_shift=1.0, generator=generator)
        return layer(coords, channels, ptr), layer(coords, channels, ptr)

    before = torch.get_rng_state()
    first, second = twice(1)
    assert torch.equal(before, torch.get_rng_state())
    assert not torch.equal(first, second)
    again = twice(1)
    assert torch.equal(first, again[0])
    assert torch.equal(second, again[1])
    assert not torch.equal(first, twice(2)[0])


def test_the_global_generator_is_the_default(device):
    coords, channels, ptr = molecules(device=device)
    layer = voxelizer(random_rotation=True)
    torch.manual_seed(5)
    first = layer(coords, channels, ptr)
    torch.manual_seed(5)
    assert torch.equal(first, layer(coords, channels, ptr))


def test_evaluation_does_not_draw(device):
    coords, channels, ptr = molecules(device=device)
    layer = voxelizer(random_rotation=True, random_shift=1.0).eval()
    before = torch.get_rng_state()
    grid = layer(coords, channels, ptr)
    assert torch.equal(grid, voxelizer()(coords, channels, ptr))
    assert torch.equal(before, torch.get_rng_state())


def test_gradient(device):
    coords, channels, ptr = molecules(device=device)
    for reuse in (False, True):
        leaf = coords.clone().requires_grad_()
        voxelizer(random_rotation=True, reuse_buffer=reuse)(leaf, channels, ptr).square().sum().backward()
        assert leaf.grad.count_nonzero() > 0


def test_buffer_is_reused(device):
    layer = voxelizer(reuse_buffer=True)
    with torch.no_grad():
        first = layer(*molecules(3, device))
        place, kept = first.data_ptr(), first.clone()
        assert layer(*molecules(3, device)).data_ptr() == place
        assert torch.equal(layer(*molecules(3, device)), kept)
        for n in (1, 5, 3):
            assert torch.equal(layer(*molecules(n, device)), voxelizer()(*molecules(n, device)))


def test_two_steps_through_one_buffer(device):
    """A second forward does not reach into the first one's finished graph."""
    coords, channels, ptr = molecules(device=device)
    layer = voxelizer(reuse_buffer=True)
    for _ in range(2):
        leaf = coords.clone().requires_grad_()
        layer(leaf, channels, ptr).sum().backward()
        wanted = coords.clone().requires_grad_()
        voxelizer()(wanted, channels, ptr).sum().backward()
        assert torch.equal(leaf.grad, wanted.grad)


def test_overwriting_a_grid_that_backward_needs_is_noticed(device):
    coords, channels, ptr = molecules(device=device)
    layer = voxelizer(reuse_buffer=True)
    loss = layer(coords.requires_grad_(), channels, ptr).square().sum()
    layer(coords + 1, channels, ptr)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_state_and_copies(device):
    coords, channels, ptr = molecules(device=device)
    layer = voxelizer(reuse_buffer=True)
    layer(coords, channels, ptr)
    assert not any(t.numel() > 100 for t in layer.state_dict().values()), "the buffer is no state"
    other = voxelizer()
    other.load_state_dict(layer.state_dict())
    for twin in (other, copy.deepcopy(layer), torch.nn.Sequential(layer)[0].to(torch.float64).float()):
        assert torch.equal(twin(coords, channels, ptr), layer(coords, channels, ptr))


@pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training"])
def test_compile(training, device):
    torch._dynamo.reset()
    layer = voxelizer(random_rotation=True, random_shift=1.0).train(training)
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    for n in (2, 5):
        torch.manual_seed(n)
        actual = compiled(*molecules(n, device))
        torch.manual_seed(n)
        torch.testing.assert_close(actual, layer(*molecules(n, device)), rtol=0, atol=1e-6)


def test_export(device):
    layer = voxelizer().eval()
    given = molecules(3, device)
    program = torch.export.export(layer, given)
    torch.testing.assert_close(program.module()(*given), layer(*given), rtol=0, atol=1e-6)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_evaluation_does_not_synchronise():
    layer = voxelizer(reuse_buffer=True).eval()
    given = molecules(3, "cuda")
    wanted = layer(*given).clone()
    torch.cuda.synchronize()
    try:
        torch.cuda.set_sync_debug_mode("error")
        grid = layer(*given)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(grid, wanted)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("shape", 0),
        ("num_channels", 0),
        ("spacing", -0.5),
        ("density", "gausian"),
        ("center", "median"),
        ("random_shift", -1.0),
        ("random_shift", math.nan),
    ],
)
def test_bad_options_are_refused_at_once(name, value):
    options = {"shape": SHAPE, "num_channels": CHANNELS, "sigma": 0.6, name: value}
    with pytest.raises(ValueError, match=rf"^{name}\b"):
        nn.Voxelizer(**options)
