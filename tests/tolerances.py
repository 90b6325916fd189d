"""How far a result may be from its reference, by dtype: one table, each row with its reason."""

from __future__ import annotations

import numpy as np
import torch

TOLERANCES = {
    # Eps 2e-16; the sums here have at most some thousand terms and their order is all that differs.
    torch.float64: {"rtol": 1e-12, "atol": 1e-12},
    # The promise of parity with the authors' layer: eps 1e-7, and 1 / sqrt(var + 1e-3) amplifies by up to 32.
    torch.float32: {"rtol": 1e-5, "atol": 1e-5},
    # Computed in float32 and rounded once: half a unit in the last of 11 bits is 5e-4 of the value.
    torch.float16: {"rtol": 1e-3, "atol": 1e-3},
    # Likewise with 8 bits: 4e-3 of the value.
    torch.bfloat16: {"rtol": 8e-3, "atol": 8e-3},
}

# Gradients with respect to weight and bias are sums over samples and positions, whose terms were rounded to x's dtype.
SUMMED = {dtype: {name: 10 * value for name, value in row.items()} for dtype, row in TOLERANCES.items()}


def assert_close(actual: object, expected: object, dtype: torch.dtype | None = None, table: dict = TOLERANCES) -> None:
    """Compare values by the table's row for ``dtype``, default actual's; NaN equals nothing, shapes must agree."""
    actual, expected = (torch.from_numpy(v) if isinstance(v, np.ndarray) else v for v in (actual, expected))
    row = table[dtype or actual.dtype]
    torch.testing.assert_close(actual.detach(), expected.detach(), check_dtype=False, check_stride=False, **row)
