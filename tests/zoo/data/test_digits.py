"""scikit-learn's digits as images and as sequences."""

from __future__ import annotations

import pytest
import torch

from zoo.data import Digits


def test_images_and_sequences_are_the_same_pixels() -> None:
    images, sequences = Digits(eval_batch_size=300), Digits("sequences", eval_batch_size=300)
    images.setup("fit")
    sequences.setup("fit")
    assert [len(part) for part in (images.train, images.val, images.test)] == [1197, 300, 300]
    (x, y), (s, labels) = next(iter(images.test_dataloader())), next(iter(sequences.test_dataloader()))
    assert x.shape == (300, 1, 8, 8)
    assert s.shape == (300, 8, 8)
    assert torch.equal(x[:, 0], s)
    assert torch.equal(y, labels)
    train = images.train.tensors[0]
    assert abs(float(train.mean())) < 1e-5
    assert abs(float(train.std(correction=0)) - 1) < 1e-5
    assert images.input_metadata() == {"kind": "image", "size": [1, 8, 8]}
    assert sequences.input_metadata() == {"kind": "sequence", "size": [8, 8]}


def test_form_must_be_known() -> None:
    with pytest.raises(ValueError, match="form must be 'images' or 'sequences', got 'rows'"):
        Digits("rows")
