"""Image files of any kind as 8-bit RGB, and back. A file that cannot be used raises `BrokenFileError`."""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from fastnuggets.molecules.files import need

SUFFIXES = frozenset(
    (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm", ".pgm", ".pbm", ".pnm")
)
FORMATS = ("jpg", "png")


@cache
def opencv() -> Any:
    return need("cv2", "scenes")


@cache
def pillow() -> Any:
    return need("PIL.Image", "scenes")


@cache
def coco_masks() -> Any:
    return need("pycocotools.mask", "scenes")


class BrokenFileError(ValueError):
    """A file that gives no image or no object; ``name`` and ``reason`` say which and why."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(name, reason)
        self.name, self.reason = name, reason

    def __str__(self) -> str:
        return f"{self.name}: {self.reason}"


def find(folder: str | os.PathLike[str]) -> list[Path]:
    """The image files in a folder and the folders below it, sorted by path, hidden ones left out."""
    root = Path(folder)
    if not root.is_dir():
        raise NotADirectoryError(20, "expected a folder", str(root))
    found = []
    for place, folders, files in os.walk(root, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        found += [Path(place, name) for name in files if not name.startswith(".") and is_image(name)]
    return sorted(found)


def is_image(name: str | os.PathLike[str]) -> bool:
    return os.path.splitext(name)[1].lower() in SUFFIXES


def open_image(path: Path) -> Any:
    """A Pillow image of mode RGB or RGBA, upright as its EXIF entry says, 16-bit levels brought to 8."""
    pil, ops = pillow(), need("PIL.ImageOps", "scenes")
    try:
        with pil.open(path) as file:
            image = ops.exif_transpose(file)
            image.load()
            return _eight_bit(pil, image)
    except MemoryError:
        raise
    except BrokenFileError:
        raise
    except Exception as error:  # Pillow's readers raise whatever a damaged file makes them trip over
        raise BrokenFileError(str(path), in_one_line(error)) from error


def in_one_line(error: BaseException) -> str:
    return " ".join(str(getattr(error, "strerror", None) or error).split())[:200] or type(error).__name__


def _eight_bit(pil: Any, image: Any) -> Any:
    if image.mode.startswith("I"):  # 16 bits, which Pillow keeps in 16 or in 32
        levels = np.asarray(image).astype(np.int64)
        if levels.min(initial=0) < 0 or levels.max(initial=0) > 65535:
            raise ValueError("its levels are beyond 16 bits")
        return pil.fromarray(((levels + 128) // 257).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise ValueError("it holds floating-point levels")
    transparent = image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info
    return image.convert("RGBA" if transparent else "RGB")


def read_rgb(path: Path) -> np.ndarray:
    """[H, W, 3] uint8; what is transparent shows the colour stored there."""
    return np.array(open_image(path).convert("RGB"))


def read_mask(path: Path) -> np.ndarray:
    """[H, W] uint8 of a mask file: its alpha channel if it has one that is used, else its grey levels.

    0/1 masks are stretched to 0/255.
    """
    image = open_image(path)
    levels = np.array(image.convert("L"))
    if image.mode == "RGBA":
        alpha = np.array(image.getchannel("A"))
        levels = alpha if alpha.min(initial=255) < 255 else levels
    return levels * np.uint8(255) if levels.max(initial=0) == 1 else levels


def encode(image: np.ndarray, kind: str, quality: int = 95) -> bytes:
    """An image file of [H, W, 3] or [H, W] uint8; kind: jpg or png. The same pixels give the same bytes."""
    cv2 = opencv()
    options = {"jpg": [cv2.IMWRITE_JPEG_QUALITY, quality], "png": []}[kind]
    ok, data = cv2.imencode(f".{kind}", image[..., ::-1] if image.ndim == 3 else image, options)
    if not ok:
        raise ValueError(f"the image of {image.shape} cannot be written as {kind}")
    return data.tobytes()
