"""fastnuggets.scenes.render: depth by formula, flow by projecting again, one colour at both of its ends."""

import math

import pytest
import torch

from fastnuggets.scenes.geometry import Camera, plane_depth, project, unproject
from fastnuggets.scenes.render import CLASSES, KINDS, Shape, Texture, World, pose, random_scene, render_scene

SIZE = (60, 80)
CAMERA = Camera(70.0, 75.0, 37.5, 28.0)
PLAIN = Texture(((0.8, 0.4, 0.2),) * 2)
STILL = torch.eye(4, dtype=torch.float64).expand(2, 4, 4)


def scene_of(*shapes, views=STILL, **options):
    return World(shapes, CAMERA, SIZE, views, **options)


def shape(kind, size, *poses, texture=PLAIN, semantic=1):
    return Shape(kind, size, torch.stack([poses[0], poses[-1]]), texture, semantic)


def pixels():
    y, x = torch.meshgrid(*(torch.arange(n, dtype=torch.float64) for n in SIZE), indexing="ij")
    return x, y


# --- depth, normals and outlines by formula ---------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "atol"), [(torch.float32, 3e-5), (torch.float64, 1e-12)])
def test_a_ball(dtype, atol):
    center, radius = torch.tensor([0.3, -0.2, 4.0], dtype=torch.float64), 1.2
    seen = render_scene(scene_of(shape("ellipsoid", (radius,) * 3, pose(tuple(center.tolist()), yaw=30))), dtype=dtype)
    rays = CAMERA.rays(SIZE)
    a, b, c = (rays * rays).sum(-1), rays @ center, center @ center - radius**2
    met = b * b > a * c
    depth = torch.where(met, (b - (b * b - a * c).clamp(min=0).sqrt()) / a, math.inf)
    edge = (b * b - a * c).abs() < 1e-3
    assert torch.equal((seen.depth < math.inf) | edge, met | edge)
    # Seen: 3e-6 (float32), 2e-15.
    torch.testing.assert_close(seen.depth[met & ~edge].double(), depth[met & ~edge], rtol=0, atol=atol)
    outward = (rays * depth[..., None] - center)[met & ~edge] / radius
    torch.testing.assert_close(seen.normal.movedim(0, -1)[met & ~edge].double(), outward, rtol=0, atol=10 * atol)
    assert torch.equal(seen.instance >= 0, seen.depth < math.inf)


def test_an_ellipsoid_is_a_stretched_ball():
    at, size = pose((0.2, 0.1, 5.0), yaw=20, pitch=-30, roll=10), (0.5, 1.5, 0.8)
    seen = render_scene(scene_of(shape("ellipsoid", size, at)), dtype=torch.float64)
    on = seen.depth < math.inf
    points = torch.cat([unproject(seen.depth, CAMERA)[on], torch.ones(int(on.sum()), 1)], 1) @ torch.linalg.inv(at).T
    q = points[:, :3] / torch.tensor(size, dtype=torch.float64)
    torch.testing.assert_close(q.square().sum(1), torch.ones(len(q), dtype=torch.float64), rtol=0, atol=1e-10)
    # The near side, with the normal along the gradient of |q|^2.
    gradient = (q / torch.tensor(size, dtype=torch.float64)) @ at[:3, :3].T
    normal = seen.normal.movedim(0, -1)[on]
    torch.testing.assert_close(torch.nn.functional.normalize(gradient, dim=1), normal, rtol=0, atol=1e-9)
    assert ((normal * CAMERA.rays(SIZE)[on]).sum(1) < 0).all()


def test_a_plane():
    at = pose((0, 0, 3.0), yaw=30, pitch=20)
    seen = render_scene(scene_of(shape("rectangle", (100, 100, 0), at)), dtype=torch.float64)
    normal = -at[:3, 2]
    expected = plane_depth(normal, -float(normal @ at[:3, 3]), CAMERA, SIZE)
    torch.testing.assert_close(seen.depth, expected, rtol=0, atol=1e-12)
    assert (seen.normal - normal[:, None, None]).abs().max() < 1e-12


@pytest.mark.parametrize("kind", ["rectangle", "disc"])
def test_flat_shapes_end_where_they_should(kind):
    size, at = (1.1, 0.7, 0.0), pose((0.2, 0.1, 3.0))
    seen = render_scene(scene_of(shape(kind, size, at)))
    x, y = pixels()
    u, v = ((x - CAMERA.cx) / CAMERA.fx * 3 - 0.2) / 1.1, ((y - CAMERA.cy) / CAMERA.fy * 3 - 0.1) / 0.7
    inside = (u.abs() <= 1) & (v.abs() <= 1) if kind == "rectangle" else u * u + v * v <= 1
    assert torch.equal(seen.depth < math.inf, inside)
    assert torch.equal(seen.depth[inside], torch.full_like(seen.depth[inside], 3))
    assert seen.depth[~inside].isinf().all() and (seen.semantic[~inside] == 0).all()


def test_a_box_is_six_rectangles():
    """Which are cast by another formula."""
    at, (a, b, c) = pose((0.1, -0.3, 4.0), yaw=35, pitch=25, roll=5), (0.9, 0.5, 0.7)
    box = render_scene(scene_of(shape("box", (a, b, c), at)), dtype=torch.float64)
    sides = [
        shape("rectangle", size, at @ pose(where, yaw=yaw, pitch=pitch))
        for size, yaw, pitch, where in (
            ((a, b, 0), 0, 0, (0.0, 0.0, c)), ((a, b, 0), 0, 0, (0.0, 0.0, -c)),
            ((c, b, 0), 90, 0, (a, 0.0, 0.0)), ((c, b, 0), 90, 0, (-a, 0.0, 0.0)),
            ((a, c, 0), 0, 90, (0.0, b, 0.0)), ((a, c, 0), 0, 90, (0.0, -b, 0.0)),
        )
    ]  # fmt: skip
    expected = render_scene(scene_of(*sides), dtype=torch.float64)
    assert torch.equal(box.depth < math.inf, expected.depth < math.inf)
    torch.testing.assert_close(box.depth, expected.depth, rtol=0, atol=1e-12)
    torch.testing.assert_close(box.normal, expected.normal, rtol=0, atol=1e-12)
    assert len(set(expected.instance[expected.instance >= 0].tolist())) == 3


def test_the_nearest_is_seen():
    near, far = (
        shape("disc", (0.5, 0.5, 0), pose((0, 0, 2.0)), semantic=7),
        shape("rectangle", (9, 9, 0), pose((0, 0, 3.0))),
    )
    one, other = render_scene(scene_of(near, far)), render_scene(scene_of(far, near))
    assert torch.equal(one.depth, other.depth) and torch.equal(one.semantic, other.semantic)
    assert torch.equal(one.instance, 1 - other.instance)
    assert set(one.semantic.flatten().tolist()) == {1, 7}
    assert torch.equal(one.depth == 2, one.semantic == 7)
    for kind in ("box", "ellipsoid"):
        for z, size in ((-3.0, 1.0), (0.1, 2.0)):  # behind the camera, and around it
            assert render_scene(scene_of(shape(kind, (size,) * 3, pose((0, 0, z))))).depth.isinf().all()


# --- materials --------------------------------------------------------------------------------------------------------


def test_image_is_albedo_times_shading():
    scene = random_scene(0, SIZE)
    seen = render_scene(scene)
    assert torch.equal(seen.image, seen.albedo * seen.shading)
    assert seen.image.min() >= 0 and seen.image.max() <= 1
    assert seen.shading.min() == pytest.approx(scene.ambient) and seen.shading.max() <= 1


def test_shading_is_lamberts():
    light = (0.4, -0.7, -0.5)
    view = torch.linalg.inv(pose((0.1, 0.2, -0.3), yaw=10, pitch=-5))
    ball = shape("ellipsoid", (1, 1, 1), pose((0, 0, 4.0)))
    scene = scene_of(ball, views=view.expand(2, 4, 4), light=light, ambient=0.2, shadows=False)
    seen = render_scene(scene, dtype=torch.float64)
    on = seen.depth < math.inf
    outward = seen.normal.movedim(0, -1)[on] @ view[:3, :3]  # in the world
    direction = torch.nn.functional.normalize(torch.tensor(light, dtype=torch.float64), dim=0)
    expected = 0.2 + 0.8 * (outward @ direction).clamp(min=0)
    torch.testing.assert_close(seen.shading[0][on], expected, rtol=0, atol=1e-12)
    assert (seen.shading[0][~on] == 1).all()
    assert (seen.image[:, ~on] == torch.tensor(scene.sky, dtype=torch.float64)[:, None]).all()


def test_shadows_fall_where_the_light_is_hidden():
    """The shadow of a disc on a wall behind it is the disc, moved along the light."""
    wall, disc = shape("rectangle", (50, 50, 0), pose((0, 0, 5.0))), shape("disc", (0.6, 0.6, 0), pose((0.9, 0.3, 4.0)))
    light = (0.5, -0.25, -1.0)
    seen = render_scene(scene_of(wall, disc, light=light, ambient=0.25), dtype=torch.float64)
    points = unproject(seen.depth, CAMERA)
    on_wall = seen.instance == 0
    toward = points + torch.tensor(light, dtype=torch.float64)  # one unit of z towards the light: at the disc's depth
    dark = ((toward[..., :2] - torch.tensor([0.9, 0.3])).norm(dim=-1) <= 0.6) & on_wall
    assert dark.sum() > 50
    assert (seen.shading[0][dark] == 0.25).double().mean() > 0.99
    lit = 0.25 + 0.75 / torch.tensor(light).norm()
    assert ((seen.shading[0][on_wall & ~dark] - lit).abs() < 1e-6).double().mean() > 0.99
    without = render_scene(scene_of(wall, disc, light=light, shadows=False))
    assert len(without.shading[0][on_wall].unique()) == 1


def test_checkers_and_images():
    at = pose((0, 0, 2.0))
    x, y = pixels()
    u, v = (x - CAMERA.cx) / CAMERA.fx * 2, (y - CAMERA.cy) / CAMERA.fy * 2
    colours = ((0.1, 0.2, 0.3), (0.9, 0.8, 0.7))
    seen = render_scene(
        scene_of(shape("rectangle", (9, 9, 0), at, texture=Texture(colours, 0.31))), dtype=torch.float64
    )
    odd = ((u / 0.31).floor() + (v / 0.31).floor()) % 2 == 1
    expected = torch.where(odd, *(torch.tensor(colours, dtype=torch.float64)[[1, 0], :, None, None]))
    torch.testing.assert_close(seen.albedo, expected, rtol=0, atol=1e-15)
    # An image that is linear within a period is drawn exactly there.
    ramp = torch.linspace(0, 1, 33)[:-1].expand(3, 16, 32)
    image = render_scene(
        scene_of(shape("rectangle", (9, 9, 0), at, texture=Texture(colours, 4.0, ramp))), dtype=torch.float64
    )
    ramped = (u > 0) & (u < 4 * 31 / 32)
    torch.testing.assert_close(image.albedo[1][ramped], u[ramped] / 4, rtol=0, atol=1e-6)


def test_antialiasing_is_the_mean_over_the_pixel():
    colours = ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
    edge = shape("rectangle", (5, 5, 0), pose((5.0 + 0.3 / CAMERA.fx * 2, 0, 2.0)), texture=Texture((colours[1],) * 2))
    scene = scene_of(edge, sky=colours[0], ambient=1.0)
    fine, plain = render_scene(scene, antialias=10), render_scene(scene)
    # The edge is 0.3 pixels right of the principal point, 37.5: at 37.8, and pixel 38 begins at 37.5.
    assert torch.equal(fine.image[0, :, 37], torch.zeros(60))
    assert (fine.image[0, :, 38] - 0.7).abs().max() < 1e-6
    assert (fine.image[0, :, 39:] - 1).abs().max() < 1e-6
    for name in plain._fields[1:]:
        assert torch.equal(getattr(fine, name).nan_to_num(), getattr(plain, name).nan_to_num()), name


# --- flow -------------------------------------------------------------------------------------------------------------


def at_flow(values, flow, mode="bilinear"):
    """[C, H, W] of the other frame where the flow leads."""
    height, width = values.shape[1:]
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    grid = torch.stack([(x + flow[0]) / (width - 1), (y + flow[1]) / (height - 1)], -1) * 2 - 1
    grid = grid.nan_to_num(2.0).to(values)
    return torch.nn.functional.grid_sample(values[None], grid[None], mode=mode, align_corners=True)[0]


@pytest.mark.parametrize("frame", [0, 1])
def test_flow_projects_depth_again(frame):
    """For a camera that moves, depth and the two poses say all."""
    scene = random_scene(4, SIZE, motion="camera")
    seen = render_scene(scene, frame, dtype=torch.float64)
    x, y = pixels()
    motion = scene.views[1 - frame] @ torch.linalg.inv(scene.views[frame])
    points = unproject(seen.depth, scene.camera) @ motion[:3, :3].T + motion[:3, 3]
    expected = project(points, scene.camera) - torch.stack([x, y], -1)
    assert seen.flow.abs().max() > 2
    # Seen: 4e-14.
    torch.testing.assert_close(seen.flow.movedim(0, -1), expected, rtol=0, atol=1e-10)


def test_flow_of_a_thing_that_moves():
    first, second = pose((0, 0, 3.0)), pose((0.3, -0.2, 3.0))
    scene = scene_of(
        shape("rectangle", (0.5, 0.5, 0), first, second), shape("rectangle", (50, 50, 0), pose((0, 0, 6.0)))
    )
    seen = render_scene(scene, dtype=torch.float64)
    moving = seen.instance == 0
    expected = torch.tensor([0.3 / 3 * CAMERA.fx, -0.2 / 3 * CAMERA.fy], dtype=torch.float64)
    torch.testing.assert_close(seen.flow[:, moving].T, expected.expand(int(moving.sum()), 2), rtol=0, atol=1e-10)
    assert seen.flow[:, ~moving].abs().max() < 1e-10
    # Of the wall, only what the square hides afterwards is lost.
    after = render_scene(scene, 1).instance == 0
    assert torch.equal(seen.seen[~moving], ~after[~moving])
    assert seen.seen[moving].all()


def test_sky_turns_and_does_not_move():
    turned = pose((0.5, -1.0, 2.0), yaw=3, pitch=-2)
    views = torch.stack([torch.eye(4, dtype=torch.float64), torch.linalg.inv(turned)])
    seen = render_scene(scene_of(views=views), dtype=torch.float64)
    far = CAMERA.rays(SIZE) * 1e12
    x, y = pixels()
    expected = project(far @ views[1, :3, :3].T + views[1, :3, 3], CAMERA) - torch.stack([x, y], -1)
    torch.testing.assert_close(seen.flow.movedim(0, -1), expected, rtol=0, atol=1e-8)
    inside = at_flow(torch.ones(1, *SIZE, dtype=torch.float64), seen.flow)[0] > 1 - 1e-9
    assert (inside == seen.seen).double().mean() > 0.99


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("frame", [0, 1])
def test_what_flow_joins_looks_alike(seed, frame):
    """Labels of both frames agree where a point is seen in both, and with a camera that moves so do the colours."""
    scene = random_scene(seed, (120, 160))
    one, other = (render_scene(scene, f) for f in (frame, 1 - frame))
    nearest = at_flow(other.instance[None].float() + 1, one.flow, "nearest")[0] - 1
    agree = (nearest == one.instance)[one.seen].double().mean()
    # Seen: 0.993 to 0.996; the rest are pixels cut by an outline. Of hidden points, 0.05 to 0.11.
    assert agree > 0.985
    inside = at_flow(torch.ones(1, 120, 160), one.flow)[0] > 0.999
    hidden = ~one.seen & inside
    assert (nearest == one.instance)[hidden].double().mean() < 0.3
    still = random_scene(seed, (120, 160), motion="camera")
    first, second = (render_scene(still, f, antialias=2) for f in (frame, 1 - frame))
    difference = (at_flow(second.image, first.flow) - first.image).abs().mean(0)
    plain = (second.image - first.image).abs().mean(0)
    # Seen: 0.003 to 0.007, 0.22 to 0.25 of what it is without the flow; interpolation blurs edges. The median is 5e-9.
    assert difference[first.seen].mean() < 0.35 * plain[first.seen].mean()
    assert difference[first.seen].median() < 1e-6


def test_flow_there_and_back():
    scene = random_scene(1, SIZE)
    there, back = (render_scene(scene, f, dtype=torch.float64) for f in (0, 1))
    same = at_flow(back.instance[None].double() + 1, there.flow, "nearest")[0] - 1 == there.instance
    returned = (at_flow(back.flow, there.flow) + there.flow).norm(dim=0)
    # Seen: 8e-5 pixels; flow is interpolated between pixels.
    assert returned[there.seen & same].median() < 1e-3


# --- random scenes ----------------------------------------------------------------------------------------------------


def test_random_scenes_are_rooms():
    names, kinds = set(), set()
    for seed in range(12):
        scene = random_scene(seed, SIZE)
        seen = render_scene(scene)
        found = set(seen.semantic.flatten().tolist())
        assert {CLASSES.index("floor"), CLASSES.index("wall"), CLASSES.index("table")} <= found
        names |= found
        kinds |= {s.kind for s in scene.shapes}
        assert len(found) >= 4
        assert seen.depth.min() > 0.5
        down = scene.gravity().float()
        floor = seen.semantic == CLASSES.index("floor")
        assert (seen.normal[:, floor].T @ down < -0.999).all()
    assert names >= set(range(1, len(CLASSES))) and kinds == set(KINDS)


def test_random_scenes_by_seed():
    one, same, other = (render_scene(random_scene(seed, SIZE)) for seed in (3, 3, 4))
    assert all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(one, same, strict=True))
    assert not torch.equal(one.image, other.image)


def test_what_moves():
    for motion, camera, objects in (("none", False, False), ("camera", True, False), ("objects", False, True)):
        scenes = [random_scene(seed, SIZE, motion=motion) for seed in range(4)]
        assert any(not torch.equal(s.views[0], s.views[1]) for s in scenes) == camera
        assert any(not torch.equal(x.poses[0], x.poses[1]) for s in scenes for x in s.shapes) == objects
    still = render_scene(random_scene(0, SIZE, motion="none"), dtype=torch.float64)
    assert still.flow.abs().max() < 1e-9


def test_textures_are_used():
    image = torch.rand(3, 8, 8, generator=torch.Generator().manual_seed(0))
    scene = random_scene(0, SIZE, textures=(image,))
    assert any(s.texture.image is image for s in scene.shapes)
    render_scene(scene)


def test_devices_and_types(device):
    seen = render_scene(random_scene(0, SIZE), device=device, dtype=torch.float64)
    assert {x.device.type for x in seen} == {device.type}
    types = [x.dtype for x in seen]
    assert types == [torch.float64] * 5 + [torch.int64, torch.int32, torch.float64, torch.bool]
    assert [tuple(x.shape) for x in seen] == [(n, *SIZE) if n else SIZE for n in (3, 3, 1, 0, 3, 0, 0, 2, 0)]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: render_scene(scene_of(), 2), "frame must be"),
        (lambda: render_scene(scene_of(), antialias=0), "antialias: expected"),
        (lambda: render_scene(scene_of(shape("cone", (1, 1, 1), pose()))), "kind must be one of"),
        (lambda: random_scene(0, motion="fast"), "motion must be one of"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
