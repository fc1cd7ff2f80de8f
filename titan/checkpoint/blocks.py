"""Tensors in safetensors files, read and written a run of rows at a time, so that memory holds one run and never the model.

A safetensors file is eight bytes of length, a JSON header {name: dtype, shape, data_offsets}, and the tensors' bytes in
row-major order, so that a run of rows is one stretch of the file. It is read with plain reads: a mapped file's pages count as
this process's memory for as long as the mapping lives. Source: github.com/huggingface/safetensors, "Format".

As in memory, a tensor on disk has strides, so that a part of its rows, its transpose and several joined by rows are tensors on
disk, too, and nothing is copied to make them.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from titan.checkpoint.index import DTYPES, INDEX, NAMES, read_index
from titan.checkpoint.manifest import CheckpointError, Written

BLOCK_BYTES = 64 << 20
MAX_HEADER_BYTES = 100_000_000  # what the safetensors library takes

Kind = tuple[torch.dtype, tuple[int, ...]]


@dataclass(frozen=True)
class Piece:
    """A block of a tensor in one file: where it lies in the tensor, its shape, its first byte, and its strides in elements."""

    offsets: tuple[int, ...]
    shape: tuple[int, ...]
    path: Path
    position: int
    strides: tuple[int, ...]


@dataclass(frozen=True)
class Stored:
    """A tensor that lies in files. Its pieces cover it."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]

    def blocks(self) -> Iterator[Tensor]:
        """The tensor from its first row to its last, in runs of rows of at most `BLOCK_BYTES` (one row at least)."""
        row = math.prod(self.shape[1:]) * self.dtype.itemsize
        step = max(1, BLOCK_BYTES // max(1, row))
        for begin in range(0, self.shape[0], step):
            yield self.rows(begin, min(begin + step, self.shape[0]))

    def rows(self, begin: int, end: int) -> Tensor:
        """Rows begin .. end as a new CPU tensor. CheckpointError where a file cannot be read."""
        out = torch.empty((end - begin, *self.shape[1:]), dtype=self.dtype)
        for piece in self.pieces:
            first = piece.offsets[0]
            low, high = max(begin, first), min(end, first + piece.shape[0])
            if low < high:
                columns = (slice(at, at + n) for at, n in zip(piece.offsets[1:], piece.shape[1:], strict=True))
                _read(piece, low - first, out[(slice(low - begin, high - begin), *columns)])
        return out

    def cut(self, begin: int, end: int) -> Stored:
        """Rows begin .. end as a tensor on disk."""
        pieces = []
        for piece in self.pieces:
            first = piece.offsets[0]
            low, high = max(begin, first), min(end, first + piece.shape[0])
            if low < high:
                position = piece.position + (low - first) * piece.strides[0] * self.dtype.itemsize
                offsets, shape = (low - begin, *piece.offsets[1:]), (high - low, *piece.shape[1:])
                pieces.append(replace(piece, offsets=offsets, shape=shape, position=position))
        return Stored(self.dtype, (end - begin, *self.shape[1:]), tuple(pieces))

    def transposed(self) -> Stored:
        """A matrix's rows as columns."""
        turned = (
            replace(piece, offsets=piece.offsets[::-1], shape=piece.shape[::-1], strides=piece.strides[::-1])
            for piece in self.pieces
        )
        return Stored(self.dtype, self.shape[::-1], tuple(turned))


def joined(parts: Sequence[Stored]) -> Stored:
    """Tensors one below the other, as one tensor on disk. CheckpointError where their dtypes differ."""
    kinds = {part.dtype for part in parts}
    if len(kinds) > 1:
        raise CheckpointError(f"{parts[0].pieces[0].path}: tensors that belong together are {kinds}; make them one dtype")
    pieces: list[Piece] = []
    row = 0
    for part in parts:
        pieces += (replace(piece, offsets=(piece.offsets[0] + row, *piece.offsets[1:])) for piece in part.pieces)
        row += part.shape[0]
    return Stored(parts[0].dtype, (row, *parts[0].shape[1:]), tuple(pieces))


def row_major(shape: Sequence[int]) -> tuple[int, ...]:
    """Strides, in elements, of an array in row-major order."""
    return tuple(math.prod(shape[dim + 1 :]) for dim in range(len(shape)))


def _read(piece: Piece, begin: int, out: Tensor) -> None:
    """Fill `out` with as many rows of a piece, from row `begin` on: a read for each run of elements that lie together."""
    order = sorted(range(out.dim()), key=lambda dim: -piece.strides[dim])  # as they lie in the file
    there = out.permute(order)
    straight = there if there.is_contiguous() else torch.empty_like(there, memory_format=torch.contiguous_format)
    run, outer = 1, out.dim()
    while outer > 0 and (there.shape[outer - 1] == 1 or piece.strides[order[outer - 1]] == run):
        outer -= 1
        run *= there.shape[outer]
    memory, size = _bytes(straight), run * out.dtype.itemsize
    try:
        with open(piece.path, "rb") as file:
            for number, index in enumerate(product(*(range(n) for n in there.shape[:outer]))):
                at = sum(i * piece.strides[dim] for i, dim in zip(index, order, strict=False)) + begin * piece.strides[0]
                file.seek(piece.position + at * out.dtype.itemsize)
                if file.readinto(memory[number * size : (number + 1) * size]) != size:
                    raise CheckpointError(f"{piece.path}: ends in the middle of a tensor; it was cut short")
    except OSError as error:
        raise CheckpointError(f"{piece.path}: cannot be read ({error})") from error
    if straight is not there:
        there.copy_(straight)


# What is in files


def open_file(path: Path) -> dict[str, Stored]:
    """The tensors of a safetensors file. CheckpointError where its header makes no sense, or is not about this file."""
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
            if not 0 < length <= min(size - 8, MAX_HEADER_BYTES):
                raise ValueError(f"a header of {length} bytes in a file of {size}")
            header = json.loads(file.read(length), object_pairs_hook=_without_repeats)
        header.pop("__metadata__", None)
        return {name: _stored(name, entry, path, 8 + length, size) for name, entry in header.items()}
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error})") from error
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        said = error if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
        raise CheckpointError(f"{path}: not a whole safetensors file ({said}); fetch it again") from error


def _stored(name: str, entry: dict[str, Any], path: Path, start: int, size: int) -> Stored:
    if entry["dtype"] not in DTYPES:
        raise ValueError(f"{name!r} is {entry['dtype']!r}, which is none of {', '.join(DTYPES)}")
    dtype, shape, (begin, end) = DTYPES[entry["dtype"]], tuple(entry["shape"]), entry["data_offsets"]
    if not all(type(n) is int and n >= 0 for n in (*shape, begin, end)):
        raise ValueError(f"{name!r} has the shape {shape} at {begin, end}")
    if end - begin != math.prod(shape) * dtype.itemsize or start + end > size:
        raise ValueError(f"{name!r}, {entry['dtype']} {shape}, is not at {begin, end} of {size - start} bytes")
    return Stored(dtype, shape, (Piece((0,) * len(shape), shape, path, start + begin, row_major(shape)),))


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("the header names something twice")
    return found


def open_folder(folder: Path) -> dict[str, Stored]:
    """The tensors of a folder with an index.json, whatever sharding they were saved under."""
    index = read_index(folder)
    files = {name: open_file(folder / name) for name in index.files}
    tensors = {}
    for name, entry in index.tensors.items():
        pieces = []
        for chunk in entry.chunks.values():
            held = files[chunk.file].get(chunk.key)
            if held is None or (held.dtype, held.shape) != (entry.dtype, chunk.shape):
                what = f"{NAMES[entry.dtype]} {chunk.shape}"
                raise CheckpointError(f"{folder / chunk.file}: {chunk.key} is not the {what} of {INDEX}; do not trust it")
            pieces.append(replace(held.pieces[0], offsets=chunk.offsets))
        tensors[name] = Stored(entry.dtype, entry.shape, tuple(pieces))
    return tensors


# Writing


def write_blocks(
    path: Path,
    entries: Mapping[str, Kind],
    blocks: Callable[[str], Iterable[Tensor]],
    metadata: dict[str, str] | None = None,
) -> Written:
    """Write a new safetensors file, fsynced, and return its size and checksum.

    `blocks(key)` gives one tensor as runs of its rows, in order; each is gone before the next is asked for.
    CheckpointError where the file cannot be written or is there already, or the blocks are not what `entries` promised.
    """
    order = sorted(entries, key=lambda key: (-entries[key][0].itemsize, key))  # wide dtypes first: every entry is aligned
    header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    end = 0
    for key in order:
        dtype, shape = entries[key]
        begin, end = end, end + math.prod(shape) * dtype.itemsize
        header[key] = {"dtype": NAMES[dtype], "shape": shape, "data_offsets": (begin, end)}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    try:
        with open(path, "xb") as file:
            out = _Digesting(file)
            out.write(memoryview(len(text).to_bytes(8, "little") + text))
            for key in order:
                _write(out, blocks(key), entries[key], f"{path}: {key}")
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be written ({error})") from error
    return Written(8 + len(text) + end, out.digest.hexdigest())


class _Digesting:
    """Writes to a file, and adds up a checksum of what it was given."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.digest = file, hashlib.sha256()

    def write(self, data: memoryview) -> int:
        self.digest.update(data)
        return self.file.write(data)


def _write(file: _Digesting, blocks: Iterable[Tensor], planned: Kind, what: str) -> None:
    dtype, shape = planned
    written = 0
    for block in blocks:
        if block.dtype != dtype or block.shape[1:] != shape[1:]:
            raise CheckpointError(f"{what}: planned as {planned}, a part is {(block.dtype, tuple(block.shape))}")
        written += file.write(_bytes(block.detach().cpu().contiguous()))
        del block
    if written != math.prod(shape) * dtype.itemsize:
        raise CheckpointError(f"{what}: planned as {planned}, its parts are {written} bytes")


def _bytes(tensor: Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor, row-major. Through bytes, since NumPy has no bfloat16."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data
