"""Geometry of one photograph with depth: a pinhole camera, planes by RANSAC, and the homographies of a plane.

Camera coordinates have x to the right, y down and z forward. Pixels are (x, y), their centres at integers. A plane is a
unit `normal` towards the camera and the camera's `distance` from it: points X on it have normal . X + distance = 0.
Everything here is computed on the CPU in float64, is not differentiable, and is deterministic by its seed.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

LEAST_INLIERS = 3
REFINEMENTS = 8  # of least squares at most, each with the weights of the one before
DRAWS = 4  # of a pixel within reach that is of the same region
DEFAULT_THRESHOLD = 0.01  # of the region's median depth or disparity
FLAT = 1e-9  # three of four points are on a line if their triangle is smaller, in units of the four's size
CHUNK = 2**22  # distances computed at a time: 32 MB


class Camera(NamedTuple):
    """A pinhole camera without distortion, in pixels."""

    fx: float
    fy: float
    cx: float
    cy: float

    @staticmethod
    def of(size: tuple[int, int], fov: float = 60.0) -> Camera:
        """Of images of `size` (height, width), which are `fov` degrees wide, 0 < fov < 180.

        Raises:
            ValueError: `fov` is out of its range.
        """
        if not 0 < fov < 180:
            raise ValueError(f"fov: expected 0 to 180 degrees, got {fov}")
        height, width = size
        focal = width / 2 / math.tan(math.radians(fov) / 2)
        return Camera(focal, focal, (width - 1) / 2, (height - 1) / 2)

    @property
    def matrix(self) -> Tensor:
        """[3, 3] float64, from camera coordinates to homogeneous pixels."""
        return torch.tensor([[self.fx, 0, self.cx], [0, self.fy, self.cy], [0, 0, 1]], dtype=torch.float64)

    def rays(self, size: tuple[int, int]) -> Tensor:
        """[H, W, 3] float64: the points at depth 1 that the pixels show."""
        height, width = size
        x = (torch.arange(width, dtype=torch.float64) - self.cx) / self.fx
        y = (torch.arange(height, dtype=torch.float64) - self.cy) / self.fy
        return torch.stack([x.expand(height, width), y[:, None].expand(height, width), torch.ones(height, width)], -1)


class Planes(NamedTuple):
    """Planes of R regions; of a region with too few pixels or none in common, `inliers` is 0 and the rest is NaN."""

    normal: Tensor  # [R, 3] float64, unit length, towards the camera
    distance: Tensor  # [R] float64, of the camera from the plane, >= 0
    inliers: Tensor  # [R] int64, pixels
    share: Tensor  # [R] float64, of the region's pixels that have a depth
    error: Tensor  # [R] float64, root mean square over the inliers, in units of the threshold's
    mask: Tensor  # [H, W] bool, inliers of their own region


def unproject(depth: Tensor, camera: Camera) -> Tensor:
    """Depth along z [H, W] -> points in camera coordinates, [H, W, 3] float64."""
    size = (depth.shape[0], depth.shape[1])
    return camera.rays(size) * depth.detach().cpu().double()[..., None]


def project(points: Tensor, camera: Camera) -> Tensor:
    """Points in camera coordinates [..., 3] -> pixels (x, y), [..., 2]; NaN where z <= 0, behind the camera."""
    z = points[..., 2]
    z = torch.where(z > 0, z, math.nan)
    return torch.stack([points[..., 0] / z * camera.fx + camera.cx, points[..., 1] / z * camera.fy + camera.cy], -1)


def plane_depth(normal: Tensor, distance: Tensor | float, camera: Camera, size: tuple[int, int]) -> Tensor:
    """Depth [H, W] float64 of the plane `normal` [3], `distance` in every pixel; inf where it is not met."""
    depth = -torch.as_tensor(distance, dtype=torch.float64) / (camera.rays(size) @ normal.double())
    return torch.where(depth > 0, depth, math.inf)


def fit_planes(
    depth: Tensor,
    camera: Camera,
    regions: Tensor | None = None,
    *,
    disparity: bool = False,
    baseline: float | None = None,
    trials: int = 128,
    threshold: float | None = None,
    points: int = 512,
    reach: int | None = None,
    along: Tensor | None = None,
    angle: float = 15.0,
    seed: int = 0,
) -> Planes:
    """One plane for every region of a depth or disparity map, by RANSAC and weighted least squares on the inliers.

    All trials of all regions are scored in one batched product, on `points` pixels a region, by the sum of squared
    residuals cut off at the threshold. Least squares, with Tukey's weights that fall to 0 at the threshold, are total
    (perpendicular) for depth; a disparity is fitted itself, as on a plane it is an affine function of the pixel.

    Args:
        depth: [H, W] float, along z; NaN, inf, 0 and less mean that there is none. With `disparity` it is one.
        camera: of the map.
        regions: [H, W] integers, region r where it is r, none where it is negative; None: one region. R is the largest
            number plus 1.
        disparity: `depth` holds disparities, inverse depths up to a factor.
        baseline: of the disparity, in the unit of the planes: depth = fx * baseline / disparity. None: depth =
            1 / disparity.
        trials: planes through three pixels that are tried in each region, >= 1.
        threshold: residual of an inlier: distance from the plane in depth's unit, or difference of disparities.
            None: 1 % of the region's median.
        points: pixels of a region that score the trials, >= 3.
        reach: pixels by which the three are apart at most, along each axis; None: anywhere in the region. For regions
            that hold several planes.
        along: [3], direction in camera coordinates; planes whose normal is more than `angle` degrees from it or from
            its opposite are not tried. None: all are.
        angle: degrees, 0 to 90.

    Returns:
        Planes, on the CPU.

    Raises:
        ValueError, TypeError: an argument is out of its range or of another kind.

    M. A. Fischler, R. C. Bolles, Random Sample Consensus, CACM 1981; the score: P. H. S. Torr, A. Zisserman, MLESAC,
    CVIU 2000.
    """
    _check_map("depth", depth)
    for name, value, least in (
        ("trials", trials, 1),
        ("points", points, 3),
        ("reach", 1 if reach is None else reach, 1),
    ):
        if value < least:
            raise ValueError(f"{name}: expected {least} or more, got {value}")
    if threshold is not None and not threshold > 0:
        raise ValueError(f"threshold: expected a number above 0, got {threshold}")
    if baseline is not None and not (baseline > 0 and disparity):
        raise ValueError(f"baseline: expected a number above 0, with a disparity map, got {baseline}")
    if not 0 <= angle <= 90:
        raise ValueError(f"angle: expected 0 to 90 degrees, got {angle}")
    values = depth.detach().cpu().double()
    labels = torch.zeros_like(values, dtype=torch.int64) if regions is None else regions.detach().cpu().long()
    if labels.shape != values.shape:
        raise ValueError(f"regions: expected the shape of depth, {tuple(values.shape)}, got {tuple(labels.shape)}")
    labels = torch.where(torch.isfinite(values) & (values > 0), labels, -1)
    count = 1 if regions is None else max(0, int(regions.max()) + 1) if regions.numel() else 0
    factor = 1.0 if baseline is None else camera.fx * baseline
    search = _Search(values, labels, count, camera, disparity, factor, threshold)
    axis = None if along is None else torch.nn.functional.normalize(along.detach().cpu().double(), dim=0)
    return search.planes(trials, points, reach, axis, math.cos(math.radians(angle)), seed)


def fit_plane(depth: Tensor, camera: Camera, mask: Tensor | None = None, **options: Any) -> Planes:
    """The plane of one region, where `mask` [H, W] is true; options and result as in `fit_planes`, with R = 1."""
    if mask is not None:
        _check_map("depth", depth)
        if mask.shape != depth.shape:
            raise ValueError(f"mask: expected the shape of depth, {tuple(depth.shape)}, got {tuple(mask.shape)}")
        depth = torch.where(mask.to(depth.device, torch.bool), depth, 0)
    return fit_planes(depth, camera, **options)


class _Search:
    """Regions of one map, their pixels sorted by region, and planes fitted to them.

    A plane is a row p of four numbers with residual p . [q, 1]. For depth q is the point and p the plane's equation.
    For disparity q is (x, y, disparity) at depth 1, and p = (a, b, -1, c) as disparity = a x + b y + c.
    """

    def __init__(
        self, values: Tensor, labels: Tensor, count: int, camera: Camera, disparity: bool, factor: float,
        threshold: float | None,
    ) -> None:  # fmt: skip
        self.count, self.disparity, self.factor, self.labels = count, disparity, factor, labels
        rays = camera.rays((values.shape[0], values.shape[1]))
        self.q = torch.cat([rays[..., :2], values[..., None]], -1) if disparity else rays * values[..., None]
        order = labels.flatten().argsort(stable=True)
        self.pixels = order[int((labels < 0).sum()) :]  # [P], region after region
        region = labels.flatten()[self.pixels]
        self.ptr = torch.searchsorted(region, torch.arange(count + 1))
        self.size = self.ptr.diff()
        if threshold is None:
            medians = [values.flatten()[own].median() if len(own) else values.new_ones(()) for own in self._regions()]
            self.threshold = DEFAULT_THRESHOLD * torch.stack(medians) if medians else values.new_empty(0)
        else:
            self.threshold = values.new_full((count,), threshold)

    def planes(
        self, trials: int, points: int, reach: int | None, axis: Tensor | None, cosine: float, seed: int
    ) -> Planes:
        generator = torch.Generator().manual_seed(seed)
        best = self._best(trials, points, reach, axis, cosine, generator)
        mask = torch.zeros(self.labels.numel(), dtype=torch.bool)
        normals, rows = self.q.new_empty(self.count, 3), self.q.new_empty(self.count, 3)
        for r, (own, trial, threshold) in enumerate(zip(self._regions(), best, self.threshold.tolist(), strict=True)):
            plane, mask[own], residual = self._refine(self.q.view(-1, 3)[own], trial, threshold, axis, cosine)
            normals[r], distance = self._equation(plane)
            rows[r] = torch.stack([distance, mask[own].sum(), residual])
        distances, inliers, error = rows.unbind(1)
        share = inliers / self.size.clamp(min=1)
        return Planes(normals, distances, inliers.long(), share, error, mask.view(self.labels.shape))

    def _regions(self) -> list[Tensor]:
        return [self.pixels[a:b] for a, b in zip(self.ptr[:-1].tolist(), self.ptr[1:].tolist(), strict=True)]

    def _best(
        self, trials: int, points: int, reach: int | None, axis: Tensor | None, cosine: float,
        generator: torch.Generator,
    ) -> Tensor:  # fmt: skip
        """The plane of the best trial in each region, [R, 4]; NaN where there was none."""
        best = self.q.new_full((self.count, 4), math.nan)
        big = (self.size >= LEAST_INLIERS).nonzero()[:, 0]
        for part in big.split(max(1, CHUNK // (trials * points))):
            at = self._draw(part, (trials,), generator)
            triples = torch.stack([at, *(self._near(at, part, reach, generator) for _ in range(2))], -1)  # [r, T, 3]
            plane = self._through(self.q.view(-1, 3)[triples.clamp(min=0)])  # [r, T, 4]
            plane[(triples < 0).any(-1)] = math.nan
            if axis is not None:
                plane[~(self._cosine(plane, axis) >= cosine)] = math.nan
            sample = self.q.view(-1, 3)[self._draw(part, (points,), generator)]  # [r, S, 3]
            scaled = plane / self.threshold[part, None, None]
            residual = torch.baddbmm(scaled[..., 3:], scaled[..., :3], sample.mT)  # [r, T, S]
            cost = residual.square_().clamp_(max=1).sum(-1)
            chosen = cost.nan_to_num(math.inf).argmin(1)  # [r]
            best[part] = plane[torch.arange(len(part)), chosen]
        return best

    def _draw(self, part: Tensor, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        """Pixels of each region of `part`, [r, *shape]."""
        uniform = torch.rand((len(part), *shape), generator=generator, dtype=torch.float64)
        first, size = (x[part].view(-1, *(1 for _ in shape)) for x in (self.ptr, self.size))
        return self.pixels[first + (uniform * size).long()]

    def _near(self, at: Tensor, part: Tensor, reach: int | None, generator: torch.Generator) -> Tensor:
        """A pixel of the same region for each of `at` [r, T]; -1 if those that were drawn are of others."""
        if reach is None:
            return self._draw(part, at.shape[1:], generator)
        height, width = self.labels.shape
        found = torch.full_like(at, -1)
        for _ in range(DRAWS):
            step = torch.randint(-reach, reach + 1, (2, *at.shape), generator=generator)
            y, x = at // width + step[0], at % width + step[1]
            other = y.clamp(0, height - 1) * width + x.clamp(0, width - 1)
            inside = (y >= 0) & (y < height) & (x >= 0) & (x < width)
            own = inside & (self.labels.flatten()[other] == part[:, None])
            found = torch.where(own & (found < 0), other, found)
        return found

    def _through(self, q: Tensor) -> Tensor:
        """Planes through three points each, [..., 3, 3] -> [..., 4]; NaN where these lie on a line."""
        a, b, c = q.unbind(-2)
        cross = torch.linalg.cross(b - a, c - a)
        length = cross.norm(dim=-1, keepdim=True)
        # Three pixels on a line have an area of 0, but for the rounding of coordinates.
        sides = (b - a).norm(dim=-1, keepdim=True) * (c - a).norm(dim=-1, keepdim=True)
        scale = -cross[..., 2:] if self.disparity else length
        normal = torch.where((length > 1e-9 * sides) & (scale != 0), cross / scale, math.nan)
        return torch.cat([normal, -(normal * a).sum(-1, keepdim=True)], -1)

    def _refine(
        self, q: Tensor, plane: Tensor, threshold: float, axis: Tensor | None, cosine: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The plane, its inliers [n] and their error, by least squares with Tukey's weights from the trial on.

        Inliers alike would draw the plane towards what lies just inside the threshold: the edge of a table, say.
        """

        def residual(p: Tensor) -> Tensor:
            return (q @ p[:3] + p[3]) / threshold

        def cost(p: Tensor) -> Tensor:
            return (1 - (1 - residual(p).square().clamp(max=1)) ** 3).sum()

        for _ in range(REFINEMENTS):
            weight = (1 - residual(plane).square().clamp(max=1)).square()
            if int((weight > 0).sum()) < LEAST_INLIERS:
                break
            better = self._least_squares(q, weight)
            if (axis is not None and self._cosine(better, axis) < cosine) or not cost(better) < cost(plane):
                break
            plane = better
        inlier = residual(plane).abs() <= 1
        return plane, inlier, threshold * residual(plane)[inlier].square().mean().sqrt()

    def _least_squares(self, q: Tensor, weight: Tensor) -> Tensor:
        center = weight @ q / weight.sum()
        moved = q - center
        moments = moved.T @ (weight[:, None] * moved)
        if self.disparity:
            slope = torch.linalg.solve_ex(moments[:2, :2], moments[:2, 2])[0]
            normal = torch.cat([slope, slope.new_tensor([-1.0])])
        else:
            normal = torch.linalg.eigh(moments)[1][:, 0]
        return torch.cat([normal, -(normal @ center)[None]])

    def _normal(self, plane: Tensor) -> Tensor:
        """Of the plane in space, not of unit length and towards either side, [..., 4] -> [..., 3]."""
        return plane[..., [0, 1, 3]] if self.disparity else plane[..., :3]

    def _cosine(self, plane: Tensor, axis: Tensor) -> Tensor:
        return (torch.nn.functional.normalize(self._normal(plane), dim=-1) @ axis).abs()

    def _equation(self, plane: Tensor) -> tuple[Tensor, Tensor]:
        """[4] -> unit normal [3] towards the camera, and its distance."""
        # A disparity d = factor / z is (a, b, c) . ray, so (a, b, c) . X = factor.
        normal = self._normal(plane)
        offset = -plane.new_tensor(self.factor) if self.disparity else plane[3]
        length = normal.norm() * (-1 if offset < 0 else 1)
        return normal / length, offset / length


def homography(source: Tensor, target: Tensor) -> Tensor:
    """The homography that maps four points to four others.

    Args:
        source, target: [..., 4, 2], convex quadrilaterals of the same sense.

    Returns:
        [..., 3, 3] float64, with w = 1 at the mean of `source`; not finite if three of the points lie on a line.

    Raises:
        ValueError: other shapes.
    """
    if source.shape != target.shape or source.shape[-2:] != (4, 2):
        raise ValueError(f"homography: expected [..., 4, 2] twice, got {tuple(source.shape)} and {tuple(target.shape)}")
    to_source, to_target = (_normalisation(p.detach().cpu().double()) for p in (source, target))
    from_source = torch.linalg.inv(to_source)
    (x, y), (u, v) = (
        transform(torch.linalg.inv(m), p.detach().cpu()).unbind(-1)
        for m, p in ((to_source, source), (to_target, target))
    )
    one, zero = torch.ones_like(x), torch.zeros_like(x)
    rows = [
        torch.stack([x, y, one, zero, zero, zero, -x * u, -y * u], -1),
        torch.stack([zero, zero, zero, x, y, one, -x * v, -y * v], -1),
    ]
    solution = torch.linalg.solve_ex(torch.cat(rows, -2), torch.cat([u, v], -1))[0]
    solution = torch.where((_least_triangle(x, y) > FLAT) & (_least_triangle(u, v) > FLAT), solution, math.nan)
    middle = torch.cat([solution, torch.ones_like(solution[..., :1])], -1).unflatten(-1, (3, 3))
    matrix: Tensor = to_target @ middle @ from_source
    return matrix


def _least_triangle(x: Tensor, y: Tensor) -> Tensor:
    """Area of the smallest triangle among four points [..., 4], [..., 1]."""
    areas = []
    for a, b, c in ((0, 1, 2), (0, 1, 3), (0, 2, 3), (1, 2, 3)):
        areas.append(
            (x[..., b] - x[..., a]) * (y[..., c] - y[..., a]) - (x[..., c] - x[..., a]) * (y[..., b] - y[..., a])
        )
    return torch.stack(areas, -1).abs().amin(-1, keepdim=True) / 2


def _normalisation(points: Tensor) -> Tensor:
    """From coordinates in which the points [..., N, 2] have mean 0 and size about 1 to theirs, [..., 3, 3]."""
    center = points.mean(-2)
    scale = (points - center[..., None, :]).abs().mean((-2, -1))
    matrix = torch.diag_embed(torch.stack([scale, scale, torch.ones_like(scale)], -1))
    matrix[..., :2, 2] = center
    return matrix


def transform(matrix: Tensor, points: Tensor) -> Tensor:
    """Points (x, y) [..., N, 2] under homographies [..., 3, 3], float64; NaN beyond the horizon, where w <= 0."""
    matrix, points = matrix.double(), points.double()
    mapped = points @ matrix[..., :2].mT + matrix[..., None, :, 2]
    w = mapped[..., 2:]
    return mapped[..., :2] / torch.where(w > 0, w, math.nan)


def plane_to_image(normal: Tensor, distance: Tensor | float, camera: Camera, at: tuple[float, float]) -> Tensor:
    """Homography from the fronto-parallel view of a plane to the image; its inverse rectifies.

    The view shows the plane as if turned about its point at pixel `at`, by the smallest angle, until it faces the
    camera: `at` is mapped to itself, and there lengths are those that a plane facing the camera would have.

    Args:
        normal: [3], unit length, towards the camera.
        distance: of the camera from the plane, > 0.
        at: pixel (x, y) where the plane is seen.

    Returns:
        [3, 3] float64, with w = 1 at `at`; w <= 0 is behind the camera.

    Raises:
        ValueError: the plane is not seen at `at`, or from its back.
    """
    n = normal.detach().cpu().double()
    ray = torch.tensor([(at[0] - camera.cx) / camera.fx, (at[1] - camera.cy) / camera.fy, 1.0], dtype=torch.float64)
    depth = -float(distance) / float(n @ ray)
    if not (float(distance) > 0 and 0 < depth < math.inf):
        raise ValueError(f"plane_to_image: normal {n.tolist()}, distance {float(distance)} is not seen at pixel {at}")
    facing = n.new_tensor([0.0, 0.0, -1.0])
    axis = torch.linalg.cross(facing, n)
    skew = n.new_tensor([[0, -axis[2], axis[1]], [axis[2], 0, -axis[0]], [-axis[1], axis[0], 0]])
    turn = torch.eye(3, dtype=torch.float64) + skew + skew @ skew / (1 + facing @ n)
    columns = [turn[:, 0] / camera.fx, turn[:, 1] / camera.fy]
    origin = ray - at[0] * columns[0] - at[1] * columns[1]
    return camera.matrix @ torch.stack([*columns, origin], 1)


def _check_map(name: str, value: Tensor) -> None:
    if not isinstance(value, Tensor) or not value.is_floating_point():
        raise TypeError(
            f"{name}: expected a floating-point tensor, got {getattr(value, 'dtype', type(value).__name__)}"
        )
    if value.dim() != 2:
        raise ValueError(f"{name}: expected [H, W], got {tuple(value.shape)}")
