"""Large embeddings in a few bits a number: what a weights file holds in their place."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
import torch
from torch import Tensor

CODES, SCALE = ".codes", ".scale"


def pack_rows(tensors: Mapping[str, Tensor], names: Iterable[str], bits: int) -> dict[str, Tensor]:
    """Tensors of which some, matrices, are replaced by codes of their rows and a scale for each.

        x ~ scale * (code - (2^bits - 1) / 2),        scale = 2 max|x| / (2^bits - 1) over the row

    Codes lie in planes of one bit each: uint8, (bits, rows, columns / 8), the first plane of their lowest bits.

    Args:
        tensors: By name.
        names: Of matrices (rows, columns); columns a multiple of 8.
        bits: 1 to 8.

    Returns:
        ``tensors``, with ``NAME.codes`` and ``NAME.scale``, float32 (rows, 1), for each of the names.

    Raises:
        ValueError: If bits or a shape is none of these.

    Example:
        >>> stored = pack_rows({"embedding.weight": torch.randn(20, 64)}, ["embedding.weight"], bits=6)
        >>> {name: tuple(value.shape) for name, value in stored.items()}
        {'embedding.weight.codes': (6, 20, 8), 'embedding.weight.scale': (20, 1)}
    """
    if not 1 <= bits <= 8:
        raise ValueError(f"A number must be stored in 1 to 8 bits, got {bits!r}; 6 keep most embeddings' accuracy.")
    packed = dict(tensors)
    for name in names:
        rows = packed.pop(name)
        if rows.ndim != 2 or rows.shape[1] % 8 or not rows.isfinite().all():
            raise ValueError(
                f"Rows in few bits must be a matrix's of finite numbers, with a multiple of 8 columns, got {name!r} of "
                f"shape {tuple(rows.shape)}; store it in float16."
            )
        levels = 2**bits - 1
        scale = rows.float().abs().amax(1, keepdim=True) * (2 / levels)
        # A row of zeros has no scale: any code stands for 0 there.
        codes = (rows.float() / scale.clamp_min(torch.finfo(torch.float32).tiny) + levels / 2).round().clamp(0, levels)
        numbers = codes.to(torch.uint8).numpy()
        planes = [np.packbits(numbers >> bit & 1, axis=1) for bit in range(bits)]
        packed |= {name + CODES: torch.from_numpy(np.stack(planes)), name + SCALE: scale}
    return packed


def unpack_rows(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The matrices that `pack_rows` packed, in float32, and other tensors as they are."""
    packed = [name.removesuffix(CODES) for name in tensors if name.endswith(CODES)]
    parts = {name + suffix for name in packed for suffix in (CODES, SCALE)}
    unpacked = {name: value for name, value in tensors.items() if name not in parts}
    for name in packed:
        planes, scale = tensors[name + CODES].numpy(), tensors[name + SCALE]
        codes = np.zeros((planes.shape[1], 8 * planes.shape[2]), np.uint8)
        for bit, plane in enumerate(planes):
            codes |= np.unpackbits(plane, axis=1) << bit
        unpacked[name] = (torch.from_numpy(codes).float() - (2 ** len(planes) - 1) / 2) * scale
    return unpacked
