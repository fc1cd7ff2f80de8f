"""What all token files of other programs have in common: they say little of themselves, so it is said here, and checked.

No such file knows which tokenizer made it, and none carries a checksum. The tokenizer is the config's word; every batch is held
against its vocabulary. The file's identity, by which a resumed run knows its data again, is taken from its size and from what
stands at a few places of it: reading all of a terabyte at each start would take an hour.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from titan.data.shards import CHUNK, ShardError

PLACES, PLACE_BYTES = 16, 4096


@dataclass(frozen=True)
class Unsaid:
    """What the config says of a file that does not say it."""

    vocab_size: int
    tokenizer: str
    """The tokenizer's fingerprint."""
    document_end: int
    """The token that ends a document."""
    dtype: str = ""
    """Of raw tokens: uint8, uint16, uint32, int32 or int64; empty: not said."""


class ForeignFile:
    """A `titan.data.shards.Shard` out of another program's file. A subclass opens it, in __init__, and finds documents."""

    format = ""
    tokens: np.ndarray
    documents: int | None = None
    bytes: int | None = None
    masked = False

    def __init__(self, path: Path, unsaid: Unsaid, *files: Path) -> None:
        """files: all that belong to it."""
        self.path, self.unsaid, self.files = path, unsaid, files
        self.vocab_size, self.tokenizer = unsaid.vocab_size, unsaid.tokenizer
        for file in files:
            if not file.is_file():
                raise self.error(f"{file.name} is missing beside it")
        self.fingerprint = fingerprint(*files)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.path, self.unsaid)

    def error(self, what: str) -> ShardError:
        return ShardError(f"{self.path}: {what} ({self.format})")

    def map(self, file: Path, dtype: str, offset: int, count: int) -> np.ndarray:
        """`count` little-endian numbers of a file, memory-mapped. ShardError where it ends before them."""
        form = np.dtype(dtype).newbyteorder("<")
        if offset + count * form.itemsize > file.stat().st_size:
            raise self.error(f"{file.name} is too short for what it should hold: it was cut short or is damaged")
        return np.memmap(file, form, "r", offset=offset, shape=(count,))

    def counted(self, start: int, end: int) -> np.ndarray:
        return np.ones(end - start, dtype=bool)

    def ends_between(self, after: int, before: int) -> np.ndarray:
        raise NotImplementedError

    def verify(self) -> None:
        """Every token against the vocabulary, and every document end."""
        last = 0
        for start in range(0, len(self.tokens), CHUNK):
            chunk = self.tokens[start : start + CHUNK]
            for extreme in (int(chunk.min()), int(chunk.max())):
                if not 0 <= extreme < self.vocab_size:
                    raise self.error(f"holds token {extreme}, outside the vocabulary of {self.vocab_size}")
            ends = self.ends_between(start, start + len(chunk) + 1)
            if not np.all(np.diff(ends.astype(np.int64), prepend=last) > 0):
                raise self.error(f"has document ends that do not rise, near token {start}")
            last = int(ends[-1]) if len(ends) else last


def fingerprint(*files: Path) -> str:
    """Hex digest of the files' sizes, and of what stands at a few places spread over each."""
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as opened:
            size = os.fstat(opened.fileno()).st_size
            digest.update(size.to_bytes(8, "little"))
            last = max(0, size - PLACE_BYTES)
            for place in sorted({last * i // (PLACES - 1) for i in range(PLACES)}):
                opened.seek(place)
                digest.update(opened.read(PLACE_BYTES))
    return digest.hexdigest()
