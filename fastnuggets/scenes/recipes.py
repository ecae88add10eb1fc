"""How scenes are made: all the settings of a `SceneComposer`, and presets of them."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

ALL_BLENDS = ("gaussian", "poisson", "none", "box", "motion")  # "all blend" of Dwibedi 2017
BLENDS = (*ALL_BLENDS, "mixed")


@dataclass(frozen=True)
class Recipe:
    """What is drawn for each scene, and from what range; ranges are inclusive. ValueError for what makes no sense."""

    size: tuple[int, int] = (480, 640)  # height, width of the images
    objects: tuple[int, int] = (3, 8)
    distractors: tuple[int, int] = (0, 0)  # pasted after the objects and not labelled
    balance: bool = False  # draw the category first, then one of its cut-outs
    blend: tuple[str, ...] = ("gaussian",)  # one of them is drawn for each scene
    same_scene: bool = False  # each scene in every one of them, with the same places
    level: str = "object"  # or "box": the whole box of the cut-out is pasted
    scale: tuple[float, float] = (0.15, 0.6)
    scale_of: str = "cutout"  # times the cut-out's size; "canvas": its longer side over the image's shorter one
    angle: tuple[float, float] = (-30.0, 30.0)  # degrees, counter-clockwise
    flip: float = 0.0  # probability of being mirrored left to right
    brightness: float = 0.0  # factor of 1 - b .. 1 + b
    contrast: float = 0.0  # the same, about mid-grey
    colour: float = 0.0  # the same, for each of R, G and B
    max_truncation: float = 0.25  # part of an object that may lie outside the image
    max_overlap: float | None = None  # of the boxes of two objects; None: they are not compared
    overlap: str = "iou"  # intersection over union; "earlier": over the box pasted earlier
    min_visibility: float = 0.0  # of each object's pixels, after all objects and distractors
    tries: int = 20  # places tried for an object, which is left out when they run out
    feather: tuple[int, float] = (5, 2.0)  # taps and sigma of "gaussian"
    fit: str = "crop"  # of the background: keeps its shape, at a random place; "stretch": all of it, distorted
    soft: bool = True  # keep soft masks; False: cut at one half
    boxes: str = "visible"  # what COCO's bbox holds; "amodal": the whole object inside the image
    keep_hidden: bool = False  # annotate objects too of which nothing is visible
    compatible: bool = False  # of preset dwibedi2017: see there

    def __post_init__(self) -> None:
        for name, allowed in _CHOICES.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}")
        for name, (low, high) in _RANGES.items():
            first, last = getattr(self, name)
            if not low <= first <= last <= high:
                raise ValueError(f"{name} must be two rising numbers from {low} to {high}, got {(first, last)}")
        for name in ("flip", "brightness", "contrast", "colour", "max_truncation", "min_visibility"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be in [0, 1], got {getattr(self, name)}")
        unknown = [blend for blend in self.blend if blend not in BLENDS]
        if unknown or not self.blend or len(set(self.blend)) < len(self.blend):
            raise ValueError(f"blend must be some of {', '.join(BLENDS)}, each once, got {self.blend}")
        if min(self.size) < 16 or max(self.size) > 1 << 15:
            raise ValueError(f"size must be a height and a width of 16 to 32768, got {self.size}")
        if self.tries < 1:
            raise ValueError(f"tries must be at least 1, got {self.tries}")
        if self.max_overlap is not None and not 0 <= self.max_overlap <= 1:
            raise ValueError(f"max_overlap must be in [0, 1], got {self.max_overlap}")
        if self.scale[0] <= 0:
            raise ValueError(f"scale must be above 0, got {self.scale}")

    def but(self, **changes: Any) -> Recipe:
        """The same with other settings."""
        return dataclasses.replace(self, **changes)


_CHOICES = {
    "level": ("object", "box"),
    "scale_of": ("cutout", "canvas"),
    "overlap": ("iou", "earlier"),
    "fit": ("crop", "stretch"),
    "boxes": ("visible", "amodal"),
}
_RANGES = {"objects": (0, 10000), "distractors": (0, 10000), "scale": (0, 1000), "angle": (-360, 360)}

_DWIBEDI = Recipe(blend=ALL_BLENDS, same_scene=True, overlap="earlier", soft=False, fit="stretch")
PRESETS = {
    # For cut-outs and backgrounds of any size: nothing here comes from a paper.
    "default": Recipe(
        blend=("gaussian", "poisson", "none"),
        scale=(0.2, 0.7),
        scale_of="canvas",
        flip=0.5,
        brightness=0.2,
        contrast=0.1,
        colour=0.05,
        min_visibility=0.3,
    ),
    "dwibedi2017": _DWIBEDI.but(overlap="iou"),
    "dwibedi2017-compatible": _DWIBEDI.but(boxes="amodal", keep_hidden=True, compatible=True),
    "simple_copy_paste": Recipe(
        blend=("gaussian",), objects=(1, 10), scale=(0.1, 2.0), angle=(0.0, 0.0), flip=0.5, max_truncation=0.5
    ),
    "georgakis2017": Recipe(blend=("poisson",), scale=(1.0, 1.0), angle=(0.0, 0.0), soft=False, fit="stretch"),
}


def preset(name: str, **changes: Any) -> Recipe:
    """A `Recipe` by name, with some settings changed.

    - ``default``: random blends, size relative to the image, jitter of the colours.
    - ``dwibedi2017``: D. Dwibedi, I. Misra, M. Hebert, Cut, Paste and Learn: Surprisingly Easy Synthesis for Instance
      Detection, ICCV 2017, arXiv:1708.01642, by the settings of the released code: 640 x 480, 3 to 8 objects at 0.15 to
      0.6 of their size, turned by up to 30 degrees, up to a quarter outside the image, each scene under the five
      blends. Objects are resampled smoothly, and labels and limits are those of the masks. Its occlusion check is off
      by default: ``max_overlap=0.75`` turns it on.
    - ``dwibedi2017-compatible``: as that code draws pixels and counts. The crop loses its last row and column; Lanczos
      for the size and nearest neighbour for the turn; whole degrees; the mask is blurred inside the object's box;
      Poisson leaves the border of that box alone; motion blur fills with white from outside and truncates; an object
      may lie a quarter outside in height and in width; what the code calls IoU is the part of the earlier box that is
      covered; an object whose tries run out stays where it was drawn last, and the scene is drawn again if that was the
      last object; the box in the labels is amodal. Poisson rounds where the code truncates. The random numbers are
      other ones.
    - ``simple_copy_paste``: random scale and mirroring, a Gaussian edge, and no limit of overlap; fully covered objects
      are dropped, those of the background too (`Backgrounds.from_coco`). After G. Ghiasi et al., Simple Copy-Paste is a
      Strong Data Augmentation Method for Instance Segmentation, CVPR 2021, arXiv:2012.07177; the numbers of objects are
      ours.
    - ``georgakis2017``: objects stand on points with scales that you give (``support`` of `SceneComposer`). After the
      idea of G. Georgakis et al., Synthesizing Training Data for Object Detection in Indoor Scenes, RSS 2017,
      arXiv:1702.07836; finding the surfaces is the work of `fastnuggets.scenes.geometry`.
    """
    if name not in PRESETS:
        raise ValueError(f"preset must be one of {', '.join(PRESETS)}, got {name!r}")
    return PRESETS[name].but(**changes)
