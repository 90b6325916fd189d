"""CIFAR as an ImageFolder tree: real image files, the split, the statistics."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.zoo.small_data import cifar_tree
from zoo.data import CIFAR10


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    return cifar_tree(tmp_path)


def module(tree: Path, **kwargs: object) -> CIFAR10:
    data = CIFAR10(str(tree), batch_size=4, validation=3, **kwargs)  # type: ignore[arg-type]
    data.prepare_data()
    data.setup("fit")
    return data


def test_parts_and_statistics(tree: Path) -> None:
    data = module(tree, augment=False)
    assert (len(data.train), len(data.val), len(data.test)) == (9, 3, 4)
    pixels = data.train.images.double() / 255
    assert data.mean is not None
    assert data.std is not None
    torch.testing.assert_close(data.mean.double(), pixels.mean((0, 2, 3)), atol=1e-6, rtol=0)
    torch.testing.assert_close(data.std.double(), pixels.std((0, 2, 3), correction=0), atol=1e-6, rtol=0)
    x, y = next(iter(data.test_dataloader()))
    assert x.shape == (4, 3, 32, 32)
    for number, label in itertools.product((0, 1), (0, 1)):
        image = np.array(Image.open(tree / "test" / ("bird", "cat")[label] / f"{number:04}.png"))
        expected = (torch.tensor(image).permute(2, 0, 1) / 255 - data.mean[:, None, None]) / data.std[:, None, None]
        (place,) = [i for i in range(4) if torch.allclose(x[i], expected, atol=1e-5)]
        assert y[place] == label
    assert len(data.train_dataloader()) == 2
    assert data.input_metadata() == {"kind": "image", "size": [3, 32, 32]}


def test_nothing_held_out_is_trained_on_whatever_the_seed(tree: Path) -> None:
    splits = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        data = module(tree)
        assert data.seed == seed
        kept, held_out = (sorted(part.images.flatten(1).sum(1).tolist()) for part in (data.train, data.val))
        assert not set(kept) & set(held_out)
        splits.append(held_out)
    assert splits[0] == splits[1]


def test_test_images_are_not_sorted_by_class(tmp_path: Path) -> None:
    data = module(cifar_tree(tmp_path, test=20))
    labels = data.test.labels.tolist()
    assert sorted(labels) == [0] * 20 + [1] * 20
    assert 5 < sum(labels[:20]) < 15
    assert module(tmp_path).test.labels.tolist() == labels


def test_standardised_by_pixel(tree: Path) -> None:
    data = module(tree, standardize="pixel", subset=5)
    assert len(data.train) == 5
    assert data.mean is not None
    assert data.mean.shape == (3, 32, 32)
    x, _ = next(iter(data._loader(data.train, 5)))
    assert x.shape == (5, 3, 32, 32)


def test_parts_of_other_classes(tree: Path) -> None:
    (tree / "test" / "bird").rename(tree / "test" / "ant")
    with pytest.raises(ValueError, match=r"of the same classes, .*\['ant', 'cat'\] beside \['bird', 'cat'\]"):
        module(tree)


def test_missing_images_and_bad_arguments(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"must be in .*, as train/<class>.*CIFAR10\(.*, download=True\)"):
        module(tmp_path)
    with pytest.raises(ValueError, match="standardize must be 'channel' or 'pixel', got 'no'"):
        CIFAR10(str(tmp_path), standardize="no")
    with pytest.raises(ValueError, match="crop_step must be a divisor of the padding, 1, 2 or 4 pixels, got 3"):
        CIFAR10(str(tmp_path), crop_step=3)
