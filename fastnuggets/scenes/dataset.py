"""Scenes made on the fly, for a `torch.utils.data.DataLoader`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from fastnuggets.scenes.composer import Scene, SceneComposer

Sample = tuple[Tensor, dict[str, Any]]


class PasteDataset(Dataset[Any]):
    """Scenes ``0 .. length - 1`` of a composer, made when they are asked for: the same for any number of workers.

    ``dataset[k]`` is an image [3, H, W] uint8 and a target as torchvision's detectors take it: ``boxes`` [n, 4] float32
    (x0, y0, x1, y1) of what is visible, ``labels`` [n] int64 from 1 (``composer.categories``), ``masks`` [n, H, W]
    uint8, ``area`` [n] float32, ``iscrowd`` [n] int64, ``image_id``. With ``same_scene`` every scene gives an image for
    each blend, one after the other.

    Args:
        composer: a `SceneComposer`.
        length: images in an epoch.
        transform: of (image, target); whatever it returns is the sample.
        masks: False leaves the masks out, which take the time of the collation.

    ``set_epoch(e)`` moves on to the next ``length`` images, in workers that are running too; without it every epoch is
    the same. ``collate_fn=PasteDataset.collate`` makes a batch.
    """

    def __init__(
        self,
        composer: SceneComposer,
        length: int,
        transform: Callable[[Tensor, dict[str, Any]], Any] | None = None,
        *,
        masks: bool = True,
    ) -> None:
        if length < 1:
            raise ValueError(f"length must be at least 1, got {length}")
        self.composer, self.length, self.transform, self.masks = composer, length, transform, masks
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()  # workers see it change

    def set_epoch(self, epoch: int) -> None:
        """Which ``length`` images these are."""
        if epoch < 0:
            raise ValueError(f"epoch must be at least 0, got {epoch}")
        self._epoch.fill_(epoch)

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Any:
        if not -self.length <= index < self.length:
            raise IndexError(f"index {index} is out of range for {self.length} images")
        number = int(self._epoch) * self.length + index % self.length
        recipe = self.composer.recipe
        if recipe.same_scene:
            several = len(recipe.blend)
            scene = self.composer.scene(number // several, [recipe.blend[number % several]])
        else:
            scene = self.composer.scene(number)
        image = torch.from_numpy(scene.image).permute(2, 0, 1).contiguous()
        sample = image, target(scene, number, masks=self.masks)
        return sample if self.transform is None else self.transform(*sample)

    @staticmethod
    def collate(samples: Sequence[Sample]) -> tuple[Tensor, list[dict[str, Any]]]:
        """Images [B, 3, H, W] and the list of targets."""
        return torch.stack([image for image, _ in samples]), [target for _, target in samples]


def target(scene: Scene, number: int, *, masks: bool = True) -> dict[str, Any]:
    """The labels of a scene as torchvision's detectors take them; see `PasteDataset`."""
    labels = scene.labels
    found = labels.instances
    boxes = np.array([one.box for one in found], np.float32).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    made: dict[str, Any] = {
        "boxes": torch.from_numpy(boxes),
        "labels": torch.tensor([labels.category_id(one) for one in found], dtype=torch.int64),
        "area": torch.tensor([one.area for one in found], dtype=torch.float32),
        "iscrowd": torch.zeros(len(found), dtype=torch.int64),
        "image_id": number,
    }
    if masks:
        numbers = np.array([one.number for one in found], np.int32).reshape(-1, 1, 1)
        made["masks"] = torch.from_numpy((labels.ids == numbers).astype(np.uint8))
    return made
