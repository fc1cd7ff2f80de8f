"""index.json: which block of which tensor lies where in a folder of safetensors files.

    {"format", "version", "files": {file: {"bytes"}}, "tensors": {name: {"dtype", "shape", "chunks": [...]}}}

A chunk is a block: its offsets in the tensor, its shape, and the file and entry that hold it. The index is read as something
that anyone may have written: what makes no sense is refused, and nothing in it can name a file outside its folder.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from titan.checkpoint.manifest import CheckpointError, is_plain_name, read_format

FORMAT = "titan-tensors"
VERSION = 1
INDEX = "index.json"

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""The names that safetensors gives the dtypes which can be saved."""
NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Chunk:
    """A block of a tensor: where it lies in the tensor, and in which entry of which file."""

    offsets: tuple[int, ...]
    shape: tuple[int, ...]
    file: str
    key: str


@dataclass(frozen=True)
class Entry:
    """A tensor in the folder. Its chunks, by their offsets, cover it."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    chunks: dict[tuple[int, ...], Chunk]


@dataclass(frozen=True)
class Index:
    """What index.json says: tensors by name, and the size of each file in bytes."""

    tensors: dict[str, Entry]
    files: dict[str, int]


def tensor_names(folder: Path) -> set[str]:
    """The names of the tensors in a folder."""
    return set(read_index(folder).tensors)


def read_index(folder: Path) -> Index:
    """What is in a folder. CheckpointError where its index is missing, of another version, or makes no sense."""
    path = folder / INDEX
    raw = read_format(path, FORMAT, VERSION)
    try:
        files = {name: _whole(entry["bytes"]) for name, entry in raw["files"].items()}
        if not all(map(is_plain_name, files)):
            raise ValueError(f"files {sorted(files)!r} are not all plain names in this folder")
        return Index({name: _entry(name, entry, files) for name, entry in raw["tensors"].items()}, files)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        said = error if type(error) is ValueError else f"{type(error).__name__}: {error}"
        raise CheckpointError(f"{path}: {said}; do not trust this folder, use another checkpoint") from error


def _entry(name: str, raw: dict[str, Any], files: dict[str, int]) -> Entry:
    dtype, shape = DTYPES[raw["dtype"]], _wholes(raw["shape"])
    found = [Chunk(_wholes(c["offsets"]), _wholes(c["shape"]), c["file"], c["key"]) for c in raw["chunks"]]
    for chunk in found:
        if any(at + n > size for at, n, size in zip(chunk.offsets, chunk.shape, shape, strict=True)):
            raise ValueError(f"tensor {name!r}: {chunk.shape} at {chunk.offsets} is outside its shape {shape}")
        if chunk.file not in files or not isinstance(chunk.key, str):
            raise ValueError(f"tensor {name!r}: {chunk.key!r} in {chunk.file!r} is no entry in one of the folder's files")
    chunks = {chunk.offsets: chunk for chunk in found}
    held, numel = sum(math.prod(chunk.shape) for chunk in chunks.values()), math.prod(shape)
    if held != numel:
        raise ValueError(f"tensor {name!r}: its chunks hold {held} elements, its shape {shape} has {numel}")
    if overlap := _overlap(chunks.values()):  # as many elements as there are, none twice: so none is missing
        raise ValueError(f"tensor {name!r}: its chunks at {overlap[0]} and {overlap[1]} overlap")
    return Entry(dtype, shape, chunks)


def _overlap(chunks: Iterable[Chunk]) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """Where two chunks begin that have elements in common; None if no two have."""
    passing: list[Chunk] = []  # those that reach beyond the row at which the next one begins
    for chunk in sorted((c for c in chunks if c.shape and 0 not in c.shape), key=lambda c: c.offsets):
        passing = [other for other in passing if other.offsets[0] + other.shape[0] > chunk.offsets[0]]
        for other in passing:
            ends = zip(chunk.offsets, chunk.shape, other.offsets, other.shape, strict=True)
            if all(at < there + n_there and there < at + n for at, n, there, n_there in ends):
                return other.offsets, chunk.offsets
        passing.append(chunk)
    return None


def _whole(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(f"{value!r} is not a whole number, 0 or more")
    return value


def _wholes(values: list[Any]) -> tuple[int, ...]:
    return tuple(map(_whole, values))
