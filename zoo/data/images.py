"""Images in memory: standardised, and cropped and flipped at random in training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from zoo.data.loader import Draw, generator_for


class Images(Dataset[Any]):
    """Whole batches (images, labels) of 8-bit images.

    Args:
        images: (N, C, H, W), uint8.
        labels: (N,), int64.
        mean: Of each channel (C,) or of each channel and pixel (C, H, W), in units of 1/255 of the full range.
        std: The deviation, likewise.
        padding: Pixels of zero padding for a random crop of the images' own size, and a flip half of the time. Default
            None: images as they are.
        cutout: The side, in pixels, of a square of each image that is set to its channel's mean in training. Default
            0: none.
        crop_step: Crops begin at multiples of it, in pixels, a divisor of the padding. Default 1: anywhere.
        seed: Of crops, flips and squares, with the epoch and the first image of a batch. Default 0.
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        mean: Tensor,
        std: Tensor,
        *,
        padding: int | None = None,
        cutout: int = 0,
        crop_step: int = 1,
        seed: int = 0,
    ) -> None:
        self.images, self.labels, self.padding, self.cutout, self.seed = images, labels, padding, cutout, seed
        self.crop_step = crop_step
        shape = mean.shape if mean.ndim == 3 else (-1, 1, 1)
        self.mean, self.std = mean.reshape(shape), std.reshape(shape)

    def __len__(self) -> int:
        return len(self.images)

    def __getitems__(self, draws: Sequence[Draw]) -> tuple[Tensor, Tensor]:
        """These images and labels."""
        index = torch.tensor([number for _, number in draws])
        images = self.images[index]
        generator = generator_for(self.seed, *draws[0])
        if self.padding is not None:
            images = crop_and_flip(images, self.padding, generator, self.crop_step)
        images = images.float().div_(255).sub_(self.mean).div_(self.std)
        if self.cutout:
            cut_out_(images, self.cutout, generator)
        return images, self.labels[index]


def crop_and_flip(images: Tensor, padding: int, generator: torch.Generator, step: int = 1) -> Tensor:
    """Each image padded with zeros, cropped to its size at a place of its own, and flipped half of the time.

    torchvision's transforms draw one place for a whole batch, and one image at a time is slower than a training step
    may bear.

    Args:
        images: (N, C, H, W).
        padding: Pixels on each side.
        generator: Decides places and flips.
        step: Crops begin at multiples of it, in pixels, a divisor of the padding. Default 1: anywhere.

    Returns:
        (N, C, H, W).
    """
    n, _, h, w = images.shape
    padded = torch.nn.functional.pad(images, (padding,) * 4)
    top, left = step * torch.randint(2 * padding // step + 1, (2, n, 1), generator=generator)
    rows = top + torch.arange(h)
    columns = left + torch.arange(w)
    flipped = torch.rand(n, generator=generator) < 0.5
    columns[flipped] = columns[flipped].flip(1)
    batch = torch.arange(n)[:, None, None]
    # Advanced indices around a slice: the result is (N, H, W, C).
    return padded[batch, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def cut_out_(images: Tensor, side: int, generator: torch.Generator) -> Tensor:
    """A square of each image set to 0, in place, its middle at a place of its own; part of it may lie outside.

    Args:
        images: (N, C, H, W), standardised, so that 0 is the mean.
        side: Of the square, in pixels.
        generator: Decides the places.

    Returns:
        images.

    Source: DeVries and Taylor, "Improved Regularization of Convolutional Neural Networks with Cutout", 2017.
    """
    n, _, h, w = images.shape

    def inside(size: int) -> Tensor:
        first = torch.randint(size, (n, 1), generator=generator) - side // 2
        return (torch.arange(size) >= first) & (torch.arange(size) < first + side)

    return images.masked_fill_(inside(h)[:, None, :, None] & inside(w)[:, None, None, :], 0.0)
