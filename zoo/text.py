"""From a text to numbers of words."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from os import PathLike
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

PADDING, UNKNOWN = 0, 1
_BREAK = re.compile(r"<br\s*/?>", re.IGNORECASE)
_TOKEN = re.compile(r"[^\W_]+(?:'[^\W_]+)?|[!?]", re.UNICODE)


def words(text: str) -> list[str]:
    """The words of a text in lower case, and its exclamation and question marks; line breaks of HTML are left out.

    Example:
        >>> words("It's GREAT!<br />See it.")
        ["it's", 'great', '!', 'see', 'it']
    """
    return _TOKEN.findall(_BREAK.sub(" ", text).lower())


class Tokenizer:
    """Numbers of the words of a text: 0 pads, 1 is any word that is not in the vocabulary, 2 the most frequent one.

    Args:
        vocabulary: Words, by falling frequency.
        max_tokens: Keep only the last so many words of a text. Default None: all.

    Example:
        >>> tokenizer = Tokenizer(["a", "film"])
        >>> tokenizer(["A good film", "film"])
        (tensor([[2, 1, 3],
                [3, 0, 0]]), tensor([3, 1]))
    """

    def __init__(self, vocabulary: Sequence[str], max_tokens: int | None = None) -> None:
        self.vocabulary = list(vocabulary)
        self.max_tokens = max_tokens
        self._number = {word: number for number, word in enumerate(self.vocabulary, start=UNKNOWN + 1)}

    @classmethod
    def from_texts(cls, texts: Iterable[str], size: int, max_tokens: int | None = None) -> Tokenizer:
        """A vocabulary of the most frequent words; equally frequent ones by their spelling.

        Args:
            texts: Training texts.
            size: Numbers to use, with those for padding and for unknown words.
            max_tokens: As of the class.
        """
        counts = Counter(word for text in texts for word in words(text))
        ordered = sorted(counts, key=lambda word: (-counts[word], word))
        return cls(ordered[: size - 2], max_tokens)

    @classmethod
    def from_file(cls, path: str | PathLike[str], max_tokens: int | None = None) -> Tokenizer:
        """The vocabulary of a file that `save` wrote."""
        return cls.from_bytes(Path(path).read_bytes(), max_tokens)

    def save(self, path: str | PathLike[str]) -> None:
        """Write the vocabulary, a word a line, the most frequent one first."""
        Path(path).write_bytes(self.to_bytes())

    @classmethod
    def from_bytes(cls, content: bytes, max_tokens: int | None = None) -> Tokenizer:
        """The vocabulary of such a file's content."""
        return cls(content.decode("utf-8").split("\n"), max_tokens)

    def to_bytes(self) -> bytes:
        """The content of the file that `save` writes."""
        return "\n".join(self.vocabulary).encode("utf-8")

    def __len__(self) -> int:
        """How many numbers there are, with those for padding and for unknown words."""
        return len(self.vocabulary) + 2

    def encode(self, text: str) -> list[int]:
        """The numbers of one text's words; a text without words is one unknown word."""
        numbers = [self._number.get(word, UNKNOWN) for word in words(text)] or [UNKNOWN]
        return numbers if self.max_tokens is None else numbers[-self.max_tokens :]

    def __call__(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Tokens (N, longest length), padded behind with 0, and lengths (N,)."""
        return pad([torch.tensor(self.encode(text)) for text in texts])


def pad(sequences: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Sequences of tokens as (N, longest length), padded behind with 0, and their lengths (N,)."""
    lengths = torch.tensor([len(sequence) for sequence in sequences])
    return pad_sequence(list(sequences), batch_first=True, padding_value=PADDING), lengths
