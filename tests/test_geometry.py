"""fastnuggets.scenes.geometry and surfaces: planes under noise, homographies as OpenCV has them, supports of a room."""

import math

import numpy as np
import pytest
import torch

from fastnuggets.scenes.geometry import (
    Camera,
    fit_plane,
    fit_planes,
    homography,
    plane_depth,
    plane_to_image,
    project,
    transform,
    unproject,
)
from fastnuggets.scenes.render import CLASSES, Shape, Texture, World, pose, random_scene, render_scene
from fastnuggets.scenes.surfaces import Places, SupportSurfaces, faces

cv2 = pytest.importorskip("cv2")

SIZE = (60, 80)
CAMERA = Camera(70.0, 75.0, 37.5, 28.0)
NORMAL = torch.nn.functional.normalize(torch.tensor([0.3, -0.5, -0.8], dtype=torch.float64), dim=0)
DISTANCE = 2.0


def plane(noise=0.0, outliers=0.0, seed=0):
    """Depth of one plane, with noise in each pixel and a share of pixels that are anywhere."""
    depth = plane_depth(NORMAL, DISTANCE, CAMERA, SIZE)
    generator = torch.Generator().manual_seed(seed)
    noisy = depth + noise * torch.randn(SIZE, generator=generator, dtype=torch.float64)
    wrong = torch.rand(SIZE, generator=generator) < outliers
    anywhere = 1 + 6 * torch.rand(SIZE, generator=generator, dtype=torch.float64)
    return torch.where(wrong, anywhere, noisy), wrong


def degrees(normal, other=NORMAL):
    return math.degrees(math.asin(min(1.0, float(torch.linalg.cross(normal, other).norm()))))


# --- camera -----------------------------------------------------------------------------------------------------------


def test_project_is_the_inverse_of_unproject():
    depth = 1 + torch.rand(SIZE, dtype=torch.float64)
    points = unproject(depth, CAMERA)
    pixels = project(points, CAMERA)
    y, x = torch.meshgrid(torch.arange(60.0), torch.arange(80.0), indexing="ij")
    # Seen: 7e-15.
    torch.testing.assert_close(pixels, torch.stack([x, y], -1).double(), rtol=0, atol=1e-12)
    homogeneous = points @ CAMERA.matrix.T
    torch.testing.assert_close(homogeneous[..., :2] / homogeneous[..., 2:], pixels, rtol=0, atol=1e-12)
    assert torch.equal(points[..., 2], depth)
    assert project(torch.tensor([[1.0, 1.0, -1.0], [0.0, 0.0, 0.0]]), CAMERA).isnan().all()


def test_field_of_view():
    camera = Camera.of((100, 200), 90)
    assert camera.fx == pytest.approx(100)
    edge = torch.tensor([[1.0, 0.0, 1.0]], dtype=torch.float64)  # 45 degrees to the right: the last pixel's outer edge
    assert project(edge, camera)[0].tolist() == pytest.approx([199.5, 49.5])
    with pytest.raises(ValueError, match="fov: expected"):
        Camera.of((100, 200), 180)


# --- planes -----------------------------------------------------------------------------------------------------------


def test_an_exact_plane_is_found_exactly():
    fit = fit_plane(plane()[0], CAMERA)
    # Seen: 2e-8 degrees and 1e-15.
    assert degrees(fit.normal[0]) < 1e-6
    assert float(fit.distance) == pytest.approx(DISTANCE, abs=1e-12)
    assert (int(fit.inliers), float(fit.share)) == (60 * 80, 1)
    assert float(fit.error) < 1e-12 and fit.mask.all()


@pytest.mark.parametrize("disparity", [False, True])
def test_noise_and_outliers(disparity):
    errors, distances = [], []
    for seed in range(5):
        depth, wrong = plane(0.02, 0.4, seed)
        value, threshold = (depth, 0.06) if not disparity else (1 / depth, 0.01)
        fit = fit_plane(value, CAMERA, disparity=disparity, threshold=threshold, seed=seed)
        errors.append(degrees(fit.normal[0]))
        distances.append(abs(float(fit.distance) - DISTANCE))
        assert fit.mask[~wrong].double().mean() > 0.95
        assert fit.mask[wrong].double().mean() < 0.1
    # Seen: 0.04 to 0.11 degrees and 0.001 to 0.005 with both; a fit to all pixels is 7 degrees off.
    assert max(errors) < 0.25
    assert max(distances) < 0.012


def test_least_squares_refine_the_best_trial():
    """One trial through three noisy pixels is far worse than the fit to all that agree with it."""
    depth, _ = plane(0.02)
    refined = degrees(fit_plane(depth, CAMERA, threshold=0.06, trials=16).normal[0])
    z = unproject(depth, CAMERA).view(-1, 3)[[0, 79, 4700]]
    raw = torch.nn.functional.normalize(torch.linalg.cross(z[1] - z[0], z[2] - z[0]), dim=0)
    assert refined < 0.2 * degrees(raw)


@pytest.mark.parametrize("reach", [None, 20])
def test_regions_have_their_own_planes(reach):
    regions = torch.full(SIZE, -1)
    regions[:, :25], regions[:, 25:50], regions[:20, 55:] = 0, 3, 1
    second = torch.nn.functional.normalize(torch.tensor([-0.4, 0.2, -1.0], dtype=torch.float64), dim=0)
    depth = torch.where(regions == 3, plane_depth(second, 3.0, CAMERA, SIZE), plane(0.005)[0])
    fit = fit_planes(depth, CAMERA, regions, reach=reach, trials=64)
    assert fit.normal.shape == (4, 3)
    assert degrees(fit.normal[0]) < 0.3 and degrees(fit.normal[1]) < 0.6
    assert degrees(fit.normal[3], second) < 1e-6
    assert fit.inliers[2] == 0 and fit.normal[2].isnan().all() and fit.share[2] == 0
    assert not fit.mask[regions < 0].any()
    for r in (0, 1, 3):
        assert int(fit.mask[regions == r].sum()) == fit.inliers[r]


def test_missing_depth_is_left_out():
    depth, _ = plane()
    holes = torch.rand(SIZE, generator=torch.Generator().manual_seed(3))
    for value, where in ((0.0, holes < 0.1), (math.nan, holes > 0.9), (math.inf, (holes > 0.5) & (holes < 0.6))):
        depth[where] = value
    fit = fit_plane(depth, CAMERA)
    assert degrees(fit.normal[0]) < 1e-6
    assert int(fit.inliers) == int(((depth > 0) & depth.isfinite()).sum())
    assert float(fit.share) == 1
    nothing = fit_plane(torch.zeros(SIZE), CAMERA)
    assert int(nothing.inliers) == 0 and nothing.normal.isnan().all() and not nothing.mask.any()
    two = torch.zeros(SIZE)
    two[3, 3:5] = 1.0
    assert int(fit_plane(two, CAMERA).inliers) == 0
    line = torch.zeros(SIZE)
    line[5] = 2.0  # through a line there is no plane, or there are all
    assert fit_plane(line, CAMERA).normal.isnan().all()


def test_disparity_of_a_stereo_camera():
    depth, _ = plane()
    fit = fit_plane(CAMERA.fx * 0.12 / depth, CAMERA, disparity=True, baseline=0.12)
    assert degrees(fit.normal[0]) < 1e-5
    assert float(fit.distance) == pytest.approx(DISTANCE, abs=1e-9)


def test_planes_of_a_direction():
    """Two planes in one region: the smaller is found when only its direction is asked for."""
    scene = room()
    depth = render_scene(scene).depth
    down = scene.gravity()
    fit = fit_plane(depth, scene.camera, along=down, angle=10, reach=8, trials=512, threshold=0.02)
    assert degrees(fit.normal[0], down) < 0.01
    away = scene.views[0, :3, 2]  # the wall is upright and faces the camera
    wall = fit_plane(depth, scene.camera, along=away, angle=10, reach=8, trials=512, threshold=0.02)
    assert degrees(wall.normal[0], away) < 0.01


def test_planes_are_the_same_for_a_seed():
    depth, _ = plane(0.02, 0.3)
    one, same, other = (fit_plane(depth, CAMERA, trials=8, seed=seed) for seed in (1, 1, 2))
    assert all(torch.equal(a, b) for a, b in zip(one, same, strict=True))
    assert not torch.equal(one.normal, other.normal)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"depth": torch.zeros(3)}, ValueError, "depth: expected"),
        ({"depth": torch.zeros(3, 3, dtype=torch.int64)}, TypeError, "depth: expected a floating"),
        ({"regions": torch.zeros(3, 4)}, ValueError, "regions: expected the shape"),
        ({"trials": 0}, ValueError, "trials: expected"),
        ({"points": 2}, ValueError, "points: expected"),
        ({"reach": 0}, ValueError, "reach: expected"),
        ({"threshold": 0.0}, ValueError, "threshold: expected"),
        ({"threshold": math.nan}, ValueError, "threshold: expected"),
        ({"baseline": 0.1}, ValueError, "baseline: expected"),
        ({"baseline": -1.0, "disparity": True}, ValueError, "baseline: expected"),
        ({"angle": 91}, ValueError, "angle: expected"),
    ],
)
def test_bad_input(changes, error, message):
    with pytest.raises(error, match=message):
        fit_planes(**{"depth": torch.ones(4, 4), "camera": CAMERA, **changes})


# --- homographies -----------------------------------------------------------------------------------------------------


def test_four_points_as_opencv():
    generator = torch.Generator().manual_seed(0)
    square = torch.tensor([[0.0, 0.0], [100.0, 0.0], [100.0, 80.0], [0.0, 80.0]])
    source = square + 30 * torch.rand(20, 4, 2, generator=generator) + 200
    target = square + 30 * torch.rand(20, 4, 2, generator=generator)
    matrices = homography(source, target)
    for a, b, matrix in zip(source, target, matrices, strict=True):
        expected = cv2.getPerspectiveTransform(a.numpy(), b.numpy())
        # Seen: 2e-7 of the largest entry, which is OpenCV's error: it solves for coordinates as they are.
        np.testing.assert_allclose(matrix / matrix[2, 2], expected, rtol=0, atol=2e-6 * np.abs(expected).max())
    # Seen: 1e-12 pixels.
    torch.testing.assert_close(transform(matrices, source), target.double(), rtol=0, atol=1e-9)
    back = transform(homography(target, source), transform(matrices, source))
    torch.testing.assert_close(back, source.double(), rtol=0, atol=1e-9)


def test_homography_refuses():
    points = torch.tensor([[0.0, 0.0], [1.0, 1.0], [2.0, 2.0], [0.0, 1.0]])
    square = torch.tensor([[0.0, 0.0], [1.0, 0.0], [1.0, 1.0], [0.0, 1.0]])
    assert not torch.isfinite(homography(points, square)).all()
    with pytest.raises(ValueError, match="homography: expected"):
        homography(points[:3], square[:3])


@pytest.mark.parametrize("normal", [(0.3, -0.5, -0.8), (0, 0, -1), (0, -1, 0), (0.9, 0.1, -0.3)])
def test_a_plane_seen_face_to_face(normal):
    normal = torch.nn.functional.normalize(torch.tensor(normal, dtype=torch.float64), dim=0)
    at = (50.0, 45.0)
    to_image = plane_to_image(normal, DISTANCE, CAMERA, at)
    ray = torch.tensor([(at[0] - CAMERA.cx) / CAMERA.fx, (at[1] - CAMERA.cy) / CAMERA.fy, 1], dtype=torch.float64)
    center = -DISTANCE / (normal @ ray) * ray
    # An orthonormal pair on the plane; which one it is the view decides, so that lengths and angles are compared.
    view = torch.tensor([[at[0], at[1]], [at[0] + 6, at[1]], [at[0], at[1] + 3], [at[0] + 4, at[1] + 5]]).double()
    pixels = transform(to_image, view)
    torch.testing.assert_close(pixels[0], torch.tensor(at, dtype=torch.float64), rtol=0, atol=1e-9)
    rays = torch.cat([(pixels - CAMERA.matrix[:2, 2]) / CAMERA.matrix.diagonal()[:2], torch.ones(4, 1)], 1)
    points = rays * (-DISTANCE / (rays @ normal))[:, None]
    assert (points[:, 2] > 0).all()
    scale = torch.tensor([CAMERA.fx, CAMERA.fy]).double() / center[2]
    flat = (view - view[0]) / scale
    # Seen: 2e-15.
    torch.testing.assert_close(torch.cdist(points, points), torch.cdist(flat, flat.clone()), rtol=0, atol=1e-7)
    by_points, _ = cv2.findHomography(view.numpy(), pixels.numpy())
    np.testing.assert_allclose(by_points, to_image / to_image[2, 2], rtol=2e-3, atol=2e-4)
    torch.testing.assert_close(transform(torch.linalg.inv(to_image), pixels), view.double(), rtol=0, atol=1e-8)
    # Not a mirror image, and upright as far as the plane allows.
    assert torch.linalg.det(to_image[:2, :2] - to_image[:2, 2:] * to_image[2:, :2]) > 0


def test_a_plane_that_is_not_seen():
    with pytest.raises(ValueError, match="is not seen at pixel"):
        plane_to_image(-NORMAL, DISTANCE, CAMERA, (40.0, 30.0))
    with pytest.raises(ValueError, match="is not seen at pixel"):
        plane_to_image(torch.tensor([0.0, -1.0, 0.0]), 1.0, CAMERA, (40.0, 10.0))  # above the horizon
    floor = plane_to_image(torch.tensor([0.0, -1.0, 0.0]), 1.0, CAMERA, (40.0, 50.0))
    ahead, behind = transform(floor, torch.tensor([[40.0, -1e4], [40.0, 1e4]]))
    assert ahead.isfinite().all() and behind.isnan().all()


# --- supports ---------------------------------------------------------------------------------------------------------


def room(pitch=-20.0, objects=(), size=(120, 160)):
    """A floor, a wall and a table, 1.5 above, 3 away; seen from 1.5 above the floor."""
    grey = Texture(((0.5, 0.5, 0.5),) * 2)

    def still(kind, size, at, semantic):
        return Shape(kind, size, torch.stack([at, at]), grey, semantic)

    shapes = (
        still("rectangle", (20, 20, 0), pose(pitch=90), 1),
        still("rectangle", (20, 6, 0), pose((0, 0, 6)), 2),
        still("box", (0.8, 0.03, 0.5), pose((0, -0.77, 3), yaw=20), 3),
        *(still(kind, size, pose(at), semantic) for kind, size, at, semantic in objects),
    )
    view = torch.linalg.inv(pose((0, -1.5, 0), pitch=pitch))
    return World(shapes, Camera.of(size), size, torch.stack([view, view]))


def test_supports_are_the_level_surfaces():
    scene = room()
    seen = render_scene(scene, dtype=torch.float64)
    supports = SupportSurfaces(seen.depth, scene.camera, gravity=scene.gravity(), threshold=0.01).supports
    assert len(supports) == 2
    up = -scene.gravity()
    for support, shape, height in zip(supports, (0, 2), (1.5, 0.7), strict=True):
        # Seen: 0.001 and 0.016 degrees: the wall's foot and the table's front begin within the threshold.
        assert degrees(support.normal, up) < 0.2
        assert support.distance == pytest.approx(height, abs=0.005)
        top = (seen.instance == shape) & ((seen.normal.double() * up[:, None, None]).sum(0) > 0.99)
        both = (torch.from_numpy(support.mask) & top).sum() / (torch.from_numpy(support.mask) | top).sum()
        # Seen: 0.993 and 0.938; the rest is where corners are rounded off, the foot of the wall and the table's edge.
        assert both > 0.9


def test_rows_of_a_wall_are_no_support():
    """With a threshold as large as a few of its rows, they lie on a level plane too."""
    scene = room()
    surfaces = SupportSurfaces(render_scene(scene).depth, scene.camera, gravity=scene.gravity(), threshold=0.1)
    assert len(surfaces.supports) == 2


def test_supports_under_noise():
    scene = random_scene(3, (120, 160), objects=2)
    seen = render_scene(scene)
    noise = 1 + 0.005 * torch.randn(seen.depth.shape, generator=torch.Generator().manual_seed(0))
    surfaces = SupportSurfaces(seen.depth * noise, scene.camera, gravity=scene.gravity(), threshold=0.05)
    classes = [int(seen.semantic[torch.from_numpy(s.mask)].mode().values) for s in surfaces.supports]
    assert classes[:2] == [CLASSES.index("floor"), CLASSES.index("table")]
    for support in surfaces.supports[:2]:
        assert degrees(support.normal, scene.gravity()) < 1.0  # seen: 0.3


def test_supports_of_given_classes():
    scene = room()
    seen = render_scene(scene)
    options = {"gravity": scene.gravity(), "semantic": seen.semantic}
    table = SupportSurfaces(seen.depth, scene.camera, classes=[3], **options)
    assert len(table.supports) == 1
    assert (seen.semantic.numpy()[table.supports[0].mask] == 3).all()
    assert SupportSurfaces(seen.depth, scene.camera, classes=[2], **options).supports == []
    with pytest.raises(ValueError, match="there is no support"):
        SupportSurfaces(seen.depth, scene.camera, classes=[], **options).sample(1)


def test_a_support_full_of_things_is_none():
    scene = room(objects=[("box", (0.4, 0.005, 0.2), (0, -0.805, 3), 4)], size=(240, 320))
    seen = render_scene(scene)
    for largest, count in ((0.1, 0), (0.95, 1)):
        surfaces = SupportSurfaces(
            seen.depth, scene.camera, gravity=scene.gravity(), semantic=seen.semantic, classes=[3],
            largest_hole=largest, least_area=0.002,
        )  # fmt: skip
        assert len(surfaces.supports) == count


def test_places_stand_on_supports_and_scale_with_depth():
    scene = room()
    seen = render_scene(scene, dtype=torch.float64)
    surfaces = SupportSurfaces(1 / seen.depth, scene.camera, gravity=scene.gravity(), disparity=True)
    places = surfaces.sample(200, seed=5)
    x, y = places.points.T
    assert set(places.support) == {0, 1}
    for s, support in enumerate(surfaces.supports):
        assert support.mask[y[places.support == s], x[places.support == s]].all()
    np.testing.assert_allclose(places.depth, seen.depth.numpy()[y, x], rtol=1e-12)
    # A thing of a metre at depth 2, 60 pixels high there, has the height of a metre wherever it stands.
    metre = scene.camera.fy / places.depth
    np.testing.assert_allclose(places.scale(2.0) * scene.camera.fy / 2, metre)
    again = surfaces.sample(200, seed=5)
    assert all(np.array_equal(a, b) for a, b in zip(places, again, strict=True))
    assert not np.array_equal(places.points, surfaces.sample(200, seed=6).points)
    assert surfaces.sample(0).points.shape == (0, 2)


def test_corner_puts_the_foot_on_the_point():
    places = Places(np.array([[50, 40]]), np.array([4.0]), np.array([0]))
    corner = places.corner(np.array([[20, 10]]), 2.0)  # half the size: rows 31..40, columns 48..52
    np.testing.assert_allclose(corner, [[31, 48]])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"least_area": 0}, "least_area, largest_hole"),
        ({"largest_hole": 1.5}, "least_area, largest_hole"),
        ({"classes": [1]}, "belong together"),
    ],
)
def test_bad_supports(changes, message):
    with pytest.raises(ValueError, match=message):
        SupportSurfaces(torch.ones(8, 8), CAMERA, **changes)


# --- faces ------------------------------------------------------------------------------------------------------------


def test_faces_are_large_plain_and_flat():
    rng = np.random.default_rng(0)
    image = np.full((120, 200, 3), 90, np.uint8)
    labels = np.full((120, 200), -1)
    labels[10:60, 10:90] = 0  # plain and flat
    labels[10:60, 100:190] = 1  # full of texture
    labels[70:75, 10:15] = 2  # small
    labels[70:110, 20:90] = 3  # plain, not flat
    image[labels == 1] = rng.integers(0, 255, ((labels == 1).sum(), 3))
    depth = torch.full((120, 200), 3.0)
    depth[torch.from_numpy(labels == 3)] += torch.rand(int((labels == 3).sum()))
    found = faces(image, labels, depth=depth)
    assert len(found) == 1
    assert np.array_equal(found[0].mask, labels == 0)
    assert found[0].colour.tolist() == [90, 90, 90]
    assert len(faces(image, labels)) == 2
    assert len(faces(image, labels, texture=255.0)) == 3
    # A view of a plane that faces the camera is the region itself.
    assert found[0].size == (50, 80)
    np.testing.assert_allclose(found[0].to_image, [[1, 0, 10], [0, 1, 10], [0, 0, 1]], atol=1e-6)
    assert found[0].seen(found[0].mask).all()


def test_a_face_ends_where_its_plane_does():
    """One region over an edge between two planes: the view is of the larger side, and of nothing else."""
    image, labels = np.full((120, 200, 3), 90, np.uint8), np.zeros((120, 200), int)
    camera = Camera.of((120, 200))
    sides = [
        torch.nn.functional.normalize(torch.tensor([x, 0.0, -1.0], dtype=torch.float64), dim=0) for x in (-0.4, 0.6)
    ]
    front, side = (plane_depth(normal, 3 * float(-normal[2]), camera, (120, 200)) for normal in sides)
    column = torch.arange(200) < 120  # they meet on the axis; the edge is moved so that one is larger
    noise = 1 + 0.002 * torch.randn(120, 200, generator=torch.Generator().manual_seed(0))
    found = faces(image, labels, depth=torch.where(column, front, side) * noise, camera=camera)
    assert len(found) == 1
    assert found[0].mask[:, :95].mean() > 0.99
    assert found[0].mask[:, 130:].mean() < 0.01
