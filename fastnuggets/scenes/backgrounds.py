"""Backgrounds: photographs to paste onto, with the objects that are annotated in them if there are any."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fastnuggets.scenes.cutouts import decode_segmentation
from fastnuggets.scenes.images import BrokenFileError, find, opencv, pillow, read_rgb


class Known(NamedTuple):
    """An object that a background shows already."""

    mask: np.ndarray  # [H, W] bool
    category: str
    name: str


@dataclass(frozen=True, eq=False)
class Background:
    """A photograph to paste onto."""

    image: np.ndarray  # [H, W, 3] uint8 RGB
    name: str
    known: Sequence[Known] = ()


class Backgrounds(Sequence[Background]):
    """A sequence of photographs that are decoded when they are asked for.

    ``backgrounds[i]`` gives a `Background` or raises `BrokenFileError`, and every broken one is kept in ``skipped`` by
    name with the reason. It can be pickled.
    """

    def __init__(self, entries: Iterable[tuple[Path, str, Sequence[tuple[Any, str, str]]]]) -> None:
        self.entries = list(entries)  # file, name, and (segmentation, category, name) of what it shows
        self.skipped: dict[str, str] = {}

    @classmethod
    def from_folder(cls, folder: str | os.PathLike[str]) -> Backgrounds:
        """All images in a folder and those below it. NotADirectoryError; ValueError if there is none."""
        entries = [(path, path.relative_to(folder).as_posix(), ()) for path in find(folder)]
        if not entries:
            raise ValueError(f"{folder}: there is no image in it")
        return cls(entries)

    @classmethod
    def from_coco(cls, images: str | os.PathLike[str], annotations: str | os.PathLike[str]) -> Backgrounds:
        """The images of a COCO instances file with its objects, which stay labelled where they stay visible."""
        data = json.loads(Path(annotations).read_text(encoding="utf-8"))
        try:
            names = {category["id"]: str(category["name"]) for category in data["categories"]}
            files = {image["id"]: str(image["file_name"]) for image in data["images"]}
            known: dict[Any, list[tuple[Any, str, str]]] = {number: [] for number in files}
            for one in data["annotations"]:
                if one.get("segmentation") and not one.get("iscrowd"):
                    name = f"{files[one['image_id']]}#{one['id']}"
                    known[one["image_id"]].append((one["segmentation"], names[one["category_id"]], name))
        except (KeyError, TypeError) as error:
            raise ValueError(f"{annotations}: expected COCO instances ({type(error).__name__}: {error})") from error
        return cls((Path(images, name), name, known[number]) for number, name in files.items())

    @property
    def categories(self) -> tuple[str, ...]:
        """Names of the categories of what the backgrounds show, sorted."""
        return tuple(sorted({category for _, _, known in self.entries for _, category, _ in known}))

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        path, name, known = self.entries[index]
        if name in self.skipped:
            raise BrokenFileError(name, self.skipped[name])
        try:
            image = read_rgb(path)
            height, width = image.shape[:2]
            return Background(
                image,
                name,
                [Known(decode_segmentation(code, height, width) > 0, *names) for code, *names in known],
            )
        except BrokenFileError as error:
            self.skipped[name] = error.reason
            raise BrokenFileError(name, error.reason) from error

    def __repr__(self) -> str:
        return f"Backgrounds({len(self)}, {len(self.skipped)} skipped)"


def resize(image: np.ndarray, size: tuple[int, int], *, exact: bool = False) -> np.ndarray:
    """[h, w, 3] or [h, w] uint8 at another height and width; ``exact``: by Pillow's Lanczos, at three times the time.

    Else by areas where it shrinks, and bicubic where it grows.
    """
    height, width = size
    if image.shape[:2] == (height, width):
        return image
    if exact:
        pil = pillow()
        return np.array(pil.fromarray(image).resize((width, height), pil.Resampling.LANCZOS))
    cv2 = opencv()
    shrinks = height <= image.shape[0] and width <= image.shape[1]
    way = cv2.INTER_AREA if shrinks else cv2.INTER_CUBIC
    return np.asarray(cv2.resize(image, (width, height), interpolation=way))


def fitted(background: Background, size: tuple[int, int], how: str, exact: bool) -> Background:
    """The background at ``size``: exactly ("stretch"), or covering it with its own shape ("crop")."""
    height, width = background.image.shape[:2]
    if how == "crop":
        factor = max(size[0] / height, size[1] / width)
        size = max(size[0], round(height * factor)), max(size[1], round(width * factor))
    known = [one._replace(mask=_nearest(one.mask, size)) for one in background.known]
    return Background(resize(background.image, size, exact=exact), background.name, known)


def _nearest(mask: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    cv2 = opencv()
    return np.asarray(cv2.resize(mask.astype(np.uint8), size[::-1], interpolation=cv2.INTER_NEAREST) > 0)
