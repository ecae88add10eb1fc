"""Simple shapes cast into images whose depth, flow, labels and materials are known exactly, two frames a world."""

from __future__ import annotations

import itertools
import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastnuggets.scenes.geometry import Camera

KINDS = ("rectangle", "disc", "box", "ellipsoid")
CLASSES = ("nothing", "floor", "wall", "table", "box", "ball", "disc")
MOTIONS = ("none", "camera", "objects", "both")
LIFT = 1e-3  # from a surface towards the light, so that it does not shade itself; in world units
OCCLUDED = 1e-3  # of the depth: a point of the other frame is hidden by what lies nearer than this before it


class Texture(NamedTuple):
    """The albedo of a surface: a checker of two colours, or an image that repeats."""

    colours: tuple[tuple[float, float, float], tuple[float, float, float]]  # 0..1; equal for a plain surface
    cell: float = 1.0  # edge of a square, or width of the image, in world units
    image: Tensor | None = None  # [3, h, w] float 0..1, interpolated linearly; instead of the colours


class Shape(NamedTuple):
    """A shape about the origin of its own coordinates, and where these lie in the world."""

    kind: str  # of KINDS
    size: tuple[float, float, float]  # half the extent along x, y and z; rectangle and disc lie in z = 0
    poses: Tensor  # [2, 4, 4] float64, own coordinates to the world, at either frame; rigid
    texture: Texture
    semantic: int = 1  # class, above 0


class World(NamedTuple):
    """What is seen, how it is lit, and from where. World units are arbitrary; +y is down."""

    shapes: tuple[Shape, ...]
    camera: Camera
    size: tuple[int, int]  # height, width
    views: Tensor  # [2, 4, 4] float64, world to camera coordinates, at either frame; rigid
    light: tuple[float, float, float] = (0.3, -0.9, -0.3)  # direction towards the light, in the world
    ambient: float = 0.3  # shading where no light falls; 1 where it falls straight
    sky: tuple[float, float, float] = (0.6, 0.75, 0.9)
    shadows: bool = True

    def gravity(self, frame: int = 0) -> Tensor:
        """Downwards in camera coordinates, [3] float64."""
        return self.views[frame, :3, 1]


class Rendering(NamedTuple):
    """One frame. Everything but `image` is at the pixels' centres."""

    image: Tensor  # [3, H, W], 0..1: albedo * shading, or its mean over the pixel
    albedo: Tensor  # [3, H, W]
    shading: Tensor  # [1, H, W]; 1 in the sky
    depth: Tensor  # [H, W], along z; inf in the sky
    normal: Tensor  # [3, H, W] in camera coordinates, towards the camera; 0 in the sky
    semantic: Tensor  # [H, W] int64; 0 in the sky
    instance: Tensor  # [H, W] int32, number of the shape; -1 in the sky
    flow: Tensor  # [2, H, W], (x, y) pixels to where the point is in the other frame; NaN if behind its camera
    seen: Tensor  # [H, W] bool: the point is inside the other frame, and not hidden there


def render_scene(
    world: World,
    frame: int = 0,
    *,
    antialias: int = 1,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Rendering:
    """Casts a ray through every pixel of a frame of `world`.

    Light comes from one direction and falls on surfaces that scatter it alike to all sides. So what the flow joins has
    one albedo, and if only the camera moves one colour; a shape that moves changes its shading and where its shadow is.

    Args:
        frame: 0 or 1; the flow leads to the other one.
        antialias: the image is the mean over antialias^2 rays a pixel. 1: it is `albedo * shading`, bit for bit.
        dtype: of the rays and of the result, float32 or float64.

    Raises:
        ValueError: an argument is out of its range, or a shape's kind is unknown.

    Not differentiable. Deterministic.
    """
    if frame not in (0, 1):
        raise ValueError(f"frame must be 0 or 1, got {frame}")
    if antialias < 1:
        raise ValueError(f"antialias: expected 1 or more, got {antialias}")
    for shape in world.shapes:
        if shape.kind not in KINDS:
            raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {shape.kind!r}")
    caster = _Caster(world, frame, dtype, torch.device(device))
    rays = world.camera.rays(world.size).flatten(0, 1).T.to(device, dtype).contiguous()  # [3, P]
    center = caster.look(rays)
    image = center.albedo * center.shading
    if antialias > 1:
        steps = (np.arange(antialias) + 0.5) / antialias - 0.5
        image = torch.zeros_like(image)
        for dy, dx in itertools.product(steps, steps):
            seen = caster.look(rays + rays.new_tensor([[dx / world.camera.fx], [dy / world.camera.fy], [0.0]]))
            image += seen.albedo * seen.shading
        image /= antialias**2
    classes = torch.tensor([shape.semantic for shape in world.shapes] + [0], device=device)
    flat = Rendering(
        image, center.albedo, center.shading[None], center.depth, center.normal, classes[center.instance],
        center.instance.int(), *_flow(world, frame, center, rays),
    )  # fmt: skip
    return Rendering(*(x.unflatten(-1, world.size) for x in flat))


class _Seen(NamedTuple):
    """What P rays meet first."""

    depth: Tensor  # [P]
    instance: Tensor  # [P] int64
    normal: Tensor  # [3, P], in camera coordinates
    albedo: Tensor  # [3, P]
    shading: Tensor  # [P]


class _Caster:
    """The shapes of a world as they lie before the camera in one frame."""

    def __init__(self, world: World, frame: int, dtype: torch.dtype, device: torch.device) -> None:
        self.world = world
        view = world.views[frame]
        to_camera = [view @ shape.poses[frame] for shape in world.shapes]
        self.to_camera = [m.to(device, dtype) for m in to_camera]
        self.to_shape = [torch.linalg.inv(m).to(device, dtype) for m in to_camera]
        light = torch.nn.functional.normalize(torch.tensor(world.light, dtype=torch.float64), dim=0)
        self.light = (view[:3, :3] @ light).to(device, dtype)
        self.sky = torch.tensor(world.sky, dtype=dtype, device=device)

    def nearest(self, rays: Tensor) -> tuple[Tensor, Tensor]:
        """Depth [P] and number [P] of the first shape on rays [3, P] from the camera, of which z = 1."""
        depth = rays.new_full(rays.shape[1:], math.inf)
        instance = torch.full(rays.shape[1:], -1, dtype=torch.int64, device=rays.device)
        for number, (shape, inverse) in enumerate(zip(self.world.shapes, self.to_shape, strict=True)):
            met = _meet(shape, inverse[:3, 3:], inverse[:3, :3] @ rays)
            closer = met < depth
            depth = torch.where(closer, met, depth)
            instance = torch.where(closer, number, instance)
        return depth, instance

    def look(self, rays: Tensor) -> _Seen:
        depth, instance = self.nearest(rays)
        points = rays * torch.where(depth < math.inf, depth, 0.0)
        normal = torch.zeros_like(rays)
        albedo = self.sky[:, None].expand_as(rays).clone()
        for number, shape in enumerate(self.world.shapes):
            own = (instance == number).nonzero()[:, 0]
            if len(own):
                to_shape = self.to_shape[number]
                outward, uv = _surface(shape, to_shape[:3, :3] @ points[:, own] + to_shape[:3, 3:])
                normal[:, own] = self.to_camera[number][:3, :3] @ outward
                albedo[:, own] = _albedo(shape.texture, uv)
        # A rectangle and a disc have two sides.
        normal = torch.where((normal * rays).sum(0) > 0, -normal, normal)
        return _Seen(depth, instance, normal, albedo, self._shading(points, normal, instance))

    def _shading(self, points: Tensor, normal: Tensor, instance: Tensor) -> Tensor:
        lit = (self.light @ normal).clamp(min=0)
        if self.world.shadows:
            facing = (lit > 0).nonzero()[:, 0]
            start = points[:, facing] + LIFT * (normal[:, facing] + self.light[:, None])
            hidden = torch.zeros(len(facing), dtype=torch.bool, device=points.device)
            for shape, inverse in zip(self.world.shapes, self.to_shape, strict=True):
                turn = inverse[:3, :3]
                hidden |= _meet(shape, turn @ start + inverse[:3, 3:], (turn @ self.light)[:, None]) < math.inf
            lit[facing] = torch.where(hidden, 0.0, lit[facing])
        ambient = self.world.ambient
        return torch.where(instance >= 0, ambient + (1 - ambient) * lit, 1.0)


def _meet(shape: Shape, origin: Tensor, direction: Tensor) -> Tensor:
    """How far along rays [3, P] in the shape's coordinates it lies, > 0; inf if they miss it, or start inside it."""
    size = direction.new_tensor(shape.size)[:, None]
    if shape.kind == "ellipsoid":
        o, d = origin / size, direction / size
        a, b = (d * d).sum(0), (o * d).sum(0)
        # By the point of the ray that is nearest to the centre; b^2 - a c loses the digits of a far shape.
        gap = o - (b / a) * d
        discriminant = a * (1 - (gap * gap).sum(0))
        t = (-b - discriminant.clamp(min=0).sqrt()) / a
        return torch.where((discriminant > 0) & (t > 0), t, math.inf)
    if shape.kind == "box":
        one, other = (-size - origin) / direction, (size - origin) / direction
        near, far = torch.minimum(one, other).amax(0), torch.maximum(one, other).amin(0)
        return torch.where((near <= far) & (near > 0), near, math.inf)
    t = -origin[2] / direction[2]
    xy = (origin[:2] + t * direction[:2]) / size[:2]
    inside = (xy.abs() <= 1).all(0) if shape.kind == "rectangle" else (xy * xy).sum(0) <= 1
    return torch.where(inside & (t > 0), t, math.inf)


def _surface(shape: Shape, q: Tensor) -> tuple[Tensor, Tensor]:
    """Outward normals [3, n] and texture coordinates [2, n] (world units) at points q [3, n] of the surface."""
    size = q.new_tensor(shape.size)[:, None]
    if shape.kind == "ellipsoid":
        unit = q / size
        u, v = torch.atan2(unit[0], unit[2]) * size[0], torch.asin(unit[1].clamp(-1, 1)) * size[1]
        return torch.nn.functional.normalize(unit / size, dim=0), torch.stack([u, v])
    if shape.kind == "box":
        axis = (q.abs() / size).argmax(0)  # of the face
        normal = torch.nn.functional.one_hot(axis, 3).T.to(q) * q.sign()
        others = torch.tensor([[2, 0, 0], [1, 2, 1]], device=q.device)
        return normal, q.gather(0, others[:, axis])
    return q.new_tensor([0.0, 0.0, 1.0])[:, None].expand_as(q), q[:2]


def _albedo(texture: Texture, uv: Tensor) -> Tensor:
    """[2, n] -> [3, n]."""
    at = uv / texture.cell
    if texture.image is None:
        odd = at.floor().sum(0) % 2 == 1
        first, second = uv.new_tensor(texture.colours)[..., None]
        return torch.where(odd, second, first)
    image = texture.image.to(uv)
    height, width = image.shape[1:]
    x, y = at * width
    x0, y0 = x.floor(), y.floor()
    columns, rows = ([(i.long() + k) % n for k in (0, 1)] for i, n in ((x0, width), (y0, height)))
    top, bottom = (torch.lerp(image[:, row, columns[0]], image[:, row, columns[1]], x - x0) for row in rows)
    return torch.lerp(top, bottom, y - y0)


def _flow(world: World, frame: int, seen: _Seen, rays: Tensor) -> tuple[Tensor, Tensor]:
    """[2, P] and [P] bool: to the other frame, and whether the point is seen there."""
    other = 1 - frame
    # One motion a shape, from camera coordinates to those of the other frame; the last is that of the sky, whose points
    # are infinitely far and so only turn.
    motions = [
        world.views[other] @ shape.poses[other] @ torch.linalg.inv(world.views[frame] @ shape.poses[frame])
        for shape in world.shapes
    ]
    motions.append(world.views[other] @ torch.linalg.inv(world.views[frame]))
    finite = seen.depth < math.inf
    moved = torch.empty_like(rays)
    for number, motion in enumerate(motions):
        own = (seen.instance == (number if number < len(world.shapes) else -1)).nonzero()[:, 0]
        motion = motion.to(rays)
        here = rays[:, own]
        moved[:, own] = (
            motion[:3, :3] @ here
            if number == len(world.shapes)
            else (motion[:3, :3] @ (here * seen.depth[own]) + motion[:3, 3:])
        )
    z = moved[2]
    ray = moved / torch.where(z > 0, z, math.nan)
    camera, (height, width) = world.camera, world.size
    # Differences of rays, not of pixels, keep small flows exact.
    flow = (ray - rays)[:2] * rays.new_tensor([[camera.fx], [camera.fy]])
    pixel = torch.arange(height * width, device=rays.device)
    x, y = pixel % width + flow[0], pixel // width + flow[1]
    inside = (z > 0) & (x >= 0) & (x <= width - 1) & (y >= 0) & (y <= height - 1)
    depth, _ = _Caster(world, other, rays.dtype, rays.device).nearest(torch.where(inside, ray, 0.0))
    hidden = torch.where(finite, depth < z * (1 - OCCLUDED), depth < math.inf)
    return flow, inside & ~hidden


def pose(
    position: tuple[float, float, float] = (0.0, 0.0, 0.0), *, yaw: float = 0.0, pitch: float = 0.0, roll: float = 0.0
) -> Tensor:
    """[4, 4] float64: turned by roll about z, then pitch about x, then yaw about y (degrees), then moved."""
    a, b, c = (math.radians(x) for x in (yaw, pitch, roll))
    about_y = [[math.cos(a), 0, math.sin(a)], [0, 1, 0], [-math.sin(a), 0, math.cos(a)]]
    about_x = [[1, 0, 0], [0, math.cos(b), -math.sin(b)], [0, math.sin(b), math.cos(b)]]
    about_z = [[math.cos(c), -math.sin(c), 0], [math.sin(c), math.cos(c), 0], [0, 0, 1]]
    turn = [torch.tensor(m, dtype=torch.float64) for m in (about_y, about_x, about_z)]
    matrix = torch.eye(4, dtype=torch.float64)
    matrix[:3, :3] = turn[0] @ turn[1] @ turn[2]
    matrix[:3, 3] = torch.tensor(position, dtype=torch.float64)
    return matrix


def random_scene(
    seed: int,
    size: tuple[int, int] = (240, 320),
    *,
    objects: int = 6,
    motion: str = "both",
    textures: tuple[Tensor, ...] = (),
) -> World:
    """A room of floor, two walls and a table, with boxes, balls and discs on it, seen by a camera above the floor.

    Args:
        seed: the same one and the same arguments make the same world.
        size: height, width.
        objects: on the floor and the table, beside these.
        motion: what moves between the two frames: "none", "camera", "objects" (about a half of them) or "both".
        textures: images [3, h, w] float 0..1 that half the surfaces take instead of a checker.

    Raises:
        ValueError: `motion` is unknown.

    `CLASSES` names the semantic classes; a world unit is about a metre.
    """
    if motion not in MOTIONS:
        raise ValueError(f"motion must be one of {', '.join(MOTIONS)}, got {motion!r}")
    return _Room(np.random.default_rng(seed), objects, motion in ("objects", "both"), textures).world(
        size, motion in ("camera", "both")
    )


class _Room:
    def __init__(self, rng: np.random.Generator, objects: int, moving: bool, textures: tuple[Tensor, ...]) -> None:
        self.rng, self.moving, self.textures = rng, moving, textures
        depth = self.between(5, 7)
        self.shapes = [
            self.still("floor", "rectangle", (20, 20, 0), pose(pitch=90), self.between(0.3, 0.8)),
            self.still("wall", "rectangle", (20, 6, 0), pose((0, 0, depth), yaw=self.between(-15, 15)), 0.7),
            self.still("wall", "rectangle", (20, 6, 0), pose((-3, 0, depth / 2), yaw=self.between(60, 85)), 0.9),
        ]
        x, z = self.between(-0.6, 0.6), self.between(2.6, 3.4)
        half, height = (self.between(0.6, 1.0), 0.03, self.between(0.4, 0.6)), self.between(0.6, 0.9)
        table = pose((x, half[1] - height, z), yaw=self.between(-25, 25))
        self.shapes.append(self.still("table", "box", half, table, 0.25))
        for number in range(objects):
            if number % 2 == 0:
                u, w = self.between(-0.75, 0.75) * half[0], self.between(-0.75, 0.75) * half[2]
                at = (table @ torch.tensor([u, -half[1], w, 1.0], dtype=torch.float64)).tolist()
                self.thing(at[0], at[1], at[2], self.between(0.08, 0.2))
            else:
                self.thing(self.between(-2, 2), 0.0, self.between(2, depth - 0.8), self.between(0.15, 0.4))

    def between(self, low: float, high: float) -> float:
        return float(self.rng.uniform(low, high))

    def still(self, name: str, kind: str, size: tuple[float, float, float], at: Tensor, cell: float) -> Shape:
        return Shape(kind, size, torch.stack([at, at]), self.texture(cell), CLASSES.index(name))

    def texture(self, cell: float) -> Texture:
        first = tuple(self.rng.uniform(0.15, 0.95, 3).tolist())
        second = tuple((np.array(first) * self.between(0.4, 0.9)).tolist())
        kind = self.rng.integers(4)
        if self.textures and kind < 2:
            return Texture((first, first), 4 * cell, self.textures[self.rng.integers(len(self.textures))])
        return Texture((first, first if kind == 2 else second), cell)

    def thing(self, x: float, y: float, z: float, radius: float) -> None:
        """Stands on the height y, which grows downwards; if it moves, it slides and turns there."""
        name = str(self.rng.choice(["box", "ball", "disc"]))
        yaw = self.between(-180, 180)
        if name == "ball":
            kind, size, tilt = "ellipsoid", (radius, radius, radius), 0.0
        elif name == "box":
            kind, size, tilt = "box", (radius, radius * self.between(0.5, 1.2), radius * self.between(0.5, 1)), 0.0
        else:
            kind, size, tilt = "disc", (radius, radius, 0.0), self.between(-20, 20)
            yaw = self.between(-60, 60)
        # A disc that leans stands a little deep, or a little high: by 1 - cos(20 degrees) of its radius at most.
        first = pose((x, y - size[1], z), yaw=yaw, pitch=tilt)
        second = first
        if self.moving and self.rng.random() < 0.5:
            shift = (x + self.between(-0.15, 0.15), y - size[1], z + self.between(-0.15, 0.15))
            second = pose(shift, yaw=yaw + self.between(-10, 10), pitch=tilt)
        texture = self.texture(radius / 2)
        self.shapes.append(Shape(kind, size, torch.stack([first, second]), texture, CLASSES.index(name)))

    def world(self, size: tuple[int, int], moving: bool) -> World:
        at = (self.between(-0.3, 0.3), -self.between(1.3, 1.8), 0.0)
        yaw, pitch = self.between(-8, 8), self.between(-25, -12)
        first = pose(at, yaw=yaw, pitch=pitch)
        second = first
        if moving:
            step = [a + self.between(-0.12, 0.12) for a in at]
            second = pose(
                (step[0], step[1], step[2]), yaw=yaw + self.between(-2, 2), pitch=pitch + self.between(-1, 1),
                roll=self.between(-1, 1),
            )  # fmt: skip
        light = (self.between(-0.6, 0.6), -1.0, self.between(-0.9, -0.3))
        views = torch.linalg.inv(torch.stack([first, second]))
        return World(tuple(self.shapes), Camera.of(size), size, views, light, self.between(0.2, 0.45))
