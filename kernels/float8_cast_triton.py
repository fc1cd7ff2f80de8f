"""Casts to Float8 on GPUs (`float8_cast.py` is the lesson). A program has a tile of the matrix.

The first kernel finds the largest magnitudes, of all, of rows, of columns: tiles' results meet in an atomic maximum, which has
no order to depend on. It is taken of the numbers' bits: without the sign they order as integers do, and not-a-number is the
largest. The second one makes scales of those and writes the tile, and the tile turned.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .float8_cast import SMALLEST, scale_for

FORMATS = {torch.float8_e4m3fn: tl.float8e4nv, torch.float8_e5m2: tl.float8e5}
ROWS = COLUMNS = 64


@triton.jit
def _magnitudes(
    x, of_rows, of_columns, rows, columns, stride_row, stride_column,
    BY_ROW: tl.constexpr, BOTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    value = tl.load(x + row[:, None] * stride_row + column[None, :] * stride_column, mask=inside, other=0)
    bits = value.to(tl.float32).to(tl.int32, bitcast=True) & 0x7FFFFFFF
    if BY_ROW:
        tl.atomic_max(of_rows + row, tl.max(bits, 1), mask=row < rows)
        if BOTH:
            tl.atomic_max(of_columns + column, tl.max(bits, 0), mask=column < columns)
    else:
        tl.atomic_max(of_rows, tl.max(bits))


@triton.jit
def _scale(bits, LARGEST: tl.constexpr, SMALLEST: tl.constexpr):
    """`scale_for` of a magnitude's bits."""
    amax = bits.to(tl.float32, bitcast=True)
    ratio = tl.div_rn(tl.full(amax.shape, LARGEST, tl.float32), tl.where(amax < SMALLEST, SMALLEST, amax))
    return (ratio.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)


@triton.jit
def _inverse(scale):
    return tl.div_rn(tl.full(scale.shape, 1.0, tl.float32), scale)


@triton.jit
def _cast(
    x, of_rows, of_columns, data, unscale, turned, turned_unscale, rows, columns, stride_row, stride_column,
    FORMAT: tl.constexpr, LARGEST: tl.constexpr, SMALLEST: tl.constexpr,
    BY_ROW: tl.constexpr, BOTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    row_inside, column_inside = row < rows, column < columns
    inside = row_inside[:, None] & column_inside[None, :]
    value = tl.load(x + row[:, None] * stride_row + column[None, :] * stride_column, mask=inside, other=0).to(tl.float32)
    first_row, first_column = tl.program_id(0) == 0, tl.program_id(1) == 0
    if BY_ROW:
        scale = _scale(tl.load(of_rows + row, mask=row_inside, other=0), LARGEST, SMALLEST)
        tl.store(unscale + row, _inverse(scale), mask=row_inside & first_column)
        here = value * scale[:, None]
    else:
        scale = _scale(tl.load(of_rows), LARGEST, SMALLEST)
        tl.store(unscale, _inverse(scale), mask=first_row & first_column)
        here = value * scale
    at = row[:, None] * columns + column[None, :]
    tl.store(data + at, here.to(FORMAT).to(tl.uint8, bitcast=True), mask=inside)
    if BOTH:
        if BY_ROW:
            scale = _scale(tl.load(of_columns + column, mask=column_inside, other=0), LARGEST, SMALLEST)
            tl.store(turned_unscale + column, _inverse(scale), mask=column_inside & first_row)
            here = value * scale[None, :]
        else:
            tl.store(turned_unscale, _inverse(scale), mask=first_row & first_column)
        at = column[:, None] * rows + row[None, :]
        tl.store(turned + at, tl.trans(here.to(FORMAT).to(tl.uint8, bitcast=True)), mask=tl.trans(inside))


def cast(x: Tensor, dtype: torch.dtype, by_row: bool, both: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As titan::float8_cast."""
    rows, columns = x.shape
    of_rows = torch.zeros(rows if by_row else 1, dtype=torch.int32, device=x.device)
    of_columns = torch.zeros(columns if by_row and both else 0, dtype=torch.int32, device=x.device)
    data, turned = (x.new_empty(shape, dtype=torch.uint8) for shape in ((rows, columns), (columns, rows) if both else (0,)))
    unscale = x.new_empty((rows, 1) if by_row else (), dtype=torch.float32)
    turned_unscale = x.new_empty(0 if not both else (columns, 1) if by_row else (), dtype=torch.float32)
    if not x.numel():
        unscale, turned_unscale = (scale_for(empty.zero_(), dtype).reciprocal() for empty in (unscale, turned_unscale))
    else:
        grid = triton.cdiv(rows, ROWS), triton.cdiv(columns, COLUMNS)
        both_kernels = {"BY_ROW": by_row, "BOTH": both, "ROWS": ROWS, "COLUMNS": COLUMNS}
        _magnitudes[grid](x, of_rows, of_columns, rows, columns, *x.stride(), **both_kernels)
        _cast[grid](
            x, of_rows, of_columns, data, unscale, turned, turned_unscale, rows, columns, *x.stride(),
            FORMAT=FORMATS[dtype], LARGEST=torch.finfo(dtype).max, SMALLEST=SMALLEST, **both_kernels,
        )  # fmt: skip
    return data.view(dtype), unscale, turned.view(dtype) if both else turned.float(), turned_unscale
