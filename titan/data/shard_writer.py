"""Writing token shards, whose format `titan.data.shards` describes, with memory for a part of a document at a time."""

from __future__ import annotations

import hashlib
import os
from array import array
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from titan.data.shards import MAGIC, PAGE, Header, dump, token_dtype
from titan.files import fsync, temporary_name


@dataclass(frozen=True)
class Place:
    """How far a shard is written, to come back to."""

    at: int
    digest: Any
    tokens: int
    bytes: int
    bits: int
    loose: np.ndarray


class ShardWriter:
    """One shard, written document by document, each in one part or several.

    The file appears under its name, whole and on disk, with `finish`; leaving the `with` before that leaves nothing. A shard
    without a document is none: `finish` then makes no file.
    """

    def __init__(self, path: Path, *, vocab_size: int, tokenizer: str, masked: bool = False) -> None:
        """tokenizer: its fingerprint. masked: `add` says of each token whether it counts."""
        self.path, self.vocab_size, self.tokenizer, self.masked = path, vocab_size, tokenizer, masked
        self._dtype = np.dtype(token_dtype(vocab_size)).newbyteorder("<")
        self._temporary = temporary_name(path)
        self._file = self._temporary.open("wb")
        self._file.write(bytes(PAGE))
        self._digest, self._ends, self.tokens, self.bytes = hashlib.sha256(), array("Q"), 0, 0
        self._bits, self._loose = bytearray(), np.zeros(0, dtype=bool)  # of the mask; those that do not fill a byte yet

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self._file.close()  # which may want to write what a full disk did not take
        finally:
            self._temporary.unlink(missing_ok=True)

    @property
    def documents(self) -> int:
        return len(self._ends)

    def add(self, ids: np.ndarray, size: int, counted: np.ndarray | None = None) -> None:
        """A part of a document: integers [tokens], the UTF-8 bytes of its text, bool [tokens] where the shard is masked.

        ValueError for a token outside the vocabulary.
        """
        if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < self.vocab_size:
            raise ValueError(f"{self.path}: document {self.documents} has a token outside 0..{self.vocab_size - 1}")
        data = ids.astype(self._dtype).tobytes()
        self._digest.update(data)
        self._file.write(data)
        self.tokens, self.bytes = self.tokens + len(ids), self.bytes + size
        if self.masked:
            bits = np.concatenate([self._loose, np.ones(len(ids), dtype=bool) if counted is None else counted])
            whole = len(bits) // 8 * 8
            self._bits += np.packbits(bits[:whole], bitorder="little").tobytes()
            self._loose = bits[whole:]

    def end_document(self) -> None:
        """The parts since the last end were a document. ValueError where there was no token."""
        if self.tokens == (self._ends[-1] if self._ends else 0):
            raise ValueError(f"{self.path}: document {self.documents} is empty")
        self._ends.append(self.tokens)

    def place(self) -> Place:
        """Where `back_to` leads, if a document turns out to be none."""
        self._file.flush()
        return Place(self._file.tell(), self._digest.copy(), self.tokens, self.bytes, len(self._bits), self._loose)

    def back_to(self, place: Place) -> None:
        """Forget what was added since."""
        self._file.seek(place.at)
        self._file.truncate()
        self._digest, self.tokens, self.bytes = place.digest.copy(), place.tokens, place.bytes
        del self._bits[place.bits :]
        self._loose = place.loose

    def finish(self) -> Header | None:
        """Put the shard in its place; its header, or None where it has no document. OSError where it cannot be written."""
        if not self._ends:
            return None
        self._section(b"", digest=False)
        if self.masked:
            self._section(bytes(self._bits) + np.packbits(self._loose, bitorder="little").tobytes())
        self._section(np.frombuffer(self._ends, dtype=np.uint64).astype("<u8").tobytes())
        version = 2 if self.masked else 1
        header = Header(version, self._dtype.name, self.tokens, self.documents, self.bytes, self.vocab_size, self.tokenizer)
        self._digest.update(dump(header))
        header = replace(header, sha256=self._digest.hexdigest())
        text = dump(header)
        if len(text) > PAGE - 16:
            raise ValueError(f"{self.path}: the tokenizer's fingerprint is too long for a shard's header")
        self._file.seek(0)
        self._file.write(MAGIC + len(text).to_bytes(8, "little") + text)
        self._file.flush()
        os.fsync(self._file.fileno())
        self._temporary.replace(self.path)
        fsync(self.path.parent)
        return header

    def _section(self, data: bytes, digest: bool = True) -> None:
        """What stands at a multiple of 8."""
        if digest:
            self._digest.update(data)
        self._file.write(data)
        self._file.write(bytes(-self._file.tell() % 8))


def write_shard(path: Path, documents: Iterable[tuple[np.ndarray, int]], *, vocab_size: int, tokenizer: str) -> Header:
    """Write a shard of whole documents: token ids (integers [tokens], with the token that ends the document), UTF-8 bytes.

    Raises ValueError for an empty document, a token outside the vocabulary, or no document at all.
    """
    with ShardWriter(path, vocab_size=vocab_size, tokenizer=tokenizer) as writer:
        for ids, size in documents:
            writer.add(ids, size)
            writer.end_document()
        header = writer.finish()
    if header is None:
        raise ValueError(f"{path}: no documents to write")
    return header
