"""CIFAR-10 and CIFAR-100 as LightningDataModules."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from torchvision import datasets

from zoo.data.images import Images
from zoo.data.loader import fixed_order
from zoo.data.module import InMemoryDataModule


class _CIFAR(InMemoryDataModule):
    """What CIFAR-10 and CIFAR-100 share."""

    dataset: ClassVar[Callable[..., Any]]
    num_classes: ClassVar[int]

    def __init__(
        self,
        root: str,
        batch_size: int = 128,
        eval_batch_size: int = 500,
        augment: bool = True,
        standardize: str = "channel",
        validation: int = 5_000,
        subset: int | None = None,
        download: bool = False,
        num_workers: int = 0,
        cutout: int = 0,
        crop_step: int = 1,
    ) -> None:
        super().__init__(batch_size, eval_batch_size, num_workers)
        if standardize not in ("channel", "pixel"):
            raise ValueError(f"standardize must be 'channel' or 'pixel', got {standardize!r}.")
        if cutout < 0:
            raise ValueError(f"cutout must be the side of a square in pixels, or 0 for none, got {cutout!r}.")
        if crop_step not in (1, 2, 4):
            raise ValueError(f"crop_step must be a divisor of the padding, 1, 2 or 4 pixels, got {crop_step!r}.")
        self.root, self.download, self.augment, self.standardize = Path(root), download, augment, standardize
        self.validation, self.subset, self.cutout, self.crop_step = validation, subset, cutout, crop_step
        self.classes: list[str] = []

    def prepare_data(self) -> None:
        """Download the data if that was asked for."""
        if self.download and not self._is_tree():
            for train in (True, False):
                type(self).dataset(str(self.root), train=train, download=True)

    def setup(self, stage: str) -> None:
        """Read all images."""
        if self.mean is not None:
            return
        images, labels = self._read(train=True)
        order = torch.tensor(fixed_order(len(images)))
        held_out, kept = order[: self.validation], order[self.validation :][: self.subset]
        dims = (0, 2, 3) if self.standardize == "channel" else (0,)
        # In parts: the images as floats are four times as large. Each is a share of the mean and of the mean square.
        parts = [(images[part].double() / 255) for part in kept.split(5_000)]
        weights = [len(part) / len(kept) for part in parts]
        self.mean = sum((w * p.mean(dims) for w, p in zip(weights, parts, strict=True)), torch.zeros(())).float()
        mean = self.mean.double().reshape(self._shape)
        squares = [w * (p - mean).square().mean(dims) for w, p in zip(weights, parts, strict=True)]
        self.std = sum(squares, torch.zeros(())).sqrt().float()
        padding = 4 if self.augment else None
        self.train = Images(
            images[kept],
            labels[kept],
            self.mean,
            self.std,
            padding=padding,
            cutout=self.cutout,
            crop_step=self.crop_step,
            seed=self.seed,
        )
        self.val = Images(images[held_out], labels[held_out], self.mean, self.std)
        images, labels = self._read(train=False)
        order = torch.tensor(fixed_order(len(images)))
        self.test = Images(images[order], labels[order], self.mean, self.std)

    def _check_classes(self, classes: list[str]) -> None:
        expected = self.classes or classes
        if classes != expected or len(classes) > self.num_classes:
            raise ValueError(
                f"Training and test images must be of the same classes, at most {self.num_classes}, got folders "
                f"{classes} beside {expected} in {str(self.root)!r}; give the root of a whole data set."
            )
        self.classes = classes

    def input_metadata(self) -> dict[str, Any]:
        """What a model that was trained on these batches takes, for its weights file."""
        return {"kind": "image", "size": [3, 32, 32]}

    @property
    def _shape(self) -> tuple[int, ...]:
        return (-1, 1, 1) if self.standardize == "channel" else (3, 32, 32)

    def _is_tree(self) -> bool:
        return (self.root / "train").is_dir() and (self.root / "test").is_dir()

    def _read(self, *, train: bool) -> tuple[Tensor, Tensor]:
        if self._is_tree():
            folder = datasets.ImageFolder(str(self.root / ("train" if train else "test")))
            self._check_classes(folder.classes)
            pixels = np.stack([np.asarray(image) for image, _ in folder])
            labels = folder.targets
        else:
            try:
                data = type(self).dataset(str(self.root), train=train)
            except RuntimeError as error:  # torchvision's "not found or corrupted"
                name = type(self).__name__
                raise FileNotFoundError(
                    f"The images must be in {str(self.root)!r}, as train/<class>/* and test/<class>/* or as "
                    f"torchvision downloads them, and are not; {name}({str(self.root)!r}, download=True) fetches them."
                ) from error
            pixels, labels = data.data, data.targets
            self._check_classes(data.classes)
        images = torch.from_numpy(np.ascontiguousarray(pixels)).permute(0, 3, 1, 2).contiguous()
        return images, torch.tensor(labels)


class CIFAR10(_CIFAR):
    """CIFAR-10: 45,000 training, 5,000 validation and 10,000 test images of 32x32 pixels, kept in memory.

    Batches are (images (N, 3, 32, 32), labels (N,)). In training each image is padded by 4 pixels, cropped at a random
    place and flipped half of the time; the order, crops, flips and squares depend on the seed of the process
    (``seed_everything``), the epoch and nothing else, so that a run resumed in the middle of an epoch sees what an
    uninterrupted one sees.

    Args:
        root: A folder: of torchvision's download, or an ImageFolder tree, ``train/<class>/*`` and ``test/<class>/*``.
        batch_size: Of training. Default 128; a smaller last batch is left out.
        eval_batch_size: Of validation and test. Default 500.
        augment: Crop and flip. Default True.
        standardize: "channel" (default): by each channel's mean and deviation over the training images; "pixel": by
            those of each channel and pixel, as the paper's authors do.
        validation: Training images that are held out. Default 5,000, as in He et al. 2015. Which ones depends on the
            order of the images, and so on the layout of ``root``.
        subset: Keep only the first so many training images, after the split. Default None: all.
        download: Let torchvision download the data set into ``root`` if it is not there. Default False.
        num_workers: Processes that make batches. Default 0: the images are in memory.
        cutout: The side, in pixels, of a square at a random place of each training image that is set to the mean that
            images are standardised by (DeVries and Taylor 2017). Default 0: none.
        crop_step: Crops begin at multiples of it: 1 (default), 2 or 4 pixels. With 2 an image has 25 crops in place of
            81, few enough to compute something of each ahead.

    Raises:
        FileNotFoundError: In ``setup``, if the images are not there.

    Source: Krizhevsky, "Learning Multiple Layers of Features from Tiny Images", 2009.
    """

    dataset = datasets.CIFAR10
    num_classes = 10


class CIFAR100(_CIFAR):
    """CIFAR-100, with the arguments of `CIFAR10`."""

    dataset = datasets.CIFAR100
    num_classes = 100
