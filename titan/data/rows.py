"""Rows: the documents of a file, one after the other, in memory for a few of them, whatever the file's or a document's size.

A line of JSONL that is longer than 4 MiB is not held: its text comes in parts (`titan.data.long_lines`). A cell of Parquet or
Arrow is held, since their formats have it in one piece.

What is no document is a row all the same: a `BadRow`, with its number and what is wrong. What to do with it is not decided
here.
"""

from __future__ import annotations

import contextlib
import gzip
import importlib
import io
import json
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from titan.data.corpora import COLUMNS, CorpusError, is_rows
from titan.data.long_lines import long_string
from titan.data.pieces import Segment
from titan.data.tables import open_table

LONG = 1 << 22
"""Bytes of the longest line that is held."""
PART = 1 << 20
"""Characters of the longest text that is made into tokens at once."""


class BadRow(ValueError):
    """A row, or a file's rest, that is no document. kind: in a word or two, to be counted; the message says what is wrong."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


@dataclass
class Row:
    """number: of the line (the first one that begins in the segment is 1) or of the file's row; 0 for a text file.

    value: a row's object, a text, a line that is too long to be held, or what is wrong. A long line must be read before the
    next row.
    """

    number: int
    value: dict[str, Any] | TextFile | LongLine | BadRow


@dataclass
class TextFile:
    """A document by itself."""

    text: str | Path

    def __iter__(self) -> Iterator[str]:
        if isinstance(self.text, str):
            yield self.text
            return
        try:
            with self.text.open(encoding="utf-8", newline="") as file:
                while text := file.read(PART):
                    yield text
        except UnicodeDecodeError as error:
            raise BadRow("not UTF-8", f"is not UTF-8 text ({error.reason})") from error


class LongLine:
    """A line in pieces."""

    def __init__(self, first: bytes, lines: Lines) -> None:
        self.first, self.lines, self.size, self.ended = first, lines, 0, False

    def __iter__(self) -> Iterator[bytes]:
        piece = self.first
        while piece:
            self.size += len(piece)
            self.ended = piece.endswith(b"\n")
            yield piece
            piece = b"" if self.ended else self.lines.read()

    def skip(self) -> None:
        """Read what is left."""
        while not self.ended and (piece := self.lines.read()):
            self.size += len(piece)
            self.ended = piece.endswith(b"\n")


class Lines:
    """A file of lines, plain or packed, as a `with` statement opens it."""

    def __init__(self, path: Path) -> None:
        self.raw: IO[bytes] = path.open("rb", buffering=1 << 20)
        self.file, self.broken = self.raw, False
        self.errors: tuple[type[Exception], ...] = ()
        if path.suffix == ".gz":
            self.file = io.BufferedReader(gzip.GzipFile(fileobj=self.raw), 1 << 20)  # type: ignore[arg-type]
            self.errors = (EOFError, gzip.BadGzipFile, zlib.error)
        elif path.suffix == ".zst":
            zstd = _zstd(path)
            self.file = io.BufferedReader(zstd.ZstdFile(self.raw), 1 << 20)
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


def rows(segment: Segment, columns: list[str], done: Callable[[int], None]) -> Iterator[Row]:
    """A segment's rows. columns: which of a table's are read. done: called with bytes of the segment's size that were read.

    Raises CorpusError where a file cannot be read.
    """
    try:
        if not is_rows(segment.text):
            yield Row(0, TextFile(segment.text))
            done(segment.size)
        elif (path := Path(segment.text)).suffix in COLUMNS:
            yield from _table(segment, path, columns, done)
        else:
            yield from _lines(segment, path, done)
    except OSError as error:
        raise CorpusError(f"{segment.text} cannot be read ({error.strerror or error})") from error


def texts_of(row: Row, field: str) -> Iterator[str]:
    """A row's text in parts, at the same places however it was read. Raises BadRow, perhaps after some parts."""
    return in_parts(_texts(row, field))


def _texts(row: Row, field: str) -> Iterator[str]:
    value = row.value
    if isinstance(value, BadRow):
        raise value
    if isinstance(value, TextFile):
        yield from value
        return
    try:
        for text in long_string(value, field) if isinstance(value, LongLine) else [value[field]]:
            if not isinstance(text, str):
                raise BadRow("wrong type", f"has a {type(text).__name__} as {field!r}, not a string")
            yield text
    except KeyError:
        had = f"; it has {', '.join(map(repr, list(value)[:6]))}" if isinstance(value, dict) else ""
        raise BadRow("field missing", f"has no {field!r}{had}") from None
    except BadRow:
        raise
    except ValueError as error:
        raise _bad_json(error) from error


def in_parts(texts: Iterable[str]) -> Iterator[str]:
    """A text in parts of at most PART characters, cut after a line end that no white space follows, where there is one."""
    rest = ""
    for text in texts:
        rest += text
        while len(rest) > PART:
            at = rest.rfind("\n", 0, PART) + 1
            while at and rest[at].isspace():
                at = rest.rfind("\n", 0, at - 1) + 1
            at = at or PART
            yield rest[:at]
            rest = rest[at:]
    if rest:
        yield rest


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


def _table(segment: Segment, path: Path, columns: list[str], done: Callable[[int], None]) -> Iterator[Row]:
    """Rows of Parquet or Arrow, numbered from 1 in their file."""
    table = open_table(path, columns, segment.begin, segment.end)
    if columns[0] not in table.names:
        raise CorpusError(f"{path} has no column {columns[0]!r}; it has {', '.join(map(repr, table.names[:12]))}")
    number, read = table.before, 0
    try:
        for some in table:
            for value in some:
                number += 1
                yield Row(number, value)
            now = segment.size * (number - table.before) // table.count
            done(now - read)
            read = now
    except (ValueError, OSError) as error:
        yield Row(number + 1, BadRow("damaged", f"is damaged from here on ({error})"))
    done(segment.size - read)


def _lines(segment: Segment, path: Path, done: Callable[[int], None]) -> Iterator[Row]:
    """Rows of JSONL that begin in the segment."""
    number = read = told = 0
    with Lines(path) as lines:
        try:
            for line in _split(lines, segment):
                number += 1
                if isinstance(line, LongLine):
                    yield Row(number, line)
                    line.skip()
                elif not line.isspace():
                    yield Row(number, _parsed(line))
                read = lines.raw.tell() if lines.errors else read + (line.size if isinstance(line, LongLine) else len(line))
                if read > told + LONG:  # telling costs, too
                    done(min(read, segment.size) - told)
                    told = min(read, segment.size)
        except BadRow as bad:
            yield Row(number + 1, bad)
    done(segment.size - told)


def _split(lines: Lines, segment: Segment) -> Iterator[bytes | LongLine]:
    """The lines that begin in the segment."""
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


def _parsed(line: bytes) -> dict[str, Any] | BadRow:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        return _bad_json(error)
    return value if isinstance(value, dict) else BadRow("no object", f"holds a {type(value).__name__}, not an object")


def _bad_json(error: Exception) -> BadRow:
    if isinstance(error, UnicodeDecodeError):
        return BadRow("not UTF-8", f"is not UTF-8 ({error.reason})")
    return BadRow("no JSON", f"is no JSON ({error})")


def _zstd(path: Path) -> Any:
    """Python's own module, or the same for a Python before 3.14."""
    for name in ("compression.zstd", "backports.zstd"):
        with contextlib.suppress(ImportError):
            return importlib.import_module(name)
    raise CorpusError(f"{path}: to read it, pip install 'titan-pretraining[data]', which brings zstd")
