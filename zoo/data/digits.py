"""scikit-learn's digits as a LightningDataModule: 1797 real images of 8x8 pixels, inside the package."""

from __future__ import annotations

from typing import Any

import torch

from zoo.data.loader import Rows
from zoo.data.module import InMemoryDataModule

SPLIT_SEED = 0
"""Which images are for validation and test: always the same, whatever the seed of a run."""


class Digits(InMemoryDataModule):
    """1197 training, 300 validation and 300 test images.

    Batches are (images (N, 1, 8, 8), labels (N,)) or (sequences (N, 8, 8), labels (N,)): the rows of an image from top
    to bottom as 8 steps of 8 features. Pixels are standardised with their mean and deviation over the training images.

    Args:
        form: "images" (default) or "sequences".
        batch_size: Of training. Default 32; a smaller last batch is left out.
        eval_batch_size: Of validation and test. Default 50.
        num_workers: Processes that make batches. Default 0: the images are in memory.

    Source: scikit-learn's ``load_digits``; Alpaydin and Kaynak, "Optical Recognition of Handwritten Digits", 1998.
    """

    classes = tuple("0123456789")

    def __init__(
        self, form: str = "images", batch_size: int = 32, eval_batch_size: int = 50, num_workers: int = 0
    ) -> None:
        super().__init__(batch_size, eval_batch_size, num_workers)
        if form not in ("images", "sequences"):
            raise ValueError(f"form must be 'images' or 'sequences', got {form!r}.")
        self.form = form

    def setup(self, stage: str) -> None:
        """Read all images."""
        if self.mean is not None:
            return
        from sklearn.datasets import load_digits

        data, target = load_digits(return_X_y=True)
        shape = (-1, 1, 8, 8) if self.form == "images" else (-1, 8, 8)
        images = torch.tensor(data, dtype=torch.float32).reshape(shape) / 16
        labels = torch.tensor(target, dtype=torch.int64)
        # Neighbours come from the same writer, so the parts are drawn from all of them.
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(SPLIT_SEED))
        train, val, test = order.split([1197, 300, 300])
        self.mean, self.std = images[train].mean().reshape(1), images[train].std(correction=0).reshape(1)
        images = (images - self.mean) / self.std
        self.train, self.val, self.test = (Rows(images[part], labels[part]) for part in (train, val, test))

    def input_metadata(self) -> dict[str, Any]:
        """What a model that was trained on these batches takes, for its weights file."""
        return {"kind": "image", "size": [1, 8, 8]} if self.form == "images" else {"kind": "sequence", "size": [8, 8]}
