"""Cut-outs: objects with their masks, from folders, annotations or photographs, read when they are needed."""

from __future__ import annotations

import json
import os
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar
from xml.etree import ElementTree

import numpy as np

from fastnuggets.scenes.images import (
    BrokenFileError,
    coco_masks,
    find,
    in_one_line,
    open_image,
    opencv,
    pillow,
    read_mask,
    read_rgb,
)

T = TypeVar("T")

MASKS = ("auto", "alpha", "file", "grabcut")
_HALF = 128  # a mask's pixel belongs to the object from here on
_MASK_ENDINGS = ("_mask", ".mask", "-mask")
_GRABCUT_SIDE = 320  # GrabCut takes seconds on a photograph; its mask is found on one of this size


@dataclass(frozen=True, eq=False)
class Cutout:
    """An object, cropped to its mask."""

    image: np.ndarray  # [h, w, 3] uint8 RGB
    mask: np.ndarray  # [h, w] uint8, 0..255
    category: str
    name: str  # where it comes from


class Entry(NamedTuple):
    """Where one cut-out is: what `Cutouts` is a list of."""

    image: Path
    category: str
    name: str
    how: str  # how to find the mask: one of `MASKS`, "value", "box", "polygon"
    source: Any = None  # the mask's file; (file, value); x, y, w, h; COCO's segmentation


class Cutouts(Sequence[Cutout]):
    """A sequence of cut-outs that are decoded when they are asked for.

    ``cutouts[i]`` gives a `Cutout` or raises `BrokenFileError`, and every broken one is kept in ``skipped`` by name
    with the reason. The last ones used stay in memory. It can be pickled, without what is in memory: for workers.

    Args:
        entries: what to decode, as made by :meth:`from_folder` and its neighbours.
        inverted: masks are 0 on the object, as in the data of Dwibedi 2017.
        cache_bytes: memory for decoded cut-outs.
        min_side: an object smaller than this in height or width is skipped.
    """

    def __init__(
        self,
        entries: Iterable[Entry],
        *,
        inverted: bool = False,
        cache_bytes: int = 1 << 28,
        min_side: int = 6,
    ) -> None:
        self.entries = list(entries)
        self.inverted, self.min_side = inverted, min_side
        self.skipped: dict[str, str] = {}
        self._cache: LeastRecent[Cutout] = LeastRecent(cache_bytes)

    @classmethod
    def from_folder(cls, folder: str | os.PathLike[str], *, masks: str = "auto", **options: Any) -> Cutouts:
        """Images in a folder: their category is the name of the folder below ``folder`` that they lie in.

        masks: ``"alpha"`` takes the alpha channel; ``"file"`` the file beside the image with the same stem, or the stem
        and ``_mask`` (Dwibedi 2017: ``.jpg`` and ``.pbm``); ``"auto"`` the file if there is one, else the alpha
        channel; ``"grabcut"`` photographs of one object on a plain background: see :func:`grabcut`. Further
        ``options``: as for the class. NotADirectoryError; ValueError if there is no image.
        """
        if masks not in MASKS:
            raise ValueError(f"masks must be one of {', '.join(MASKS)}, got {masks!r}")
        root, paths = Path(folder), find(folder)
        partner = {} if masks in ("alpha", "grabcut") else _pairs(paths)
        taken = set(partner.values())
        entries = []
        for path in paths:
            if path in taken:
                continue
            inner = path.relative_to(root)
            category = inner.parts[0] if len(inner.parts) > 1 else "object"
            how = ("file" if path in partner else "alpha") if masks == "auto" else masks
            entries.append(Entry(path, category, inner.as_posix(), how, partner.get(path)))
        if not entries:
            raise ValueError(f"{root}: there is no image in it")
        return cls(entries, **options)

    @classmethod
    def from_coco(cls, images: str | os.PathLike[str], annotations: str | os.PathLike[str], **options: Any) -> Cutouts:
        """The objects of a COCO instances file, polygons or RLE; crowds are left out, boxes without a mask too."""
        data = json.loads(Path(annotations).read_text(encoding="utf-8"))
        try:
            files = {image["id"]: image for image in data["images"]}
            names = {category["id"]: str(category["name"]) for category in data["categories"]}
            entries = [
                Entry(
                    Path(images, files[one["image_id"]]["file_name"]),
                    names[one["category_id"]],
                    f"{files[one['image_id']]['file_name']}#{one['id']}",
                    "polygon",
                    one["segmentation"],
                )
                for one in data["annotations"]
                if not one.get("iscrowd") and one.get("segmentation")
            ]
        except (KeyError, TypeError) as error:
            raise ValueError(f"{annotations}: expected COCO instances ({type(error).__name__}: {error})") from error
        return cls(entries, **options)

    @classmethod
    def from_voc(cls, folder: str | os.PathLike[str], **options: Any) -> Cutouts:
        """The objects of a Pascal VOC folder: Annotations, JPEGImages, and SegmentationObject where it has the image.

        An object of an image without a segmentation is its whole box.
        """
        root = Path(folder)
        files = sorted((root / "Annotations").glob("*.xml"))
        if not files:
            raise ValueError(f"{root}: expected Annotations/*.xml, there is none")
        skipped, entries = {}, []
        for file in files:
            try:
                entries += list(_voc(root, file))
            except (ElementTree.ParseError, ValueError, AttributeError, OSError) as error:
                skipped[str(file)] = f"no VOC annotation ({in_one_line(error)})"
        found = cls(entries, **options)
        found.skipped.update(skipped)
        return found

    @property
    def categories(self) -> tuple[str, ...]:
        """The names of the categories, sorted."""
        return tuple(sorted({entry.category for entry in self.entries}))

    def only(self, categories: Iterable[str]) -> Cutouts:
        """The cut-outs of some categories. ValueError for a category that there is not."""
        wanted = list(categories)
        unknown = sorted(set(wanted) - set(self.categories))
        if unknown:
            raise ValueError(f"there is no category {unknown[0]!r}: there are {', '.join(self.categories)}")
        kept = [entry for entry in self.entries if entry.category in wanted]
        return Cutouts(kept, inverted=self.inverted, min_side=self.min_side, cache_bytes=self._cache.limit)

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(f"index {index} is out of range for {len(self)} cut-outs")
        return self._cache.get(index % len(self), self._load, lambda one: one.image.nbytes + one.mask.nbytes)

    def _load(self, index: int) -> Cutout:
        entry = self.entries[index]
        if entry.name in self.skipped:
            raise BrokenFileError(entry.name, self.skipped[entry.name])
        try:
            image, mask = _DECODERS[entry.how](entry)
            return self._cropped(entry, image, 255 - mask if self.inverted else mask)
        except BrokenFileError as error:
            self.skipped[entry.name] = error.reason
            raise BrokenFileError(entry.name, error.reason) from error

    def _cropped(self, entry: Entry, image: np.ndarray, mask: np.ndarray) -> Cutout:
        if mask.shape != image.shape[:2]:
            raise BrokenFileError(entry.name, f"the mask is {_by(mask)} and the image {_by(image)}")
        box = bounding_box(mask >= _HALF)
        if box is None:
            raise BrokenFileError(entry.name, "its mask is empty")
        y, x, h, w = box
        if min(h, w) < self.min_side:
            raise BrokenFileError(entry.name, f"the object is {w} x {h}, smaller than {self.min_side}")
        image, mask = image[y : y + h, x : x + w].copy(), mask[y : y + h, x : x + w].copy()
        if entry.how == "alpha":
            image = _with_colour_around(image, mask)
        return Cutout(image, mask, entry.category, entry.name)

    def check(self) -> dict[str, str]:
        """Read all of them once; what is broken, by name with the reason."""
        for index in range(len(self)):
            try:
                self[index]
            except BrokenFileError:
                continue
        return self.skipped

    def __repr__(self) -> str:
        return f"Cutouts({len(self)} of {len(self.categories)} categories, {len(self.skipped)} skipped)"


class LeastRecent(Generic[T]):
    """Values by number, as many as fit into ``limit`` bytes; those used least lately go first, and none is pickled."""

    def __init__(self, limit: int) -> None:
        self.limit, self._held = limit, 0
        self._values: OrderedDict[int, tuple[T, int]] = OrderedDict()

    def get(self, index: int, load: Callable[[int], T], size: Callable[[T], int]) -> T:
        """The value of ``index``, loaded if it is not there."""
        if index in self._values:
            self._values.move_to_end(index)
            return self._values[index][0]
        value = load(index)
        self._values[index] = value, size(value)
        self._held += self._values[index][1]
        while self._held > self.limit:
            self._held -= self._values.popitem(last=False)[1][1]
        return value

    def __getstate__(self) -> dict[str, Any]:
        return {"limit": self.limit, "_held": 0, "_values": OrderedDict()}


def bounding_box(mask: np.ndarray) -> tuple[int, int, int, int] | None:
    """y, x, height, width of the pixels of a [H, W] mask, bool or uint8, that are not 0; None if there is none."""
    x, y, width, height = opencv().boundingRect(mask.view(np.uint8)) if mask.size else (0, 0, 0, 0)
    return (y, x, height, width) if width else None


def grabcut(image: np.ndarray) -> np.ndarray:
    """Mask, [H, W] uint8 0 or 255, of the one object of a photograph with a plain background.

    OpenCV's GrabCut, begun from what differs from the colour of the frame; only its largest piece is kept, holes
    filled that the frame's colour does not show in. Deterministic; sets OpenCV's random generator.
    """
    cv2 = opencv()
    height, width = image.shape[:2]
    shrink = min(1.0, _GRABCUT_SIDE / max(height, width))
    size = (max(1, round(width * shrink)), max(1, round(height * shrink)))
    small = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
    frame = np.concatenate([small[0], small[-1], small[:, 0], small[:, -1]]).astype(np.float32)
    colour = np.median(frame, 0)
    distance = np.abs(small.astype(np.float32) - colour).max(2)
    noise = max(12.0, 3 * float(np.abs(frame - colour).max(1).mean()))
    state = np.where(distance > noise, cv2.GC_PR_FGD, cv2.GC_PR_BGD).astype(np.uint8)
    state[[0, -1]] = state[:, [0, -1]] = cv2.GC_BGD
    if not (state == cv2.GC_PR_FGD).any():
        return np.zeros((height, width), np.uint8)
    cv2.setRNGSeed(0)
    models = np.zeros((1, 65)), np.zeros((1, 65))
    cv2.grabCut(small, state, None, *models, 3, cv2.GC_INIT_WITH_MASK)
    found = ((state == cv2.GC_PR_FGD) | (state == cv2.GC_FGD)).astype(np.uint8)
    count, pieces, stats, _ = cv2.connectedComponentsWithStats(found)
    if count > 1:
        found = (pieces == 1 + int(stats[1:, cv2.CC_STAT_AREA].argmax())).astype(np.uint8)
    large = cv2.resize(found * np.uint8(255), (width, height), interpolation=cv2.INTER_LINEAR)
    return np.where(large >= _HALF, np.uint8(255), np.uint8(0))


def _by(image: np.ndarray) -> str:
    return f"{image.shape[1]} x {image.shape[0]}"


def _pairs(paths: Sequence[Path]) -> dict[Path, Path]:
    """The mask file of each image that has one."""
    by_stem: dict[Path, list[Path]] = {}
    for path in paths:
        by_stem.setdefault(path.with_suffix(""), []).append(path)
    pairs = {}
    for stem, group in by_stem.items():
        masks = [mask for ending in _MASK_ENDINGS for mask in by_stem.get(stem.with_name(stem.name + ending), [])]
        photographs = [path for path in group if path.suffix.lower() in (".jpg", ".jpeg")]
        if not masks and photographs:  # the same stem: the photograph is the JPEG
            masks = [path for path in group if path not in photographs]
            group = photographs
        if masks:
            pairs[group[0]] = masks[0]
    return pairs


def _voc(root: Path, file: Path) -> Iterable[Entry]:
    tree = ElementTree.parse(file).getroot()
    image = root / "JPEGImages" / (tree.findtext("filename") or file.with_suffix(".jpg").name)
    segments = root / "SegmentationObject" / file.with_suffix(".png").name
    for number, one in enumerate(tree.iter("object"), start=1):
        category, name = one.findtext("name") or "object", f"{image.name}#{number}"
        if segments.exists():
            yield Entry(image, category, name, "value", (segments, number))
            continue
        x0, y0, x1, y1 = (int(float(one.findtext(f"bndbox/{edge}") or "")) for edge in ("xmin", "ymin", "xmax", "ymax"))
        yield Entry(image, category, name, "box", (x0 - 1, y0 - 1, x1 - x0 + 1, y1 - y0 + 1))


Decoded = tuple[np.ndarray, np.ndarray]


def _with_alpha(entry: Entry) -> Decoded:
    image = open_image(entry.image)
    if image.mode != "RGBA":
        raise BrokenFileError(entry.name, "it has neither an alpha channel nor a mask beside it")
    pixels = np.array(image)
    return pixels[..., :3], pixels[..., 3]


def _with_colour_around(image: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    """Where nothing is to be seen, the colour of the nearest visible pixel.

    What a file holds there is anything, often black; resampling and feathering would pull it into the object's edge.
    """
    hidden = alpha == 0
    if not hidden.any():
        return image
    cv2 = opencv()
    _, nearest = cv2.distanceTransformWithLabels(
        hidden.astype(np.uint8), cv2.DIST_L2, 5, labelType=cv2.DIST_LABEL_PIXEL
    )
    colours = np.zeros((int(nearest.max()) + 1, 3), np.uint8)
    colours[nearest[~hidden]] = image[~hidden]
    return np.where(hidden[..., None], colours[nearest], image)


def _with_file(entry: Entry) -> Decoded:
    if entry.source is None:
        raise BrokenFileError(entry.name, "there is no mask beside it")
    image = read_rgb(entry.image)
    try:
        mask = read_mask(entry.source)
    except BrokenFileError as error:
        raise BrokenFileError(entry.name, f"its mask: {error.reason}") from error
    return image, mask


def _with_grabcut(entry: Entry) -> Decoded:
    image = read_rgb(entry.image)
    return image, grabcut(image)


def _with_value(entry: Entry) -> Decoded:
    file, value = entry.source
    with pillow().open(file) as segments:
        return read_rgb(entry.image), np.where(np.asarray(segments) == value, np.uint8(255), np.uint8(0))


def _with_box(entry: Entry) -> Decoded:
    image = read_rgb(entry.image)
    mask = np.zeros(image.shape[:2], np.uint8)
    x, y, w, h = entry.source
    mask[max(0, y) : y + h, max(0, x) : x + w] = 255
    return image, mask


def _with_polygon(entry: Entry) -> Decoded:
    image = read_rgb(entry.image)
    return image, decode_segmentation(entry.source, image.shape[0], image.shape[1]) * np.uint8(255)


def decode_segmentation(segmentation: Any, height: int, width: int) -> np.ndarray:
    """[H, W] uint8, 0 or 1, of COCO's polygons, or of its RLE, compressed or not. BrokenFileError."""
    coco = coco_masks()
    try:
        if isinstance(segmentation, dict) and isinstance(segmentation["counts"], (str, bytes)):
            rle = segmentation
        else:
            rle = coco.frPyObjects(segmentation, height, width)
            rle = coco.merge(rle) if isinstance(rle, list) else rle
        return np.ascontiguousarray(coco.decode(rle))
    except Exception as error:  # pycocotools raises bare Exceptions
        raise BrokenFileError("segmentation", f"no COCO segmentation ({in_one_line(error)})") from error


_DECODERS: dict[str, Callable[[Entry], Decoded]] = {
    "alpha": _with_alpha,
    "file": _with_file,
    "grabcut": _with_grabcut,
    "value": _with_value,
    "box": _with_box,
    "polygon": _with_polygon,
}
