"""The Large Movie Review Dataset as a LightningDataModule."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset

from zoo.data.loader import Draw, Rows, fixed_order
from zoo.data.module import InMemoryDataModule
from zoo.text import Tokenizer, pad


class Reviews(Dataset[Any]):
    """Whole batches (tokens (N, longest length), lengths (N,), labels (N,)).

    Args:
        sequences: Tokens of each text.
        labels: (N,), int64.
    """

    def __init__(self, sequences: Sequence[Tensor], labels: Tensor) -> None:
        self.sequences, self.labels = sequences, labels

    def __len__(self) -> int:
        return len(self.sequences)

    def __getitems__(self, draws: Sequence[Draw]) -> tuple[Tensor, Tensor, Tensor]:
        """These texts and labels."""
        numbers = [number for _, number in draws]
        tokens, lengths = pad([self.sequences[number] for number in numbers])
        return tokens, lengths, self.labels[numbers]


class IMDb(InMemoryDataModule):
    """25,000 training reviews, some of them held out for validation, and 25,000 test reviews, kept in memory.

    Labels are 1 for positive and 0 for negative reviews. Batches are (tokens (N, T), lengths (N,), labels (N,)), padded
    behind; with ``pad_to`` (tokens (N, pad_to), labels (N,)), padded in front. The vocabulary is made of the training
    reviews that are not held out.

    Args:
        root: The folder ``aclImdb``, with ``train/pos/*.txt``, ``train/neg``, ``test/pos`` and ``test/neg``.
        batch_size: Of training. Default 64; a smaller last batch is left out.
        eval_batch_size: Of validation and test. Default 250.
        vocabulary_size: Numbers of words, with those for padding and for unknown words. Default 20,000.
        max_tokens: Keep the last so many words of a review. Default 200.
        pad_to: Pad in front to this length, as the paper's authors do, who use 80. Default None.
        validation: Training reviews that are held out. Default 2,500.
        subset: Keep only the first so many training reviews, after the split. Default None: all.
        num_workers: Processes that make batches. Default 0: the reviews are in memory.

    Raises:
        FileNotFoundError: In ``setup``, if the reviews are not there.

    Source: Maas, Daly, Pham, Huang, Ng, Potts, "Learning Word Vectors for Sentiment Analysis", 2011.
    """

    classes = ("negative", "positive")

    def __init__(
        self,
        root: str,
        batch_size: int = 64,
        eval_batch_size: int = 250,
        vocabulary_size: int = 20_000,
        max_tokens: int = 200,
        pad_to: int | None = None,
        validation: int = 2_500,
        subset: int | None = None,
        num_workers: int = 0,
    ) -> None:
        super().__init__(batch_size, eval_batch_size, num_workers)
        self.root, self.validation, self.subset = Path(root), validation, subset
        self.vocabulary_size, self.max_tokens, self.pad_to = vocabulary_size, max_tokens, pad_to
        self.tokenizer: Tokenizer | None = None

    def setup(self, stage: str) -> None:
        """Read all reviews and make the vocabulary."""
        if self.tokenizer is not None:
            return
        texts, labels = self._read("train")
        order = fixed_order(len(texts))
        held_out, kept = order[: self.validation], order[self.validation :][: self.subset]
        train_texts = [texts[number] for number in kept]
        self.tokenizer = Tokenizer.from_texts(train_texts, self.vocabulary_size, self.max_tokens)
        self.train = self._dataset(train_texts, labels[kept])
        self.val = self._dataset([texts[number] for number in held_out], labels[held_out])
        texts, labels = self._read("test")
        order = fixed_order(len(texts))
        self.test = self._dataset([texts[number] for number in order], labels[order])

    def input_metadata(self) -> dict[str, Any]:
        """What a model that was trained on these batches takes, for its weights file."""
        return {"kind": "text", "max_tokens": self.max_tokens, "pad_to": self.pad_to}

    def _dataset(self, texts: Sequence[str], labels: Tensor) -> Reviews | Rows:
        assert self.tokenizer is not None
        sequences = [torch.tensor(self.tokenizer.encode(text)) for text in texts]
        if self.pad_to is None:
            return Reviews(sequences, labels)
        cut = [sequence[-self.pad_to :] for sequence in sequences]
        return Rows(torch.stack([F.pad(sequence, (self.pad_to - len(sequence), 0)) for sequence in cut]), labels)

    def _read(self, part: str) -> tuple[list[str], Tensor]:
        texts: list[str] = []
        labels: list[int] = []
        for label, name in enumerate(("neg", "pos")):
            paths = sorted((self.root / part / name).glob("*.txt"))
            if not paths:
                raise FileNotFoundError(
                    f"The reviews must be in {str(self.root)!r}, as {part}/{name}/*.txt and so on, and are not; unpack "
                    f"aclImdb_v1.tar.gz of https://ai.stanford.edu/~amaas/data/sentiment and name its folder aclImdb."
                )
            texts += [path.read_text(encoding="utf-8") for path in paths]
            labels += [label] * len(paths)
        return texts, torch.tensor(labels)
