"""Token shards: the file format of a tokenized dataset, and its readers; `titan.data.shard_writer` writes them.

    8 bytes      magic "titan\\0tk"
    8 bytes      length of the header, unsigned, little-endian
    header       JSON: version, dtype, tokens, documents, bytes, vocab_size, tokenizer, sha256
    zeros        up to a multiple of 4096, so that the tokens start on a page
    tokens       little-endian; uint16 where the vocabulary has 65536 ids or fewer, else uint32
    zeros        up to a multiple of 8
    counted      version 2 only: one bit a token, the first in a byte's lowest bit; then zeros up to a multiple of 8
    ends         uint64 little-endian, one a document: the position one past its last token (which ends the document)

`bytes` counts the text's UTF-8 bytes, for bits per byte; `tokenizer` is the tokenizer's fingerprint. `sha256` covers the
tokens, the counted bits, the ends and the rest of the header, in that order. A token that is not counted is read, but never
counts in a loss: in a conversation, all that the model is not to say. All sizes follow from the header, so a file that was cut
short or grew is found when it is opened; a changed bit is found by `TokenShard.verify`, which reads everything.

A dataset is a folder of `train-*.tokens` and `validation-*.tokens`. A split's files, sorted by name, are read as one long
stream of tokens through memory maps: opening costs nothing, and all processes of a node share the page cache.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

MAGIC = b"titan\0tk"
PAGE = 4096
LARGEST_HEADER = 1 << 20
CHUNK = 1 << 22


class ShardError(ValueError):
    """A token shard, or a folder of them, is not what it should be. The message names the file and what is wrong."""


class Shard(Protocol):
    """A file of tokens, as the dataset sees it. A copy sent to another process is opened there anew."""

    format: str
    """What people call it."""
    path: Path
    vocab_size: int
    tokenizer: str
    """Fingerprint of the tokenizer that made it, or is said to have."""
    fingerprint: str
    """The content's identity."""

    @property
    def tokens(self) -> np.ndarray:
        """Integers [tokens], a memory map."""

    @property
    def documents(self) -> int | None:
        """How many; None where the file does not say."""

    @property
    def bytes(self) -> int | None:
        """Of the text, in UTF-8; None where the file does not say."""

    @property
    def masked(self) -> bool:
        """Whether some tokens are not to count in the loss."""

    def counted(self, start: int, end: int) -> np.ndarray:
        """Which of the tokens [start, end) count, bool."""

    def ends_between(self, after: int, before: int) -> np.ndarray:
        """Where documents end, of the places after < end < before: rising integers. ShardError where the file is damaged."""

    def verify(self) -> None:
        """Read everything. ShardError at the first thing that is wrong."""


@dataclass(frozen=True)
class Header:
    """What a shard's header says."""

    version: int
    dtype: str
    tokens: int
    documents: int
    bytes: int
    vocab_size: int
    tokenizer: str
    sha256: str = ""

    @property
    def token_bytes(self) -> int:
        return self.tokens * np.dtype(self.dtype).itemsize

    @property
    def counted_bytes(self) -> int:
        return -(-self.tokens // 8) if self.version == 2 else 0


def dump(header: Header) -> bytes:
    """The one way to write a header as JSON."""
    return json.dumps(dataclasses.asdict(header), sort_keys=True, separators=(",", ":")).encode()


def token_dtype(vocab_size: int) -> str:
    """Name of the dtype in which a shard stores the ids of a vocabulary."""
    return "uint16" if vocab_size <= 1 << 16 else "uint32"


class TokenShard:
    """One shard, memory-mapped: `.header`, `.tokens` (uint16 or uint32 [tokens]), `.ends` (uint64 [documents]).

    Opening checks everything but the contents and raises ShardError. A copy sent to another process is opened there anew.
    """

    format = "titan's token shards"

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        size = self.path.stat().st_size
        with self.path.open("rb") as file:
            preamble = file.read(16)
            length = min(int.from_bytes(preamble[8:], "little"), LARGEST_HEADER)
            self.header, start = self._read_header(preamble, file.read(length + PAGE))
        counted_at = _aligned(start + self.header.token_bytes)
        ends_at = _aligned(counted_at + self.header.counted_bytes)
        expected = ends_at + 8 * self.header.documents
        if size != expected:
            raise self._error(f"holds {size} bytes where its header asks for {expected}: it was cut short or is damaged")
        dtype = np.dtype(self.header.dtype).newbyteorder("<")
        self.tokens = np.memmap(self.path, dtype, "r", offset=start, shape=(self.header.tokens,))
        self.ends = np.memmap(self.path, np.dtype("<u8"), "r", offset=ends_at, shape=(self.header.documents,))
        self.masked = self.header.version == 2
        self._bits: np.ndarray | None = None
        if self.masked:
            self._bits = np.memmap(self.path, np.uint8, "r", offset=counted_at, shape=(self.header.counted_bytes,))
        self.vocab_size, self.tokenizer, self.fingerprint = self.header.vocab_size, self.header.tokenizer, self.header.sha256
        self.documents, self.bytes = self.header.documents, self.header.bytes

    def __reduce__(self) -> tuple[Any, ...]:
        return TokenShard, (self.path,)

    def _error(self, what: str) -> ShardError:
        return ShardError(f"{self.path}: {what}")

    def _read_header(self, preamble: bytes, rest: bytes) -> tuple[Header, int]:
        """The header and where the tokens start, from the file's first 16 bytes and those that follow."""
        length = int.from_bytes(preamble[8:], "little")
        if preamble[:8] != MAGIC:
            raise self._error("is not a token shard: it does not start with the format's magic bytes")
        if not 0 < length <= min(len(rest), LARGEST_HEADER):
            raise self._error(f"has a header of {length} bytes, which cannot be: it was cut short or is damaged")
        try:
            fields = json.loads(rest[:length])
        except (ValueError, RecursionError) as error:
            raise self._error(f"has a header that is not JSON ({error}): it is damaged") from error
        types = {field.name: {"int": int, "str": str}[str(field.type)] for field in dataclasses.fields(Header)}
        if not isinstance(fields, dict) or {name: type(value) for name, value in fields.items()} != types:
            raise self._error(f"has a header without exactly the fields {', '.join(types)} in their types")
        header = Header(**fields)
        if header.version not in (1, 2):
            raise self._error(f"has format version {header.version}; this titan reads versions 1 and 2")
        if not 0 < header.documents <= header.tokens or header.bytes < 0 or header.vocab_size <= 0:
            raise self._error("has a header with impossible counts: it is damaged")
        if header.dtype != token_dtype(header.vocab_size):
            raise self._error(f"has dtype {header.dtype!r}, which does not go with {header.vocab_size} token ids")
        padding = -(16 + length) % PAGE
        if any(rest[length : length + padding]):
            raise self._error("has something other than zeros after its header: it is damaged")
        return header, 16 + length + padding

    def verify(self) -> None:
        """Read everything and compare it with the header. Raises ShardError at the first thing that is wrong."""
        digest, largest = hashlib.sha256(), 0
        for chunk in self.chunks():
            digest.update(chunk.data)
            largest = max(largest, int(chunk.max()))
        if self._bits is not None:
            digest.update(self._bits.data)
        digest.update(self.ends.data)
        digest.update(dump(dataclasses.replace(self.header, sha256="")))
        if digest.hexdigest() != self.header.sha256:
            raise self._error("does not match its checksum: it is damaged; prepare or copy it again")
        if largest >= self.header.vocab_size:
            raise self._error(f"holds token {largest}, outside its vocabulary of {self.header.vocab_size}")
        if self.ends[0] == 0 or self.ends[-1] != self.header.tokens or not np.all(self.ends[1:] > self.ends[:-1]):
            raise self._error("has document ends that do not rise to its number of tokens")
        sizes = [self.header.token_bytes, self.header.counted_bytes]
        at = self.ends.offset - sum(_aligned(size) for size in sizes)
        with self.path.open("rb") as file:
            for size in sizes:
                file.seek(at + size)
                at += _aligned(size)
                if any(file.read(at - file.tell())):
                    raise self._error("has something other than zeros after its tokens: it is damaged")
        if self._bits is not None and self.header.tokens % 8 and int(self._bits[-1]) >> self.header.tokens % 8:
            raise self._error("marks tokens behind its last one: it is damaged")

    def chunks(self) -> Iterator[np.ndarray]:
        """The tokens, in pieces of a few megabytes."""
        return (self.tokens[start : start + CHUNK] for start in range(0, self.header.tokens, CHUNK))

    def counted(self, start: int, end: int) -> np.ndarray:
        """Which of the tokens [start, end) count in a loss, bool [end - start]."""
        if self._bits is None:
            return np.ones(end - start, dtype=bool)
        first = start // 8
        bits = np.unpackbits(self._bits[first : -(-end // 8)], bitorder="little")
        return bits[start - 8 * first : end - 8 * first].astype(bool)

    def ends_between(self, after: int, before: int) -> np.ndarray:
        """Where documents end, of the places after < end < before; uint64, rising in a shard that is whole."""
        return between(self.ends, after, before)


def _aligned(place: int) -> int:
    """The next multiple of 8."""
    return place + -place % 8


def between(ends: np.ndarray, after: int, before: int) -> np.ndarray:
    """Those of rising document ends, uint64, with after < end < before: two lookups, and what lies between."""
    # As uint64, like the ends: numpy would turn all of them into floats to compare them with signed numbers.
    first = ends.searchsorted(np.uint64(max(0, after)), "right")
    return ends[first : ends.searchsorted(np.uint64(max(0, before)), "left")]
