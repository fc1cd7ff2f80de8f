"""Cast to Float8: a tensor's numbers times a power of two by which the largest just fits, rounded to 8 bits.

    s = 2^floor(log2(largest / amax))          q(a) = round(a s)          largest: 448 (e4m3), 57,344 (e5m2)

amax is that of the whole tensor, or of each row. A product sums along its operands' last dimension, so that a layer's backward
pass needs its incoming gradient twice: as it is, with a scale for each token, and turned, with one for each output (why, and
what the scales are good for: `titan.precision.float8`). `cast_both` gives both.

The numbers have to be read twice, since no scale is known before all were seen: once for amax, once to be rounded. Single
operations would read them once more for the turned copy, and PyTorch turns 8-bit matrices slowly. Here the second reading
takes a tile of rows and columns and writes it both ways.

On a GPU these are Triton kernels (`float8_cast_triton.py`), elsewhere the lines below. They round alike, but for float32 on Ada
(sm_89), which casts it by way of float16 and cuts bits off there: one byte in some hundred is a neighbour's.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .lazily import lazily

SMALLEST = 2.0**-100
"""A tensor whose largest number is less is taken to be as large: scales stay finite, such numbers become 0."""


class Scaled(NamedTuple):
    """An operand: its numbers times a scale, rounded."""

    data: Tensor
    """e4m3 or e5m2 [rows, summed], in this order in memory."""
    unscale: Tensor
    """1 / scale, float32: of all, [], or of each row, [rows, 1]."""


def scale_for(amax: Tensor, dtype: torch.dtype) -> Tensor:
    """The largest power of two by which numbers up to `amax` may be multiplied to fit into a format. float32, amax's shape.

    Infinity gives 0 and not-a-number infinity: what is scaled by those is no number, so that a broken step is noticed.
    """
    ratio = torch.finfo(dtype).max / amax.float().clamp(min=SMALLEST)
    return (ratio.view(torch.int32) & 0x7F800000).view(torch.float32)  # the exponent's bits alone


def scaled(x: Tensor, dtype: torch.dtype, by_row: bool) -> Scaled:
    """The plain one. x: [rows, summed] in any order in memory."""
    if x.numel():
        amax = torch.linalg.vector_norm(x, torch.inf, 1, keepdim=True) if by_row else torch.linalg.vector_norm(x, torch.inf)
    else:
        amax = x.new_zeros((len(x), 1) if by_row else ())
    scale = scale_for(amax, dtype)
    return Scaled(rounded(x, scale, dtype), scale.reciprocal())


def rounded(x: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """round(x scale), row after row in memory. A power of two changes exponents alone, of which bfloat16 has as many."""
    return (x * scale.to(x.dtype)).to(dtype).contiguous()


def cast(x: Tensor, dtype: torch.dtype, by_row: bool) -> Scaled:
    """As `scaled`, one operation whatever the device."""
    return Scaled(*_cast(x, dtype, by_row, False)[:2])


def cast_both(x: Tensor, dtype: torch.dtype, by_row: bool) -> tuple[Scaled, Scaled]:
    """Of x and of x^T, [rows, columns] and [columns, rows]."""
    data, unscale, turned, turned_unscale = _cast(x, dtype, by_row, True)
    return Scaled(data, unscale), Scaled(turned, turned_unscale)


@torch.library.custom_op("titan::float8_cast", mutates_args=())
def _cast(x: Tensor, dtype: torch.dtype, by_row: bool, both: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """both: the turned one, too, which else is empty."""
    none = torch.empty(0, device=x.device)
    turned = scaled(x.t(), dtype, by_row) if both else Scaled(none, none.clone())
    return *scaled(x, dtype, by_row), *turned


@_cast.register_fake
def _(x: Tensor, dtype: torch.dtype, by_row: bool, both: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    def like(rows: int, columns: int) -> tuple[Tensor, Tensor]:
        unscale = x.new_empty((rows, 1) if by_row else (), dtype=torch.float32)
        return x.new_empty((rows, columns), dtype=dtype), unscale

    rows, columns = x.shape
    none = x.new_empty(0, dtype=torch.float32)
    return *like(rows, columns), *(like(columns, rows) if both else (none, none.clone()))


_cast.register_kernel("cuda", lazily("float8_cast_triton.cast"))
