"""Reviews as files: labels, the vocabulary, padding."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.zoo.small_data import imdb_tree
from zoo.data import IMDb


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return imdb_tree(tmp_path)


def test_batches(root: Path) -> None:
    data = IMDb(str(root), batch_size=2, eval_batch_size=8, validation=2, max_tokens=5)
    data.setup("fit")
    assert (len(data.train), len(data.val), len(data.test)) == (6, 2, 8)
    tokens, lengths, labels = next(iter(data.test_dataloader()))
    assert sorted(labels.tolist()) == [0] * 4 + [1] * 4
    assert labels.tolist() != sorted(labels.tolist())  # whole batches must not be of one class
    assert sorted(lengths.tolist()) == [4, 4, 5, 5, 5, 5, 5, 5]
    assert tokens.shape == (8, 5)
    for row, length in zip(tokens, lengths, strict=True):
        assert int((row != 0).sum()) == length
        assert row[length - 1] == 1  # "unseen" is not in the vocabulary
    assert data.input_metadata() == {"kind": "text", "max_tokens": 5, "pad_to": None}


def test_the_vocabulary_is_made_of_what_is_trained_on(root: Path) -> None:
    (root / "train" / "pos" / "0_9.txt").write_text("secret", encoding="utf-8")
    found = []
    for validation in range(8):
        data = IMDb(str(root), validation=validation)
        data.setup("fit")
        assert data.tokenizer is not None
        found.append("secret" in data.tokenizer.vocabulary)
    assert found[0]
    assert found == sorted(found, reverse=True)  # from the moment on that the review is held out


def test_padded_in_front(root: Path) -> None:
    data = IMDb(str(root), eval_batch_size=8, validation=2, pad_to=6)
    data.setup("fit")
    tokens, labels = next(iter(data.test_dataloader()))
    assert tokens.shape == (8, 6)
    assert (tokens == 0).sum(1).sort().values.tolist() == [0, 0, 0, 0, 1, 1, 2, 2]
    assert (tokens[:, -4:] != 0).all()
    assert labels.dtype == torch.int64


def test_missing_reviews(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"must be in .*, as train/neg/\*\.txt .*name its folder aclImdb"):
        IMDb(str(tmp_path)).setup("fit")
