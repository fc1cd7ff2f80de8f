"""Lines of a file, plain or packed by gzip or zstd, of which none is held that is longer than 4 MiB."""

from __future__ import annotations

import contextlib
import gzip
import importlib
import io
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from titan.data.corpora import CorpusError
from titan.data.pieces import Segment

LONG = 1 << 22
"""Bytes of the longest line that is held."""


class BadRow(ValueError):
    """A row, or a file's rest, that is no document. kind: in a word or two, to be counted; the message says what is wrong."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__("".join(c if c.isprintable() else repr(c)[1:-1] for c in message[:500]))
        self.kind = kind


class LongLine:
    """A line in pieces."""

    def __init__(self, first: bytes, lines: Lines) -> None:
        self.first, self.lines, self.ended = first, lines, False
        self.size = len(first)
        """Bytes of it that were read."""

    def __iter__(self) -> Iterator[bytes]:
        yield self.first
        yield from self._others()

    def skip(self) -> None:
        """Read what is left."""
        for _ in self._others():
            pass

    def _others(self) -> Iterator[bytes]:
        while not self.ended and (piece := self.lines.read()):
            self.size += len(piece)
            self.ended = piece.endswith(b"\n")
            yield piece


class Lines:
    """A file of lines, plain or packed, as a `with` statement opens it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.raw: IO[bytes] = path.open("rb", buffering=1 << 20)
        self.file, self.broken = self.raw, False
        self.errors: tuple[type[Exception], ...] = ()
        if path.suffix == ".gz":
            self.file = io.BufferedReader(gzip.GzipFile(fileobj=self.raw), 1 << 20)  # type: ignore[arg-type]
            self.errors = (EOFError, gzip.BadGzipFile, zlib.error)
        elif path.suffix == ".zst":
            zstd = zstd_module(path)
            long = {zstd.DecompressionParameter.window_log_max: 31}  # what `zstd --long=31` writes; it takes 2 GiB to read
            self.file = io.BufferedReader(zstd.ZstdFile(self.raw, options=long), 1 << 20)
            self.errors = (EOFError, zstd.ZstdError)

    def __enter__(self) -> Lines:
        return self

    def __exit__(self, *_: object) -> None:
        self.raw.close()

    def read(self) -> bytes:
        """A line, or LONG bytes of it. BadRow, once, where the file is damaged: there it ends."""
        try:
            return b"" if self.broken else self.file.readline(LONG)
        except self.errors as error:
            self.broken = True
            raise BadRow("damaged", f"is damaged or cut short from here on ({error})") from error
        except OSError as error:
            raise unreadable(self.path, error) from error


def unreadable(path: str | Path, error: OSError) -> CorpusError:
    return CorpusError(f"{path} cannot be read ({error.strerror or error})")


def lines_of(lines: Lines, segment: Segment) -> Iterator[bytes | LongLine]:
    """The lines that begin in a segment of the file. A long one must be read, or skipped, before the next."""
    at, end = segment.begin, segment.end
    if at:
        at = lines.file.seek(at - 1)
        while piece := lines.read():
            at += len(piece)
            if piece.endswith(b"\n") or (end is not None and at >= end):
                break
    while (end is None or at < end) and (line := lines.read()):
        if len(line) < LONG or line.endswith(b"\n"):
            at += len(line)
            yield line
        else:
            long = LongLine(line, lines)
            yield long
            at += long.size


def lines_before(segment: Segment) -> int:
    """How many lines of its file begin before a segment does."""
    count, left = 0, segment.begin
    if not left:
        return 0
    with Path(segment.text).open("rb") as file:
        while left and (piece := file.read(min(left, LONG))):
            count += piece.count(b"\n")
            left -= len(piece)
        file.seek(segment.begin - 1)
        return count + (file.read(1) != b"\n")


def zstd_module(path: Path) -> Any:
    """Python's own module, or the same for a Python before 3.14."""
    for name in ("compression.zstd", "backports.zstd"):
        with contextlib.suppress(ImportError):
            return importlib.import_module(name)
    raise CorpusError(f"{path}: to read it, pip install 'titan-pretraining[data]', which brings zstd")
