"""Embeddings in a few bits a number."""

from __future__ import annotations

import pytest
import torch

from zoo._few_bits import pack_rows, unpack_rows


@pytest.mark.parametrize("bits", range(1, 9))
def test_a_number_is_off_by_half_a_step_at_most(bits: int) -> None:
    rows = torch.randn(50, 24) * torch.logspace(-3, 3, 50)[:, None]
    packed = pack_rows({"table": rows}, ["table"], bits)
    assert packed["table.codes"].shape == (bits, 50, 3)
    assert packed["table.codes"].dtype == torch.uint8
    step = 2 * rows.abs().amax(1, keepdim=True) / (2**bits - 1)
    error = (unpack_rows(packed)["table"] - rows).abs()
    assert (error <= step * 0.5001).all()
    assert (error.amax(1) > step.squeeze(1) * 0.25).all()


def test_what_was_packed_is_packed_the_same_again() -> None:
    packed = pack_rows({"table": torch.randn(9, 16)}, ["table"], 4)
    again = pack_rows(unpack_rows(packed), ["table"], 4)
    assert torch.equal(again["table.codes"], packed["table.codes"])
    torch.testing.assert_close(again["table.scale"], packed["table.scale"])


def test_values_by_hand() -> None:
    packed = pack_rows({"table": torch.tensor([[3.0, -3, 1, -1, 3, 3, 3, 3]])}, ["table"], 2)
    assert packed["table.scale"].tolist() == [[2.0]]
    # Codes 3, 0, 2, 1, 3, 3, 3, 3: their lowest bits, then their highest.
    assert packed["table.codes"].tolist() == [[[0b10011111]], [[0b10101111]]]
    assert unpack_rows(packed)["table"].tolist() == [[3.0, -3, 1, -1, 3, 3, 3, 3]]


def test_rows_of_zeros_and_other_tensors() -> None:
    other = torch.arange(3)
    unpacked = unpack_rows(pack_rows({"table": torch.zeros(2, 8), "other.scale": other}, ["table"], 6))
    assert unpacked.keys() == {"table", "other.scale"}
    assert unpacked["other.scale"] is other
    assert torch.equal(unpacked["table"], torch.zeros(2, 8))


def test_errors() -> None:
    with pytest.raises(ValueError, match="1 to 8 bits, got 9"):
        pack_rows({"table": torch.ones(2, 8)}, ["table"], 9)
    with pytest.raises(ValueError, match=r"multiple of 8 columns, got 'table' of shape \(2, 7\)"):
        pack_rows({"table": torch.ones(2, 7)}, ["table"], 4)
    with pytest.raises(ValueError, match="finite numbers"):
        pack_rows({"table": torch.full((2, 8), torch.inf)}, ["table"], 4)
