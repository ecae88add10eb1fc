"""Parts of a photograph that carry things: supports that objects stand on, and plain faces that text is written on."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastnuggets.molecules.files import need
from fastnuggets.scenes.geometry import (
    DEFAULT_THRESHOLD,
    Camera,
    fit_plane,
    fit_planes,
    plane_depth,
    plane_to_image,
    transform,
    unproject,
)

Array = np.ndarray[Any, Any]

GREATEST_SUPPORTS = 8
TRIALS, REACH = 512, 16  # three pixels are at most a sixteenth of the image apart: they must lie on one surface
WINDOW, ROUGHLY = 7, math.cos(math.radians(45))  # pixels that tell a surface's direction, and how well
LEAST_THICKNESS = 64  # a support is wider than this fraction of the image everywhere: a wall's rows are not one

SEGMENTED = 320  # longer side of the image that is cut into regions
LEAST_AREA, LEAST_SIDE, ASPECTS, LEAST_FILL = 100, 30, (0.3, 7.0), 0.4  # of a region and its rectangle
LEAST_MEDIAN = 20  # of a region's widths and heights seen face to face
LARGEST_VIEW = 2**22  # pixels of a region seen face to face; steeper planes are left alone
LEAST_SLOPE = 0.25  # of a plane's normal along z
LEAST_SHARE = 0.5  # of a region's pixels that must lie on its plane


class Support(NamedTuple):
    """A surface that things can stand on."""

    normal: Tensor  # [3] float64, towards the camera
    distance: float  # of the camera from its plane
    mask: Array  # [H, W] bool
    hole: float  # part of its outline that is something else


class Places(NamedTuple):
    """Points where objects may stand, n of them."""

    points: Array  # [n, 2] int64, pixel (x, y)
    depth: Array  # [n] float64
    support: Array  # [n] int64, which of the supports

    def scale(self, reference: float | Array) -> Array:
        """[n]: by what to multiply the size of objects photographed at the depth `reference`, a number or [n]."""
        return np.asarray(reference, np.float64) / self.depth

    def corner(self, size: Array, reference: float | Array) -> Array:
        """[n, 2] (y, x): the top left of objects of `size` [n, 2] (height, width), so that their foot is at the point.

        The foot is the middle of the lower edge of the scaled object.
        """
        height, width = (np.asarray(size, np.float64) * self.scale(reference)[:, None]).T
        return np.stack([self.points[:, 1] + 1 - height, self.points[:, 0] - (width - 1) / 2], 1)


class SupportSurfaces:
    """The level surfaces of a scene: large enough, without large holes, and of given classes if wanted.

    Planes are found one after the other by RANSAC among those that are level, each in what the earlier ones left over;
    a support is a connected part of one. Rows of a wall at the height of such a plane are no part of it.

    Args:
        depth: [H, W] along z, or with `disparity` inverse depth up to a factor; NaN, inf and 0 where unknown.
        camera: of the depth.
        gravity: [3], downwards in camera coordinates; the default is that of a level camera.
        semantic: [H, W] integers; with `classes`, numbers of those that support: only their pixels count.
        angle: degrees by which a support may slope, and by which gravity may be wrong.
        threshold: as in `fit_planes`; None: 1 % of the median of `depth`.
        least_area: of a support, as a fraction of the image.
        largest_hole: holes of a support, as a fraction of it with them; pixels without depth are none.
        seed: of RANSAC.

    Raises:
        ValueError, TypeError: an argument is out of its range or of another kind.

    Attributes:
        supports: a list of `Support`, the largest first; it may be empty.

    The use of supports for places and of depth for scale follows G. Georgakis et al., Synthesizing Training Data for
    Object Detection in Indoor Scenes, RSS 2017, arXiv:1702.07836; the steps and their limits are our own.
    """

    def __init__(
        self,
        depth: Tensor | Array,
        camera: Camera,
        *,
        gravity: Sequence[float] | Tensor = (0.0, 1.0, 0.0),
        semantic: Tensor | Array | None = None,
        classes: Sequence[int] | None = None,
        disparity: bool = False,
        angle: float = 10.0,
        threshold: float | None = None,
        least_area: float = 0.01,
        largest_hole: float = 0.25,
        seed: int = 0,
    ) -> None:
        if not 0 < least_area <= 1 or not 0 <= largest_hole <= 1:
            raise ValueError(f"least_area, largest_hole: expected fractions, got {least_area}, {largest_hole}")
        if (semantic is None) != (classes is None):
            raise ValueError("semantic and classes belong together")
        values = torch.as_tensor(depth).detach().cpu().double()
        known = torch.isfinite(values) & (values > 0)
        left = known.clone()
        if semantic is not None and classes is not None:
            left &= torch.isin(torch.as_tensor(semantic).cpu(), torch.tensor(list(classes)))
        if threshold is None:
            threshold = DEFAULT_THRESHOLD * float(values[known].median()) if known.any() else 1.0
        down = torch.nn.functional.normalize(torch.as_tensor(gravity, dtype=torch.float64), dim=0)
        inverse = torch.where(known, values if disparity else 1 / values, math.nan)
        level, sure = _level(inverse.numpy(), camera, down.numpy())
        options = {"disparity": disparity, "threshold": threshold, "along": down, "angle": angle, "trials": TRIALS}
        options["reach"] = max(1, max(values.shape) // REACH)
        least = math.ceil(least_area * values.numel())
        self.depth = (1 / inverse).numpy()
        found: list[Support] = []
        for number in range(GREATEST_SUPPORTS):
            plane = fit_plane(values, camera, left & torch.from_numpy(level), seed=seed + number, **options)
            normal, distance = plane.normal[0], plane.distance[0]
            flat = plane_depth(normal, distance, camera, (values.shape[0], values.shape[1]))
            apart = 1 / flat - values if disparity else unproject(values, camera) @ normal + distance
            own = left & (apart.abs() <= threshold)
            if int(own.sum()) < least:
                break
            for mask, hole in _parts(own.numpy(), least, ~known.numpy()):
                if hole <= largest_hole and sure[mask].any() and level[mask & sure].mean() > 0.5:
                    found.append(Support(normal, float(distance), mask, hole))
            left &= ~own
        self.supports = sorted(found, key=lambda one: -int(one.mask.sum()))

    def sample(self, count: int, seed: int | Sequence[int] | np.random.Generator = 0) -> Places:
        """Random points: a support by lot, then one of its pixels.

        Raises:
            ValueError: there is no support.
        """
        if count and not self.supports:
            raise ValueError("there is no support: no level surface is large enough")
        rng = np.random.default_rng(seed)
        support = rng.integers(max(1, len(self.supports)), size=count)
        inside = [np.argwhere(one.mask) for one in self.supports]
        drawn = [inside[s][rng.integers(len(inside[s]))] for s in support]
        points = np.array(drawn, np.int64).reshape(-1, 2)
        return Places(points[:, ::-1].copy(), self.depth[points[:, 0], points[:, 1]], support)


def _level(inverse: Array, camera: Camera, down: Array) -> tuple[Array, Array]:
    """Where a surface is level, roughly and from its surroundings alone; and where these are known. [H, W] bool each.

    On a plane the inverse depth is m . ray, and m is along its normal: two slopes tell it.
    """
    cv2 = need("cv2", "scenes")
    steps = np.arange(WINDOW) - WINDOW // 2
    mean, slope = np.full(WINDOW, 1 / WINDOW), steps / float((steps**2).sum())
    known = np.isfinite(inverse)
    filled = np.where(known, inverse, 0.0)
    a, b, c = (
        cv2.sepFilter2D(filled, cv2.CV_64F, x, y, borderType=cv2.BORDER_REPLICATE)
        for x, y in ((slope, mean), (mean, slope), (mean, mean))
    )
    y, x = np.indices(inverse.shape)
    m = np.stack([a * camera.fx, b * camera.fy, c - a * (x - camera.cx) - b * (y - camera.cy)], -1)
    whole = cv2.erode(known.astype(np.uint8), np.ones((WINDOW, WINDOW), np.uint8)) > 0
    return whole & (np.abs(m @ down) > ROUGHLY * np.linalg.norm(m, axis=-1)), whole


def _parts(mask: Array, least: int, unknown: Array) -> Iterator[tuple[Array, float]]:
    """Connected parts of at least `least` pixels that are nowhere thin, and their holes."""
    cv2 = need("cv2", "scenes")
    thickness = max(3, max(mask.shape) // LEAST_THICKNESS | 1)
    kernel = np.ones((thickness, thickness), np.uint8)
    closed = cv2.morphologyEx(mask.astype(np.uint8), cv2.MORPH_CLOSE, np.ones((3, 3), np.uint8))  # noise's pin-holes
    core = cv2.morphologyEx(closed, cv2.MORPH_OPEN, kernel, borderType=cv2.BORDER_REPLICATE)
    count, labels = cv2.connectedComponents(core, connectivity=4)
    filled = ~_reached(closed == 0)
    outlines = cv2.connectedComponents(filled.astype(np.uint8), connectivity=4)[1]
    for number in range(1, count):
        own = (labels == number) & mask
        if own.sum() >= least:
            outline = (outlines == outlines[own][0]) & ~unknown
            yield own, float((outline & (closed == 0)).sum()) / float(outline.sum())


def _reached(free: Array) -> Array:
    """Pixels of `free` that are joined to the border of the image."""
    cv2 = need("cv2", "scenes")
    framed = np.pad(free, 1, constant_values=True).astype(np.uint8)
    _, labels = cv2.connectedComponents(framed, connectivity=4)
    return np.asarray(labels[1:-1, 1:-1] == labels[0, 0])


class Face(NamedTuple):
    """A plain region of an image, seen face to face in a view of its own."""

    mask: Array  # [H, W] bool, of the image
    to_image: Array  # [3, 3] float64, from pixels (x, y) of the view to those of the image
    size: tuple[int, int]  # height and width of the view
    colour: Array  # [3] float64, mean of the region, 0..255

    def seen(self, mask: Array) -> Array:
        """A mask [H, W] of the image in the view, bool."""
        cv2 = need("cv2", "scenes")
        flags = cv2.INTER_NEAREST | cv2.WARP_INVERSE_MAP
        return np.asarray(cv2.warpPerspective(mask.astype(np.uint8), self.to_image, self.size[::-1], flags=flags)) > 0


def segment(image: Array) -> Array:
    """[H, W, 3] uint8 -> [H, W] int64: regions of even colour (Felzenszwalb), found on a smaller image."""
    cv2, segmentation = need("cv2", "scenes"), need("skimage.segmentation", "scenes")
    height, width = image.shape[:2]
    shrink = min(1.0, SEGMENTED / max(height, width))
    size = (max(1, round(width * shrink)), max(1, round(height * shrink)))
    small = cv2.resize(image, size, interpolation=cv2.INTER_AREA) if shrink < 1 else image
    labels = segmentation.felzenszwalb(small, scale=200, sigma=0.8, min_size=2 * LEAST_AREA)
    return np.asarray(cv2.resize(labels.astype(np.int32), (width, height), interpolation=cv2.INTER_NEAREST), np.int64)


def faces(
    image: Array,
    labels: Array,
    *,
    depth: Tensor | Array | None = None,
    camera: Camera | None = None,
    disparity: bool = False,
    texture: float = 8.0,
    seed: int = 0,
) -> list[Face]:
    """The regions of an image that are large, full, plain and, if there is depth, flat enough to be written on.

    Args:
        image: [H, W, 3] uint8.
        labels: [H, W] integers, regions; negative for none.
        depth: [H, W] along z, or with `disparity` inverse depth up to a factor. None: every region faces the camera.
        camera: of the depth; None: one of 60 degrees.
        texture: mean difference between neighbouring pixels inside a region, in grey levels, at most.
        seed: of RANSAC.
    """
    size = image.shape[:2]
    camera = Camera.of(size) if camera is None else camera
    kept = [number for number in _plain(image, labels, texture) if _full(labels == number)]
    if depth is None:
        found = [_face(image, labels == number, None, camera) for number in kept]
        return [face for face in found if face is not None]
    names = np.full(int(labels.max(initial=0)) + 2, -1)  # the last is that of no region
    names[kept] = np.arange(len(kept))
    regions = torch.from_numpy(names[labels.clip(-1)])
    planes = fit_planes(torch.as_tensor(depth), camera, regions, disparity=disparity, seed=seed)
    cv2 = need("cv2", "scenes")
    # Of a region that goes round an edge, the part in the plane; noise makes holes of single pixels in it.
    flat = cv2.morphologyEx(planes.mask.numpy().astype(np.uint8), cv2.MORPH_CLOSE, np.ones((5, 5), np.uint8)) > 0
    found = []
    for r, number in enumerate(kept):
        if r < len(planes.share) and planes.share[r] >= LEAST_SHARE and planes.normal[r, 2] < -LEAST_SLOPE:
            plane = (planes.normal[r], float(planes.distance[r]))
            found.append(_face(image, (labels == number) & flat, plane, camera))
    return [face for face in found if face is not None]


def _plain(image: Array, labels: Array, texture: float) -> list[int]:
    """Regions that are large enough and hold no more texture than that."""
    grey, count = image.mean(2), int(labels.max(initial=-1)) + 1
    area, steps, pairs = np.bincount(labels[labels >= 0], minlength=count), np.zeros(count), np.zeros(count)
    for axis in (0, 1):
        one, other = np.delete(labels, -1, axis), np.delete(labels, 0, axis)
        inside = (one == other) & (one >= 0)
        steps += np.bincount(one[inside], np.abs(np.diff(grey, axis=axis))[inside], minlength=count)
        pairs += np.bincount(one[inside], minlength=count)
    return np.flatnonzero((area > LEAST_AREA) & (steps <= texture * pairs)).tolist()


def _full(mask: Array) -> bool:
    """Whether a region is wide enough, and fills its rectangle."""
    cv2 = need("cv2", "scenes")
    (_, (width, height), _) = cv2.minAreaRect(_outline(mask).numpy().astype(np.float32))
    return bool(min(width, height) >= LEAST_SIDE and mask.sum() >= LEAST_FILL * width * height)


def _face(image: Array, mask: Array, plane: tuple[Tensor, float] | None, camera: Camera) -> Face | None:
    """A region's view along its longer side, or the side that is nearer to level; None if it is too small there."""
    cv2 = need("cv2", "scenes")
    outline = _outline(mask)
    turned = torch.eye(3, dtype=torch.float64)
    if plane is not None:
        middle = outline.mean(0)
        try:
            turned = plane_to_image(*plane, camera, (float(middle[0]), float(middle[1])))
        except ValueError:
            return None
    seen = transform(torch.linalg.inv(turned), outline)
    if not torch.isfinite(seen).all():
        return None
    (x, y), (width, height), angle = cv2.minAreaRect(seen.numpy().astype(np.float32))
    quarters = round(
        angle / 90
    )  # which side is called the width, and the sign of the angle, depend on OpenCV's version
    angle -= 90 * quarters
    if quarters % 2:
        width, height = height, width
    size = (math.ceil(height) + 1, math.ceil(width) + 1)
    if size[0] * size[1] > LARGEST_VIEW or not ASPECTS[0] < size[1] / size[0] < ASPECTS[1]:
        return None
    c, s = math.cos(math.radians(angle)), math.sin(math.radians(angle))
    u, v = (size[1] - 1) / 2, (size[0] - 1) / 2
    from_view = np.array([[c, -s, x - c * u + s * v], [s, c, y - s * u - c * v], [0, 0, 1]])
    face = Face(mask, turned.numpy() @ from_view, size, image[mask].mean(0))
    own = face.seen(mask)
    widths, heights = own.sum(1), own.sum(0)
    if not own.any() or min(np.median(widths[widths > 0]), np.median(heights[heights > 0])) < LEAST_MEDIAN:
        return None
    return face


def _outline(mask: Array) -> Tensor:
    """Its border pixels (x, y), [n, 2] float64."""
    cv2 = need("cv2", "scenes")
    contours, _ = cv2.findContours(mask.astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    return torch.from_numpy(np.concatenate(contours)[:, 0].astype(np.float64))
