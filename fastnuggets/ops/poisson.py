"""Poisson blending: an object's differences inside its mask, the background's values at its border, solved exactly; and
the random walker, another system on the pixels of an image."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from fastnuggets.ops.blend import Objects, objects_for
from fastnuggets.ops.choices import number_of

# The order of these is that of the enum in csrc/blend/poisson.h.
GUIDANCES = ("import", "mixed", "average")
DOMAINS = ("mask", "rectangle")

_OPS = torch.ops.fastnuggets


def poisson_blend(
    background: Tensor,  # [B, C, H, W] | [C, H, W], channels last if channels_last
    objects: Objects | Sequence[Tensor] | Tensor,  # | [N, C, h, w]
    masks: Sequence[Tensor] | Tensor | None = None,  # | [N, h, w]
    *,
    ptr: Tensor | Sequence[int] | None = None,  # [B + 1] int64
    position: Tensor | Sequence[Sequence[int]] | None = None,  # [N, 2] int64
    guidance: str = "import",
    domain: str = "mask",
    soft: bool = False,
    tolerance: float = 0.25,
    max_cycles: int = 30,
    channels_last: bool = False,
    check: bool = True,
) -> Tensor:
    """Blends objects into backgrounds without a seam: Poisson image editing, solved to a stated error.

    The unknowns are the object's pixels inside the image whose mask is at least a half (128 of 255). With f the result,
    N_p the neighbours of p inside the image (at most four), f = background outside the mask, and v the guidance:
    ``sum over q of N_p (f_p - f_q) = sum over q of N_p v_pq`` for every unknown p. So the mask may have holes and
    several parts, and where the image's border cuts it the condition is the natural one. Beyond its rectangle an object
    goes on as its nearest pixel. If the mask covers the whole image, no value is given anywhere: then the mean of each
    channel is the object's, for every guidance.

    Args:
        background: images [B, C, H, W], or one [C, H, W]; uint8 (0 to 255), or floating (0 to 1; not clipped):
            float32, float64, or half types, which are computed with in float32 and rounded. It is not written to.
        objects, masks: as in :func:`composite`: an :class:`Objects`, or images and masks.
        ptr: objects ``ptr[b]..ptr[b+1]-1`` lie on image b. They are blended in their order, each into the result of
            those before. None: all on the one image there is, or, where N is B, one on each.
        position: whole rows and columns (y, x) of the image where the object's first pixel lies; None: 0, 0. Objects
            may lie partly or wholly outside.
        guidance: v_pq of an edge, per channel. ``"import"``: the object's difference. ``"mixed"``: the background's
            if it is larger in size, else the object's (ties, to a thousandth of a grey level, are the object's).
            ``"average"``: the mean of both.
        domain: ``"mask"``; or ``"rectangle"``: the unknowns are the mask's whole bounding rectangle but its outermost
            pixels, as in OpenCV's ``seamlessClone``, whose picture it gives to within one grey level: see
            :func:`_rectangle`.
        soft: the unknowns are all pixels whose mask is above 0, and an edge's guidance is w v + (1 - w) (the
            background's difference), w the mean of the mask at its two ends (so 1/2 at the border of a mask of ones);
            differentiable in the mask.
        tolerance: largest error allowed, in grey levels (1/255 of full scale), as the solver estimates it from its last
            correction; the true error has been found smaller. Rounding to uint8 comes on top.
        max_cycles: multigrid cycles after which to give up.
        channels_last: background and objects are [B, H, W, C] and [h, w, C].
        check: raise if the tolerance was not reached. This looks at the result and so synchronises a GPU.

    Returns:
        The image, like ``background``. Pixels outside the masks have the background's bits. uint8 is rounded to
        nearest.

    Raises:
        ValueError, TypeError: naming the argument, what it must be and what it was.
        RuntimeError: with ``check``, an object's error is above the tolerance after ``max_cycles``, or a value that it
            depends on is not finite.

    Differentiable in background and objects, and masks if ``soft``, once: by one more solution of the same system, to a
    relative error of tolerance / 255. A second derivative is an error, as is, on the CPU, a backward pass that does not
    converge. Deterministic: the same bits for any number of threads. Does not synchronise, and can be captured in a
    CUDA graph, without ``check`` and with ``ptr`` on the host; ``domain="rectangle"`` synchronises.

    P. Perez, M. Gangnet, A. Blake, Poisson Image Editing, SIGGRAPH 2003.
    """
    packed = objects_for(background, objects, masks, channels_last)
    number_of("domain", domain, DOMAINS)
    kind = number_of("guidance", guidance, GUIDANCES)
    images = background if background.dim() == 4 else background[None]
    dtype = images.dtype
    if dtype in (torch.float16, torch.bfloat16):
        images = images.float()
        packed = packed._replace(pixels=packed.pixels.float(), mask=packed.mask.float())
    count = packed.sizes.size(0)
    place = _place(position, packed)
    rounds = _rounds(ptr, count, images.size(0))
    if domain == "rectangle":
        if soft:
            raise ValueError("soft must be False with domain 'rectangle', got True")
        images = _rectangles(images, packed, place, rounds, guidance)
        return images.to(dtype).reshape(background.shape)
    images = images if rounds else images.clone()
    for numbers, owners in rounds:
        table = _table(packed, place, numbers, owners)
        images, info = _OPS.poisson_blend(
            images, packed.pixels, packed.mask, table, *packed.largest, kind, soft, tolerance, max_cycles, channels_last
        )
        if check:
            _raise_unless_solved(info, numbers, tolerance, max_cycles)
    return images.to(dtype).reshape(background.shape)


def _place(position: Tensor | Sequence[Sequence[int]] | None, objects: Objects) -> Tensor:
    """[N, 2] int64 on the objects' device."""
    sizes = objects.sizes
    if position is None:
        return sizes.new_zeros((sizes.size(0), 2))
    place = torch.as_tensor(position, device=sizes.device)
    place = place.reshape(-1, 2) if place.numel() == 0 else place
    if place.shape != (sizes.size(0), 2):
        raise ValueError(f"position must be [N = {sizes.size(0)}, 2], got {tuple(place.shape)}")
    if place.numel() and (place.is_floating_point() or place.dtype == torch.bool):
        raise TypeError(f"position must be whole numbers of pixels, got {place.dtype}")
    return place.long()


Round = tuple[tuple[int, ...], tuple[int, ...]]  # objects, and the image of each; no image twice


def _rounds(ptr: Tensor | Sequence[int] | None, count: int, images: int) -> Sequence[Round]:
    if ptr is None:
        if count == images:
            ends = tuple(range(images + 1))
        elif images == 1:
            ends = (0, count)
        else:
            raise ValueError(f"ptr must be given for {count} objects on {images} images, got None")
    else:
        ends = tuple(ptr.tolist() if isinstance(ptr, Tensor) else ptr)
        if len(ends) != images + 1 or ends[0] != 0 or ends[-1] != count or list(ends) != sorted(ends):
            raise ValueError(f"ptr must be [B + 1 = {images + 1}] and ascend from 0 to N = {count}, got {list(ends)}")
    return _rounds_of(ends)


@lru_cache(maxsize=256)
def _rounds_of(ends: tuple[int, ...]) -> Sequence[Round]:
    most = max((b - a for a, b in itertools.pairwise(ends)), default=0)
    rounds = []
    for k in range(most):
        owners = tuple(b for b in range(len(ends) - 1) if ends[b] + k < ends[b + 1])
        rounds.append((tuple(ends[b] + k for b in owners), owners))
    return rounds


def _table(objects: Objects, place: Tensor, numbers: tuple[int, ...], owners: tuple[int, ...]) -> Tensor:
    """Rows (image, y, x, h, w, first pixel) of the round's objects."""
    sizes = objects.sizes
    image = torch.tensor(owners).to(sizes.device)
    if len(numbers) != sizes.size(0):
        chosen = torch.tensor(numbers).to(sizes.device)
        place, sizes = place[chosen], sizes[chosen]
    return torch.cat([image[:, None], place, sizes[:, 1:], sizes[:, :1]], 1)


def _raise_unless_solved(info: Tensor, numbers: tuple[int, ...], tolerance: float, max_cycles: int) -> None:
    if bool((info <= tolerance).all()):
        return
    errors = info.tolist()
    n = next(n for n, error in enumerate(errors) if not error <= tolerance)
    if errors[n] != errors[n]:
        raise RuntimeError(f"object {numbers[n]} was not blended: it or the background beneath has values not finite")
    raise RuntimeError(
        f"object {numbers[n]} did not converge: estimated error {errors[n]:.3g} grey levels after {max_cycles} cycles, "
        f"tolerance {tolerance:.3g}"
    )


# ---- the rectangle


def _rectangles(
    images: Tensor, objects: Objects, place: Tensor, rounds: Sequence[Round], guidance: str
) -> Tensor:  # [B, C, H, W] or channels last
    """Each object in its turn by :func:`_rectangle`, out of place, so that autograd goes through."""
    if guidance == "average":
        raise ValueError("guidance must be 'import' or 'mixed' with domain 'rectangle', got 'average'")
    last = objects.channels_last
    whole = images.dtype == torch.uint8
    planes = (images.movedim(-1, 1) if last else images).to(torch.float32 if whole else images.dtype)
    results = list(planes)
    sizes, places = objects.sizes.tolist(), place.tolist()
    for numbers, owners in rounds:
        for n, b in zip(numbers, owners, strict=True):
            (first, h, w), (y, x) = sizes[n], places[n]
            pixels = objects.pixels[first * objects.channels : (first + h * w) * objects.channels]
            fg = pixels.view(h, w, -1).movedim(-1, 0) if last else pixels.view(-1, h, w)
            mask = objects.mask[first : first + h * w].view(h, w) >= (128 if whole else 0.5)
            height, width = results[b].shape[1:]
            rows, columns = (mask.any(axis).nonzero().flatten().tolist() for axis in (1, 0))
            if not rows:
                continue
            top, bottom = max(y + rows[0], 0), min(y + rows[-1] + 1, height)
            left, right = max(x + columns[0], 0), min(x + columns[-1] + 1, width)
            if bottom - top < 3 or right - left < 3:
                continue
            down, across = slice(top - y, bottom - y), slice(left - x, right - x)
            patch = _rectangle(
                results[b][:, top:bottom, left:right],
                fg[:, down, across].to(planes.dtype),
                mask[down, across],
                guidance,
            )
            if whole:
                patch = patch.clamp(0, 255).round()
            around = (left, width - right, top, height - bottom)
            keep = F.pad(torch.ones_like(patch[0]), around) == 0
            results[b] = torch.where(keep, results[b], F.pad(patch, around))
    found = torch.stack(results).to(images.dtype) if results else images.clone()
    return found.movedim(1, -1).contiguous() if last else found


def _rectangle(background: Tensor, fg: Tensor, mask: Tensor, guidance: str) -> Tensor:  # [C, h, w]
    """What OpenCV's seamlessClone solves (NORMAL_CLONE, MIXED_CLONE), rounded where it truncates.

    The unknowns are the rectangle without its outermost pixels, which keep the background. The guidance is the forward
    differences of the object where the mask, eroded by three pixels, is set, else the background's; mixed compares the
    sizes of (difference in x - difference in y).
    """
    h, w = background.shape[1:]
    near = F.pad((~mask)[None, None].to(background.dtype), (3, 3, 3, 3), value=1.0)
    inside = F.max_pool2d(near, 7, stride=1)[0] == 0
    bg_y, bg_x = _forward(background, 1), _forward(background, 2)
    fg_y, fg_x = _forward(fg, 1), _forward(fg, 2)
    if guidance == "mixed":
        inside = inside & ((fg_x - fg_y).abs() > (bg_x - bg_y).abs())
    v_y, v_x = torch.where(inside, fg_y, bg_y), torch.where(inside, fg_x, bg_x)
    divergence = (v_y[:, 1:-1, 1:-1] - v_y[:, :-2, 1:-1]) + (v_x[:, 1:-1, 1:-1] - v_x[:, 1:-1, :-2])
    border = background * F.pad(background.new_zeros(h - 2, w - 2), (1, 1, 1, 1), value=1.0)
    shared = border[:, :-2, 1:-1] + border[:, 2:, 1:-1] + border[:, 1:-1, :-2] + border[:, 1:-1, 2:]
    solved = _solve_by_sines(divergence - shared)
    return border + F.pad(solved, (1, 1, 1, 1))


def _forward(x: Tensor, dim: int) -> Tensor:
    """Difference to the next pixel; of the last one, which OpenCV mirrors and nothing reads, 0."""
    return torch.cat([x.diff(dim=dim), torch.zeros_like(x.narrow(dim, 0, 1))], dim)


def _solve_by_sines(right_side: Tensor) -> Tensor:  # [C, h, w]
    """u of Laplacian u = right_side with zeros around: a sine transform of type 1 on both axes, and back."""
    h, w = right_side.shape[-2:]
    spectrum = _sines(_sines(right_side, -1), -2)

    def eigenvalue(n: int) -> Tensor:
        k = torch.arange(1, n + 1, dtype=right_side.dtype, device=right_side.device)
        return 2 * torch.cos(k * (torch.pi / (n + 1))) - 2

    spectrum = spectrum / (eigenvalue(h)[:, None] + eigenvalue(w))
    return _sines(_sines(spectrum, -1), -2) * (4 / ((h + 1) * (w + 1)))


def _sines(x: Tensor, dim: int) -> Tensor:
    """sum over j of x_j sin(pi j k / (n + 1)), j and k from 1 to n."""
    n = x.size(dim)
    pad = x.narrow(dim, 0, 1) * 0
    odd = torch.cat([pad, x, pad, -x.flip(dim)], dim)
    spectrum: Tensor = torch.fft.rfft(odd, dim=dim).imag.narrow(dim, 1, n)
    return -0.5 * spectrum


# ---- the random walker


def random_walker_segment(
    image: Tensor,  # [C, H, W] | [H, W]
    seeds: Tensor,  # [H, W] integers
    *,
    beta: float = 300.0,
    tolerance: float = 1e-4,
    max_steps: int = 300,
    return_probabilities: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Segments an image from scribbles: each pixel gets the label whose seed a random walker from it reaches first.

    A walker steps to a neighbour with a probability in proportion to the weight exp(-beta |difference|^2) + 1e-6,
    |difference|^2 summed over the channels of values 0 to 1. The probabilities solve a linear system with the seeds for
    its border, the same for all labels: conjugate gradients with a multigrid cycle for the preconditioner.

    Args:
        image: uint8 (0 to 255) or floating (0 to 1), of any number of channels.
        seeds: 0 where the label is to be found, else a label from 1 to K, the largest there is.
        beta: how much a difference keeps walkers from crossing it. (scikit-image's is this one times 10 times the
            image's standard deviation times the root of the number of channels.)
        tolerance: largest error allowed of a probability, as the solver estimates it.
        max_steps: of conjugate gradients, after which to give up.
        return_probabilities: give these too.

    Returns:
        Labels [H, W] int64; of equal probabilities the smallest. With ``return_probabilities`` also these, [K, H, W],
        float64 for a float64 image, else float32.

    Raises:
        ValueError, TypeError: naming the argument, what it must be and what it was; no pixel is a seed.
        RuntimeError: the tolerance was not reached, or the image has values that are not finite.

    Not differentiable. Deterministic: the same bits for any number of threads. Solved in float64 on the CPU; a CUDA
    image is copied there and the result back, so this synchronises and no CUDA graph can hold it.

    L. Grady, Random Walks for Image Segmentation, IEEE TPAMI 28(11), 2006.
    """
    if image.dim() not in (2, 3) or seeds.shape != image.shape[-2:]:
        raise ValueError(f"seeds must be [H, W] like image, got {tuple(seeds.shape)} and {tuple(image.shape)}")
    if seeds.is_floating_point() or seeds.is_complex() or seeds.dtype == torch.bool:
        raise TypeError(f"seeds must be integers, got {seeds.dtype}")
    if image.dtype != torch.uint8 and not image.is_floating_point():
        raise TypeError(f"image must be uint8 or floating, got {image.dtype}")
    if not beta >= 0:
        raise ValueError(f"beta must not be negative, got {beta}")
    if seeds.numel() == 0 or int(seeds.max()) < 1:
        raise ValueError("seeds must mark at least one pixel with a label from 1")
    with torch.no_grad():
        values = image.reshape(-1, *seeds.shape).to("cpu", torch.float64)
        values = values / 255 if image.dtype == torch.uint8 else values
        east, south = (_edge_weights(values, dim, beta) for dim in (2, 1))
        marks = seeds.to("cpu", torch.int64)
        found, error = _OPS.random_walker(east, south, marks, int(marks.max()), tolerance, max_steps)
        if not bool(error <= tolerance):
            reason = (
                "the image has values not finite" if bool(error != error) else f"estimated error {error.item():.3g}"
            )
            raise RuntimeError(f"the random walker did not converge in {max_steps} steps: {reason}")
        labels: Tensor = found.argmax(0).add_(1).to(image.device)
    if not return_probabilities:
        return labels
    return labels, found.to(image.device, torch.float64 if image.dtype == torch.float64 else torch.float32)


def _edge_weights(values: Tensor, dim: int, beta: float) -> Tensor:
    """[H, W] of the edges to the next pixel; of the last, which nothing reads, 1e-6."""
    squared = values.diff(dim=dim).square().sum(0)
    weights = torch.exp(-beta * squared) + 1e-6
    return torch.cat([weights, torch.full_like(values[0].narrow(dim - 1, 0, 1), 1e-6)], dim - 1)


@torch.library.register_fake("fastnuggets::poisson_blend")
def _(background, pixels, mask, table, *rule):  # type: ignore[no-untyped-def]
    return background.new_empty(background.shape), background.new_empty(table.size(0), dtype=torch.float32)


@torch.library.register_fake("fastnuggets::poisson_blend_backward")
def _(grad, background, pixels, mask, *rule):  # type: ignore[no-untyped-def]
    given = (background, pixels, mask)
    return tuple(t.new_empty(t.shape if w else (0,)) for t, w in zip(given, rule[-1], strict=True))


@torch.library.register_fake("fastnuggets::random_walker")
def _(east, south, seeds, labels, tolerance, max_steps):  # type: ignore[no-untyped-def]
    return east.new_empty((labels, *seeds.shape)), east.new_empty(1)
