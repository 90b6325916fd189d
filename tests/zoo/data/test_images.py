"""Standardising, cropping and flipping."""

from __future__ import annotations

import torch

from zoo.data.images import Images, crop_and_flip, cut_out_
from zoo.data.loader import generator_for


def images(n: int = 6) -> torch.Tensor:
    return torch.randint(256, (n, 3, 5, 7), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


def test_every_result_is_a_crop_of_the_padded_image_flipped_or_not() -> None:
    given = images(200)
    cropped = crop_and_flip(given, 2, generator_for(0))
    assert cropped.shape == given.shape
    padded = torch.nn.functional.pad(given, (2, 2, 2, 2))
    places = set()
    for image, result in zip(padded, cropped, strict=True):
        found = [
            (top, left, flip)
            for top in range(5)
            for left in range(5)
            for flip in (False, True)
            if torch.equal(result.flip(2) if flip else result, image[:, top : top + 5, left : left + 7])
        ]
        assert len(found) == 1
        places.add(found[0])
    assert len(places) > 40  # of 5 x 5 x 2, in 200 draws


def test_crops_begin_at_multiples_of_a_step() -> None:
    given = images(200)
    cropped = crop_and_flip(given, 2, generator_for(0), 2)
    padded = torch.nn.functional.pad(given, (2, 2, 2, 2))
    crops = torch.stack([padded[:, :, t : t + 5, w : w + 7] for t in (0, 2, 4) for w in (0, 2, 4)])
    same = torch.stack([(views == cropped).flatten(2).all(2) for views in (crops, crops.flip(4))]).any(0)
    assert same.any(0).all()
    assert same.any(1).all()  # each of the nine places


def test_augmentation_depends_on_seed_epoch_and_batch() -> None:
    def batch(seed: int, epoch: int, first: int) -> torch.Tensor:
        data = Images(images(), torch.arange(6), torch.zeros(3), torch.ones(3), padding=2, seed=seed)
        return data.__getitems__([(epoch, first), (epoch, 5)])[0]

    assert torch.equal(batch(0, 1, 2), batch(0, 1, 2))
    assert not torch.equal(batch(0, 1, 2), batch(0, 2, 2))
    assert not torch.equal(batch(0, 1, 2), batch(1, 1, 2))
    assert not torch.equal(batch(0, 1, 2)[1], batch(0, 1, 3)[1])


def test_standardised_by_channel_or_by_pixel() -> None:
    given, labels = images(), torch.arange(6)
    mean, std = torch.rand(3), torch.rand(3) + 0.5
    x, y = Images(given, labels, mean, std).__getitems__([(0, 4), (0, 1)])
    expected = (given[[4, 1]].float() / 255 - mean[:, None, None]) / std[:, None, None]
    torch.testing.assert_close(x, expected)
    assert y.tolist() == [4, 1]
    mean, std = torch.rand(3, 5, 7), torch.rand(3, 5, 7) + 0.5
    x, _ = Images(given, labels, mean, std).__getitems__([(0, 0)])
    torch.testing.assert_close(x, (given[:1].float() / 255 - mean) / std)


def test_a_square_is_cut_out_of_each_image_at_a_place_of_its_own() -> None:
    images = torch.ones(64, 3, 12, 10)
    assert cut_out_(images, 4, torch.Generator().manual_seed(0)) is images
    cut = images == 0
    assert torch.equal(cut, cut[:, :1].expand_as(cut))  # in all channels alike
    heights, widths = cut[:, 0].any(2).sum(1), cut[:, 0].any(1).sum(1)
    assert torch.equal(cut[:, 0].sum((1, 2)), heights * widths)  # a rectangle
    assert heights.max() == widths.max() == 4
    assert heights.min() >= 2  # its middle is inside
    assert len({tuple(row.tolist()) for row in cut[:, 0].flatten(1)}) > 30


def test_squares_depend_on_seed_epoch_and_place_only() -> None:
    pixels = torch.full((8, 3, 6, 6), 255, dtype=torch.uint8)
    labels = torch.arange(8)

    def batch(seed: int, epoch: int) -> torch.Tensor:
        data = Images(pixels, labels, torch.zeros(3), torch.ones(3), cutout=2, seed=seed)
        return data.__getitems__([(epoch, i) for i in range(8)])[0]

    assert torch.equal(batch(1, 0), batch(1, 0))
    assert not torch.equal(batch(1, 0), batch(1, 1))
    assert not torch.equal(batch(1, 0), batch(2, 0))
