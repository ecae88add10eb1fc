"""Objects pasted into batches while a network trains, with what is still seen of each afterwards."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastnuggets import ops


class Pasted(NamedTuple):
    """What `RandomPaste` returns."""

    images: Tensor  # like the input
    ids: Tensor  # [B, H, W] int32: which of the M pasted objects is seen, -1 for none
    objects: Tensor  # [M] int64: number of each pasted object in the pool
    ptr: list[int]  # [B + 1]: ptr[b] .. ptr[b + 1] were pasted into image b
    masks: list[Tensor] | None  # the masks that were given, without what is covered now


class RandomPaste(torch.nn.Module):
    """Pastes random objects of a pool into each image: by `fastnuggets.ops.composite`, on the images' device.

    Args:
        objects: a pool made by `fastnuggets.ops.pack_objects`, channels first, of the type and the number of channels
            of the images. Its tensors become buffers, which no state_dict holds.
        count: least and most objects for an image.
        scale: least and largest factor of an object's size. Below 1/2 pixels are skipped, not averaged.
        angle: an object is turned by up to so many degrees.
        flip: probability that it is mirrored.
        truncation: part of an object's height and of its width that may lie outside.
        mode, size, sigma, edge: as in `fastnuggets.ops.composite`.

    ``forward(images, masks=None)``: images [B, C, H, W] and, for each, masks [n, H, W] of the instances in it, bool or
    any number with 0 for outside; returns `Pasted`. In eval mode nothing is pasted. The category of each pixel is
    ``categories[pasted.objects[pasted.ids]]`` where ``ids >= 0``.

    Drawn from torch's generators, how many from the CPU's and the rest from that of the images' device. Differentiable
    in the images, and in the pool if it is. Nothing synchronises; a CUDA graph repeats the numbers of objects that it
    was captured with, so give it equal ones.
    """

    pixels: Tensor
    mask: Tensor
    sizes: Tensor

    def __init__(
        self,
        objects: ops.Objects,
        *,
        count: tuple[int, int] = (1, 5),
        scale: tuple[float, float] = (0.5, 1.5),
        angle: float = 30.0,
        flip: float = 0.5,
        truncation: float = 0.25,
        mode: str = "gaussian",
        size: int = 5,
        sigma: float = 2.0,
        edge: str = "zero",
    ) -> None:
        super().__init__()
        if objects.channels_last or not len(objects.sizes):
            raise ValueError("objects must be at least one, packed with channels first")
        if not 0 <= count[0] <= count[1]:
            raise ValueError(f"count must be two rising numbers from 0, got {count}")
        if not 0 < scale[0] <= scale[1] < math.inf:
            raise ValueError(f"scale must be two rising numbers above 0, got {scale}")
        if not (0 <= flip <= 1 and 0 <= truncation <= 1):
            raise ValueError(f"flip and truncation must be in [0, 1], got {flip} and {truncation}")
        for name in ("pixels", "mask", "sizes"):
            self.register_buffer(name, getattr(objects, name), persistent=False)
        self.largest, self.channels = objects.largest, objects.channels
        self.count, self.scale, self.angle, self.flip, self.truncation = count, scale, angle, flip, truncation
        self.options: dict[str, Any] = {"mode": mode, "size": size, "sigma": sigma, "edge": edge}

    def forward(self, images: Tensor, masks: Sequence[Tensor] | None = None) -> Pasted:
        batch, _, height, width = images.shape
        low, high = self.count
        counts = torch.randint(low, high + 1, (batch,)).tolist() if self.training else [0] * batch
        ptr = [0]
        for count in counts:
            ptr.append(ptr[-1] + count)
        total, device = ptr[-1], images.device
        picked = torch.randint(len(self.sizes), (total,), device=device)
        if total == 0:
            none = torch.full((batch, height, width), -1, dtype=torch.int32, device=device)
            return Pasted(images, none, picked, ptr, None if masks is None else list(masks))
        pool = ops.Objects(self.pixels, self.mask, self.sizes[picked], self.largest, self.channels, False)
        # Placement is float32 whatever the images are: float16 has no half pixels beyond 1024.
        unit = torch.rand(5, total, device=device)
        scale = self.scale[0] + (self.scale[1] - self.scale[0]) * unit[0]
        sides = pool.sizes[:, 1:].to(unit.dtype)
        room = sides * scale[:, None] * (0.5 - self.truncation)  # from the image's edge to the object's centre
        extent = torch.tensor([height, width], dtype=unit.dtype).to(device, non_blocking=True)
        centre = room + (extent - 2 * room) * unit[1:3].T
        made = ops.composite(
            images,
            pool,
            ptr=ptr,
            position=centre - sides / 2,
            scale=scale,
            angle=self.angle * (2 * unit[3] - 1),
            flip=unit[4] < self.flip,
            labels=True,
            **self.options,
        )
        assert isinstance(made, ops.Composite)  # as labels are asked for
        seen = None if masks is None else [mask * (made.ids[b] < 0) for b, mask in enumerate(masks)]
        return Pasted(made.image, made.ids, picked, ptr, seen)

    def extra_repr(self) -> str:
        options = ", ".join(f"{name}={value!r}" for name, value in self.options.items())
        return f"{len(self.sizes)} objects, count={self.count}, scale={self.scale}, angle={self.angle}, {options}"


class Copied(NamedTuple):
    """What `CopyPaste` returns."""

    images: Tensor  # like the input
    ids: Tensor  # like the input: instance i of the partner is max_instances + i
    partner: Tensor  # [B] int64: which image each one's pasted instances come from


class CopyPaste(torch.nn.Module):
    """Pastes random instances of another image of the batch into each image, at their places.

    Args:
        p: probability that an instance is taken.
        flip: probability that they are mirrored, all of an image together.
        mode, size, sigma: of the blend, as in `fastnuggets.ops.composite`.
        max_instances: more than any instance number in ``ids``.

    ``forward(images, ids)``: images [B, C, H, W]; ids [B, H, W] of an integer type, the number of the instance that is
    seen and -1 for none. Returns `Copied`. In eval mode, and with one image, nothing is pasted. An instance of which
    nothing is left in ``ids`` is covered.

    Drawn from torch's generators. Differentiable in the images. Nothing synchronises.
    G. Ghiasi et al., Simple Copy-Paste is a Strong Data Augmentation Method for Instance Segmentation, CVPR 2021,
    arXiv:2012.07177, without its random scale, which belongs before.
    """

    def __init__(
        self,
        p: float = 0.5,
        *,
        flip: float = 0.5,
        mode: str = "gaussian",
        size: int = 5,
        sigma: float = 2.0,
        max_instances: int = 256,
    ) -> None:
        super().__init__()
        if not (0 <= p <= 1 and 0 <= flip <= 1):
            raise ValueError(f"p and flip must be in [0, 1], got {p} and {flip}")
        self.p, self.flip, self.max_instances = p, flip, max_instances
        self.options: dict[str, Any] = {"mode": mode, "size": size, "sigma": sigma}

    def forward(self, images: Tensor, ids: Tensor) -> Copied:
        batch, device = len(images), images.device
        if ids.shape != (batch, *images.shape[2:]) or ids.is_floating_point() or ids.is_complex():
            raise ValueError(
                f"ids must be integers of shape {[batch, *images.shape[2:]]}, got {list(ids.shape)} {ids.dtype}"
            )
        itself = torch.arange(batch, device=device)
        if not self.training or batch < 2:
            return Copied(images, ids, itself)
        partner = (itself + int(torch.randint(1, batch, ()))) % batch
        source, theirs = images[partner], ids[partner]
        mirrored = (torch.rand(batch, device=device) < self.flip).view(-1, 1, 1)
        source = torch.where(mirrored[:, None], source.flip(-1), source)
        theirs = torch.where(mirrored, theirs.flip(-1), theirs)
        taken = torch.rand(batch, self.max_instances, device=device) < self.p
        chosen = taken.gather(1, theirs.clamp(min=0).flatten(1).long()).view_as(theirs) & (theirs >= 0)
        mask = chosen.to(images.dtype) * (255 if images.dtype == torch.uint8 else 1)
        pasted = ops.composite(images, source, mask, position=itself.new_zeros(batch, 2), **self.options)
        assert isinstance(pasted, Tensor)
        return Copied(pasted, torch.where(chosen, theirs + self.max_instances, ids), partner)

    def extra_repr(self) -> str:
        return f"p={self.p}, flip={self.flip}, mode={self.options['mode']!r}"
