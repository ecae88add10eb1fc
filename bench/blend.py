"""Blending: composites, filters and Poisson blends beside the packages a user would otherwise take."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bench.cases import Contender, Gate, Group, Missing
from bench.peers import needs
from fastnuggets import ops
from fastnuggets.demo_blend import equations, judged, opencv, solved
from fastnuggets.scenes import samples

Size = tuple[int, int]
Array = np.ndarray[Any, Any]

SIZES: tuple[Size, ...] = ((256, 256), (512, 512), (768, 1024))
SQUARES = (64, 128, 256, 512, 1024, 2048)
LEVELS = 255.0
ROUNDING = 0.5 / LEVELS  # of a result of 8 bits
# The op promises a quarter of a grey level before it rounds.
POISSON_TOLERANCE = ROUNDING + 0.25 / LEVELS
# A blurred mask of 8 bits may be rounded as well.
ALPHA_TOLERANCE = 1.01 / LEVELS
FLOAT_TOLERANCE = 1e-6
GRADIENT_TOLERANCE = 2e-6
TURN = 3.0  # milliseconds: most calls are shorter, and come one after the other where they are used
FEATHERS = ("cv2.GaussianBlur and Pillow paste", "cv2.GaussianBlur and blendLinear", "kornia")
FPIE_SWEEPS, FPIE_TIMED = 5000, 250  # the default; and how many of them are timed
PIXEL = torch.tensor([[0, 0]])


def name_of(size: Size) -> str:
    return f"{size[1]}x{size[0]}" if size[0] != size[1] else f"{size[0]}^2"


def pictures(size: Size, mask: str = "cat") -> tuple[Array, Array, Array]:
    """Object and background, uint8 [H, W, 3], and the mask, bool [H, W]."""
    return photo("chelsea", size), photo("coffee", size), shape(mask, size)


def photo(name: str, size: Size) -> Array:
    """A photograph or, where none is installed, waves with the fall of a photograph's spectrum."""
    try:
        return samples.photo(name, size)
    except ImportError:
        rng = np.random.default_rng(len(name))
        y, x = np.arange(size[0])[:, None, None] / size[0], np.arange(size[1])[:, None] / size[1]
        waves = [
            np.cos(2 * np.pi * (f * (y * a + x * b) + c)) / f
            for f in 2.0 ** np.arange(8)
            for a, b, c in [rng.random((3, 3))]
        ]
        return (127.5 + 60 * sum(waves)).clip(0, LEVELS).astype(np.uint8)


def shape(name: str, size: Size) -> Array:
    try:
        return samples.mask(name, size)
    except ImportError:
        return samples.mask("spiral", size)


def tensors(size: Size, device: str, mask: str = "cat") -> tuple[Tensor, ops.Objects]:
    """The same as a background [1, H, W, 3] and a packed object."""
    fg, bg, inside = pictures(size, mask)
    image, own = torch.tensor(bg, device=device)[None], torch.tensor(inside, device=device)
    return image, ops.pack_objects([torch.tensor(fg, device=device)], [own], channels_last=True)


# --- Poisson ----------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=8)
def exact(size: Size, guidance: str, mask: str = "cat", clipped: bool = True) -> Array:
    """The direct solution in float64, [H, W, 3] in 0 ... 255; without SciPy the CPU's in float64."""
    try:
        result = solved(*pictures(size, mask), guidance)
    except ImportError:
        background, objects = tensors(size, "cpu", mask)
        whole = objects._replace(pixels=objects.pixels / 255.0, mask=objects.mask / 255.0)
        whole = whole._replace(pixels=whole.pixels.double(), mask=whole.mask.double())
        result = (
            LEVELS
            * ops.poisson_blend(
                background[0].double() / LEVELS,
                whole,
                position=PIXEL,
                guidance=guidance,
                tolerance=1e-6,
                channels_last=True,
            ).numpy()
        )
    return result.clip(0, LEVELS) if clipped else result


def seen(image: Array, size: Size, guidance: str) -> str:
    """What a reader wants to know of a picture: its errors, and what it did outside the mask."""
    _, background, inside = pictures(size)
    found = judged(image.astype(float), exact(size, guidance), inside, background)
    outside = f"{found['outside']:.0%} changed outside"
    return f"{found['largest']:.3g} grey levels at most, {found['mean']:.2g} on average; {outside}"


def poisson_group(size: Size, device: str) -> Iterator[Contender | Missing]:
    """From uint8 to uint8, one object as large as the picture."""
    background, objects = tensors(size, device)
    for guidance in ("import", "mixed"):

        def run(guidance: str = guidance) -> Tensor:
            return ops.poisson_blend(background, objects, position=PIXEL, guidance=guidance, channels_last=True)

        def error(image: Tensor, guidance: str = guidance) -> float:
            return float(np.abs(image[0].cpu().numpy() - exact(size, guidance)).max() / LEVELS)

        note = seen(run()[0].cpu().numpy(), size, guidance)
        yield Contender(f"ours, {guidance}, {name_of(size)}", run, error, POISSON_TOLERANCE, note=note)
    if device == "cpu":
        for make in (opencv_clone, pietorch, fpie, pyamg):
            for guidance in ("import", "mixed"):
                yield make(size, guidance)


def poisson_row(
    name: str, size: Size, guidance: str, run: Callable[[], Any], picture: Array, scale: float = 1.0
) -> Contender:
    """A peer's row. What it gives is no gate: most of them solve another problem or not to the end."""
    ours = f"ours, {guidance}, {name_of(size)}"
    note = seen(picture, size, guidance)
    return Contender(f"{name}, {guidance}, {name_of(size)}", run, against=ours, scale=scale, note=note)


@needs("cv2")
def opencv_clone(size: Size, guidance: str) -> Contender:
    given = pictures(size)
    return poisson_row(
        "OpenCV seamlessClone", size, guidance, lambda: opencv(*given, guidance), opencv(*given, guidance)
    )


@needs("pietorch")
def pietorch(size: Size, guidance: str) -> Contender:
    """With its Green function made beforehand, as for many pictures of one size."""
    from pietorch import CachedPoissonBlender

    fg, bg, inside = (torch.tensor(a).float() for a in pictures(size))
    fg, bg = fg.permute(2, 0, 1) / LEVELS, bg.permute(2, 0, 1) / LEVELS
    blender = CachedPoissonBlender()

    def run() -> Tensor:  # it sets the border of its mask to zero
        return blender.blend(bg, fg, inside.clone(), torch.tensor([0, 0]), guidance == "mixed", channels_dim=0)

    picture = (run().permute(1, 2, 0).clamp(0, 1) * LEVELS).round().numpy()
    return poisson_row("pietorch, cached", size, guidance, run, picture)


@needs("fpie")
def fpie(size: Size, guidance: str) -> Contender | Missing:
    from fpie.process import ALL_BACKEND, EquProcessor

    if "openmp" not in ALL_BACKEND:
        return Missing(f"fpie, {guidance}", "its OpenMP core was not built when it was installed")

    fg, bg, inside = pictures(size)
    white = inside.astype(np.uint8) * 255

    def solver(threads: int) -> Any:
        made = EquProcessor("src" if guidance == "import" else "max", "openmp", threads)
        made.reset(fg, white, bg, (0, 0), (0, 0))
        return made

    solvers = {count: solver(count) for count in (1, 2)}
    picture = solver(2).step(FPIE_SWEEPS)[0]

    def run() -> Any:
        return solvers[min(2, torch.get_num_threads())].step(FPIE_TIMED)

    name = f"fpie, its default {FPIE_SWEEPS} sweeps without the set-up"
    return poisson_row(name, size, guidance, run, picture, FPIE_TIMED / FPIE_SWEEPS)


@needs("pyamg")
def pyamg(size: Size, guidance: str) -> Contender:
    """The right equation by the usual tools: assembled, Ruge-Stüben hierarchy, CG to 1e-4."""
    import pyamg

    fg, bg, inside = pictures(size)

    def run() -> Array:
        matrix, right, rows = equations(fg.astype(float), bg.astype(float), inside, guidance)
        solver = pyamg.ruge_stuben_solver(matrix.tocsr())
        result = bg.copy()
        for channel in range(3):
            start = bg[rows[:, 0], rows[:, 1], channel].astype(float)
            found = solver.solve(right[:, channel], x0=start, tol=1e-4, accel="cg")
            result[rows[:, 0], rows[:, 1], channel] = found.round().clip(0, LEVELS)
        return result

    return poisson_row("SciPy and pyamg", size, guidance, run, run())


def batch_group(device: str, size: Size, count: int) -> Iterator[Contender]:
    """As many pictures at once, the four masks in turn; and all with one mask, forward and backward."""
    fg, bg, _ = pictures(size)
    image = torch.tensor(bg, device=device).expand(count, -1, -1, -1).contiguous()
    names = [samples.MASKS[i % len(samples.MASKS)] for i in range(count)]
    for title, used in ((f"{count} x cat", ["cat"] * count), (f"{count} of four masks", names)):
        shapes = [torch.tensor(shape(name, size), device=device) for name in used]
        objects = ops.pack_objects([torch.tensor(fg, device=device)] * count, shapes, channels_last=True)

        def run(objects: ops.Objects = objects) -> Tensor:
            where = torch.zeros(count, 2, dtype=torch.long)
            return ops.poisson_blend(image, objects, position=where, channels_last=True)

        def error(made: Tensor, used: list[str] = used) -> float:
            pairs = zip(made.cpu().numpy(), used, strict=True)
            return float(max(np.abs(m - exact(size, "import", name)).max() for m, name in pairs) / LEVELS)

        yield Contender(f"ours, {title}, an image", run, error, POISSON_TOLERANCE, scale=count)


def adjoint_group(device: str, size: Size) -> Iterator[Contender]:
    """float32, channels first: the blend alone, and with the gradients of object and background."""
    fg, bg, inside = pictures(size)
    own = torch.tensor(inside, device=device)
    for guidance in ("import", "mixed"):
        object_, image = (torch.tensor(a / LEVELS, device=device).float().permute(2, 0, 1) for a in (fg, bg))
        leaves = [image[None].contiguous().requires_grad_(), object_.contiguous().requires_grad_()]
        weight = torch.randn(leaves[0].shape, generator=torch.Generator().manual_seed(0)).to(device)

        def run(leaves: list[Tensor] = leaves, guidance: str = guidance) -> Tensor:
            return ops.poisson_blend(leaves[0], [leaves[1]], [own], position=PIXEL, guidance=guidance)

        def forward(run: Callable[[], Tensor] = run) -> Tensor:
            with torch.no_grad():
                return run()

        def both(
            run: Callable[[], Tensor] = run, leaves: list[Tensor] = leaves, weight: Tensor = weight
        ) -> tuple[Tensor, ...]:
            return torch.autograd.grad(run(), leaves, weight)

        def error(made: Tensor, guidance: str = guidance) -> float:
            expected = exact(size, guidance, clipped=False) / LEVELS
            return float(np.abs(made[0].permute(1, 2, 0).cpu().numpy() - expected).max())

        yield Contender(f"forward, {guidance}", forward, error, 0.25 / LEVELS)
        yield Contender(f"forward and backward, {guidance}", both, against=f"forward, {guidance}")


def squares_group(device: str, squares: tuple[int, ...]) -> Iterator[Contender]:
    for n in squares:
        background, objects = tensors((n, n), device)

        def run(background: Tensor = background, objects: ops.Objects = objects) -> Tensor:
            return ops.poisson_blend(background, objects, position=PIXEL, channels_last=True)

        yield Contender(f"ours, {n}^2, a megapixel", run, scale=n * n / 1e6)


# --- composites -------------------------------------------------------------------------------------------------------


def alpha_truth(size: Size, feather: bool) -> Array:
    """The definition in float64, [H, W, 3] in 0 ... 255."""
    fg, bg, inside = pictures(size)
    alpha = inside.astype(float)
    if feather:
        taps = np.exp(-0.5 * (np.arange(-2, 3) / 2.0) ** 2)
        taps /= taps.sum()
        for axis in (0, 1):
            width = [(2, 2) if a == axis else (0, 0) for a in (0, 1)]
            padded = np.pad(alpha, width, mode="reflect")
            alpha = sum(t * np.take(padded, np.arange(alpha.shape[axis]) + i, axis) for i, t in enumerate(taps))
    return np.asarray(alpha[..., None] * fg + (1 - alpha[..., None]) * bg)


def composite_group(size: Size, device: str, mode: str) -> Iterator[Contender | Missing]:
    """uint8 pictures with the channels last, as the peers want them."""
    background, objects = tensors(size, device)
    feather = mode == "gaussian"

    def run() -> Tensor:
        return ops.composite(background, objects, position=PIXEL, mode=mode, channels_last=True)

    def error(made: Tensor) -> float:
        return float(np.abs(made[0].cpu().numpy() - alpha_truth(size, feather)).max() / LEVELS)

    yield Contender(f"ours, {mode}, {name_of(size)}", run, error, ALPHA_TOLERANCE)
    if device == "cpu":
        yield pillow_paste(size, feather)
        yield blend_linear(size, feather)
        if feather:
            yield kornia_feather(size)


def alpha_error(size: Size, feather: bool) -> Callable[[Any], float]:
    return lambda made: float(np.abs(np.asarray(made, dtype=float) - alpha_truth(size, feather)).max() / LEVELS)


def alpha_row(name: str, size: Size, feather: bool, run: Callable[[], Any], tolerance: float) -> Contender:
    mode = "gaussian" if feather else "none"
    error = alpha_error(size, feather)
    return Contender(f"{name}, {name_of(size)}", run, error, tolerance, f"ours, {mode}, {name_of(size)}")


@needs("PIL")
def pillow_paste(size: Size, feather: bool) -> Contender | Missing:
    """With a feather: blurred by OpenCV, pasted by Pillow, as the published scene generator does it."""
    from PIL import Image

    fg, bg, inside = pictures(size)
    front, back, white = Image.fromarray(fg), Image.fromarray(bg), inside.astype(np.uint8) * 255
    if feather:
        try:
            import cv2
        except ImportError as error:
            return Missing("cv2.GaussianBlur and Pillow paste", str(error))

    def run() -> Any:
        picture = back.copy()
        mask = cv2.GaussianBlur(white, (5, 5), 2) if feather else white
        picture.paste(front, (0, 0), Image.fromarray(mask))
        return picture

    return alpha_row("cv2.GaussianBlur and Pillow paste" if feather else "Pillow paste", size, feather, run,
                     2 * ALPHA_TOLERANCE)  # fmt: skip


@needs("cv2")
def blend_linear(size: Size, feather: bool) -> Contender:
    import cv2

    fg, bg, inside = pictures(size)
    weight = inside.astype(np.float32)

    def run() -> Any:
        cv2.setNumThreads(torch.get_num_threads())
        w = cv2.GaussianBlur(weight, (5, 5), 2) if feather else weight
        return cv2.blendLinear(fg, bg, w, 1 - w)

    name = "cv2.GaussianBlur and blendLinear" if feather else "cv2.blendLinear"
    return alpha_row(name, size, feather, run, ALPHA_TOLERANCE)


@needs("kornia")
def kornia_feather(size: Size) -> Contender:
    from kornia.filters import gaussian_blur2d

    fg, bg, inside = (torch.tensor(a).float() for a in pictures(size))
    fg, bg, mask = fg.permute(2, 0, 1)[None], bg.permute(2, 0, 1)[None], inside[None, None]

    def run() -> Tensor:
        alpha = gaussian_blur2d(mask, (5, 5), (2.0, 2.0))
        return (alpha * fg + (1 - alpha) * bg).round().to(torch.uint8)

    row = alpha_row("kornia", size, True, run, ALPHA_TOLERANCE)
    return replace(row, error=lambda made: alpha_error(size, True)(made[0].permute(1, 2, 0)))


def feather_backward_group(size: Size, device: str) -> Iterator[Contender | Missing]:
    """float32, a Gaussian feather with the gradients of object, background and mask."""
    fg, bg, inside = (torch.tensor(a, device=device) for a in pictures(size))
    leaves = [(t.float() / LEVELS).permute(2, 0, 1).contiguous() for t in (bg, fg)] + [inside.float()]
    weight = torch.randn(leaves[0].shape, generator=torch.Generator().manual_seed(0)).to(device)

    def both(function: Callable[..., Tensor]) -> Callable[[], tuple[Tensor, ...]]:
        own = [t.clone().requires_grad_() for t in leaves]
        return lambda: torch.autograd.grad(function(*own), own, weight)

    def ours(bg: Tensor, fg: Tensor, mask: Tensor) -> Tensor:
        return ops.composite(bg, [fg], [mask], position=PIXEL, mode="gaussian")

    def error(made: tuple[Tensor, ...]) -> float:
        own = [t.double().cpu().requires_grad_() for t in leaves]
        expected = torch.autograd.grad(feathered(*own), own, weight.double().cpu())
        pairs = zip(made, expected, strict=True)
        return max(((m.double().cpu() - e).abs().max() / e.abs().max()).item() for m, e in pairs)

    yield Contender("ours", both(ours), error, GRADIENT_TOLERANCE)
    yield Contender("plain torch", both(feathered), error, GRADIENT_TOLERANCE, against="ours")
    yield kornia_backward(both, error)


def feathered(bg: Tensor, fg: Tensor, mask: Tensor) -> Tensor:
    taps = torch.exp(-0.5 * (torch.arange(-2, 3, dtype=torch.float64) / 2.0) ** 2)
    taps = (taps / taps.sum()).to(mask)
    padded = torch.nn.functional.pad(mask[None, None], (2, 2, 2, 2), mode="reflect")
    alpha = torch.nn.functional.conv2d(padded, taps.outer(taps)[None, None])[0, 0]
    return alpha * fg + (1 - alpha) * bg


@needs("kornia")
def kornia_backward(both: Callable[..., Any], error: Callable[[Any], float]) -> Contender:
    from kornia.filters import gaussian_blur2d

    def theirs(bg: Tensor, fg: Tensor, mask: Tensor) -> Tensor:
        alpha = gaussian_blur2d(mask[None, None], (5, 5), (2.0, 2.0))[0, 0]
        return alpha * fg + (1 - alpha) * bg

    return Contender("kornia", both(theirs), error, GRADIENT_TOLERANCE, against="ours")


def labelled_group(device: str) -> Iterator[Contender]:
    """Five cut-outs of 200^2 onto 512^2, with the labels."""
    fg, _, inside = pictures((200, 200))
    background = torch.tensor(photo("coffee", (512, 512)), device=device)[None]
    objects = ops.pack_objects(
        [torch.tensor(fg, device=device)] * 5, [torch.tensor(inside, device=device)] * 5, channels_last=True
    )
    where = torch.tensor([[10, 20], [300, 40], [150, 150], [40, 300], [290, 290]])
    for mode in ("none", "gaussian"):

        def run(mode: str = mode) -> Any:
            return ops.composite(background, objects, position=where, mode=mode, channels_last=True, labels=True)

        yield Contender(f"ours, five objects and labels, {mode}", run)


# --- filters ----------------------------------------------------------------------------------------------------------


def filter_group(size: Size, device: str) -> Iterator[Contender | Missing]:
    """Motion blur of 9 taps, and a blend of five bands."""
    fg, bg, inside = pictures(size)
    image = torch.tensor(bg, device=device)

    def blur() -> Tensor:
        return ops.motion_blur(image, 9, 45, border=255, channels_last=True)

    back, front = (torch.tensor(picture, device=device).permute(2, 0, 1).contiguous() for picture in (bg, fg))
    white = torch.tensor(inside, device=device)
    yield Contender(f"ours, motion, {name_of(size)}", blur)
    yield Contender(f"ours, five bands, {name_of(size)}", lambda: ops.multiband_blend(back, front, white, levels=5))
    if device == "cpu":
        yield opencv_motion(size)
        yield opencv_bands(size)


@needs("cv2")
def opencv_motion(size: Size) -> Contender:
    import cv2

    bg = pictures(size)[1]
    kernel = ops.motion_kernel(9, 45).numpy()

    def run() -> Any:
        cv2.setNumThreads(torch.get_num_threads())
        return cv2.filter2D(bg, -1, kernel)

    return Contender(f"cv2.filter2D, {name_of(size)}", run, against=f"ours, motion, {name_of(size)}")


@needs("cv2")
def opencv_bands(size: Size) -> Contender:
    import cv2

    fg, bg, inside = pictures(size)
    front, back = fg.astype(np.int16), bg.astype(np.int16)
    white = inside.astype(np.uint8) * 255

    def run() -> Any:
        cv2.setNumThreads(torch.get_num_threads())
        blender = cv2.detail.MultiBandBlender(0, 5)
        blender.prepare((0, 0, size[1], size[0]))
        blender.feed(front, white, (0, 0))
        blender.feed(back, 255 - white, (0, 0))
        return blender.blend(None, None)[0]

    return Contender(f"cv2.detail.MultiBandBlender, {name_of(size)}", run, against=f"ours, five bands, {name_of(size)}")


# --- the groups -------------------------------------------------------------------------------------------------------


def poisson_gates(size: Size) -> list[Gate]:
    n = name_of(size)
    ours, mixed = f"ours, import, {n}", f"ours, mixed, {n}"
    sweeps = f"fpie, its default {FPIE_SWEEPS} sweeps without the set-up, import, {n}"
    made = [
        Gate(f"Poisson {n}, against OpenCV", f"OpenCV seamlessClone, import, {n}", ours, (10, 10)),
        Gate(f"Poisson {n}, against pyamg", f"SciPy and pyamg, import, {n}", ours, (60, 60)),
        Gate(f"Poisson {n}, mixed, in imports", mixed, ours, (1.6, 1.6), at_most=True),
    ]
    return [*made, Gate(f"Poisson {n}, against fpie", sweeps, ours, (300, 300))]


def alpha_gates(size: Size) -> list[Gate]:
    n = name_of(size)
    return [
        Gate(f"alpha {n}, against Pillow", f"Pillow paste, {n}", f"ours, none, {n}", (5, 5)),
        Gate(f"alpha {n}, against cv2.blendLinear", f"cv2.blendLinear, {n}", f"ours, none, {n}", (6, 6)),
    ]


def feather_gates(size: Size) -> list[Gate]:
    n = name_of(size)
    tops = tuple(f"{peer}, {n}" for peer in FEATHERS)
    return [Gate(f"Gaussian feather {n}, against the fastest", tops, f"ours, gaussian, {n}", (4, 4))]


def groups(device: str, quick: bool) -> list[Group]:
    sizes = ((64, 64),) if quick else SIZES
    squares = SQUARES[:2] if quick else SQUARES
    size = sizes[0]
    small, large = (f"ours, {n}^2, a megapixel" for n in (squares[min(2, len(squares) - 1)], squares[-1]))
    made = [
        Group(f"poisson {name_of(s)}", f"Poisson blend, {name_of(s)}, uint8 RGB, mask `cat`",
              lambda s=s: poisson_group(s, device), poisson_gates(s))
        for s in sizes
    ]  # fmt: skip
    made += [
        Group(
            "poisson batch",
            f"Poisson blends, 16 images of {name_of(size)} at once",
            lambda: batch_group(device, size, 16),
            [Gate("Poisson 16 x 256^2, images a second", "ours, 16 x cat, an image", None, (None, 1e3 / 0.6))],
        ),
        Group(
            "poisson backward",
            f"Poisson blend and its adjoint, float32, {name_of(sizes[-1])}",
            lambda: adjoint_group(device, sizes[-1]),
            [
                Gate(f"forward and backward, {g}, in forwards", f"forward and backward, {g}", f"forward, {g}",
                     (2.2, 2.2), at_most=True)
                for g in ("import", "mixed")
            ],
        ),
        Group(
            "poisson sizes",
            f"Poisson blend, {squares[0]}^2 to {squares[-1]}^2, time of a megapixel",
            lambda: squares_group(device, squares),
            [Gate(f"a megapixel of {squares[-1]}^2, in those of 256^2", large, small, (1.5, 1.5), at_most=True)],
        ),
    ]  # fmt: skip
    for s in sizes:
        n = name_of(s)
        made += [
            Group(f"alpha {n}", f"Alpha composite, {n}, uint8 RGB",
                  lambda s=s: composite_group(s, device, "none"), alpha_gates(s)),
            Group(f"feather {n}", f"Gaussian feather of 5 x 5, {n}, uint8 RGB",
                  lambda s=s: composite_group(s, device, "gaussian"), feather_gates(s)),
            Group(f"filters {n}", f"Motion blur of 9 taps and a blend of five bands, {n}, uint8 RGB",
                  lambda s=s: filter_group(s, device)),
        ]  # fmt: skip
    made += [
        Group("feather backward", f"Gaussian feather, float32, {name_of(size)}, forward and backward",
              lambda: feather_backward_group(size, device),
              [Gate("feather forward + backward, against kornia", "kornia", "ours", (15, 15))]),
        Group("labelled", "Five cut-outs of 200^2 on 512^2, uint8 RGB, with ids and areas",
              lambda: labelled_group(device),
              [Gate("five objects and labels a second", "ours, five objects and labels, none", None, (2000, 2000))]),
    ]  # fmt: skip
    return [replace(group, family="blend", turn_ms=TURN) for group in made]
