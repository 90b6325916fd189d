"""Words, vocabularies and padding."""

from __future__ import annotations

from pathlib import Path

import torch

from zoo.text import Tokenizer, words


def test_words() -> None:
    assert words("It's GREAT!<br /><br/>Isn't_it? 10/10 Café") == [
        *("it's", "great", "!", "isn't", "it", "?", "10", "10", "café")
    ]


def test_numbers_go_by_frequency_then_spelling(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_texts(["b b a a c d", "b"], 5)
    assert tokenizer.vocabulary == ["b", "a", "c"]
    assert len(tokenizer) == 5
    tokens, lengths = tokenizer(["b a unknown", "", "c"])
    assert tokens.tolist() == [[2, 3, 1], [1, 0, 0], [4, 0, 0]]
    assert lengths.tolist() == [3, 1, 1]
    assert tokens.dtype == torch.int64
    tokenizer.save(tmp_path / "words.txt")
    again = Tokenizer.from_file(tmp_path / "words.txt", max_tokens=2)
    assert again.vocabulary == tokenizer.vocabulary
    assert again.encode("b a c") == [3, 4]  # the last two
