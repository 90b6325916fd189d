"""Small data sets of real files in the layouts of the large ones."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image


def cifar_tree(folder: Path, train: int = 6, test: int = 2, classes: Sequence[str] = ("bird", "cat")) -> Path:
    """An ImageFolder tree, with so many images of each class."""
    random = np.random.default_rng(0)
    for part, count in (("train", train), ("test", test)):
        for label in classes:
            images = folder / part / label
            images.mkdir(parents=True)
            for number in range(count):
                pixels = random.integers(0, 256, (32, 32, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(images / f"{number:04}.png")
    return folder


def imdb_tree(folder: Path, count: int = 4) -> Path:
    """The tree aclImdb, with so many reviews of each label; those with more words come later."""
    texts = {"pos": "A good film .", "neg": "bad bad film<br />"}
    for part in ("train", "test"):
        for label, text in texts.items():
            reviews = folder / "aclImdb" / part / label
            reviews.mkdir(parents=True)
            for number in range(count):
                words = text + " really" * number + (" unseen" if part == "test" else "")
                (reviews / f"{number}_9.txt").write_text(words, encoding="utf-8")
    return folder / "aclImdb"
