"""Rows: the documents of a file, one after the other, in memory for a few of them, whatever the file's or a document's size.

A line of JSONL that is longer than 4 MiB is not held: its text comes in parts (`titan.data.long_lines`). A cell of Parquet or
Arrow is held, since their formats have it in one piece.

What is no document is a row all the same: a `BadRow`, with its number and what is wrong. What to do with it is not decided
here.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from titan.data.corpora import COLUMNS, CorpusError, is_rows
from titan.data.lines import BadRow, Lines, LongLine, lines_of, unreadable
from titan.data.long_lines import long_string
from titan.data.pieces import Segment
from titan.data.tables import open_table

TELL_BYTES = 1 << 18
PART = 1 << 16
"""Characters of the longest text that is made into tokens at once: tokenizers take longer for each as texts get longer."""


@dataclass
class Row:
    """number: of the line (the first one that begins in the segment is 1) or of the file's row; 0 for a text file.

    value: a row's object, a text, a line that is too long to be held, what is wrong, or None, of a blank line, which is no row.
    A long line must be read before the next row.
    """

    number: int
    value: dict[str, Any] | TextFile | LongLine | BadRow | None


@dataclass
class TextFile:
    """A document by itself."""

    text: str | Path

    def __iter__(self) -> Iterator[str]:
        if isinstance(self.text, str):
            yield self.text
            return
        try:
            with self.text.open(encoding="utf-8-sig", newline="") as file:
                while text := file.read(1 << 20):
                    yield text
        except UnicodeDecodeError as error:
            raise BadRow("not UTF-8", f"is not UTF-8 text ({error.reason})") from error
        except OSError as error:
            raise unreadable(self.text, error) from error


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
        raise unreadable(segment.text, error) from error


def texts_of(row: Row, field: str) -> Iterator[str]:
    """A row's text in parts, at the same places however it was read. Raises BadRow, perhaps after some parts."""
    return in_parts(_texts(row, field))


def _texts(row: Row, field: str) -> Iterator[str]:
    value = row.value
    if isinstance(value, BadRow):
        raise value
    if value is None or isinstance(value, TextFile):
        yield from value or ()
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
    except (ValueError, RecursionError) as error:
        raise _bad_json(error) from error


def in_parts(texts: Iterable[str]) -> Iterator[str]:
    """A text in parts of at most PART characters.

    Cut after a line end between two words, so that a tokenizer that never joins those gives the tokens of the whole; where
    there is none, before a space between two; else anywhere.
    """
    rest = ""
    for text in texts:
        rest, start = rest + text, 0
        while len(rest) - start > PART:
            end = start + PART
            cut = _between_words(rest, "\n", start, end) + 1 or _between_words(rest, " ", start, end)
            cut = cut if cut > start else end
            yield rest[start:cut]
            start = cut
        rest = rest[start:]
    if rest:
        yield rest


def _between_words(text: str, sign: str, start: int, end: int) -> int:
    """The last place of a sign in [start, end) that has no white space beside it; -1 where there is none. end < len(text)."""
    at = text.rfind(sign, start, end)
    while at > start and (text[at - 1].isspace() or text[at + 1].isspace()):
        at = text.rfind(sign, start, at)
    return at if at > start else -1


def _table(segment: Segment, path: Path, columns: list[str], done: Callable[[int], None]) -> Iterator[Row]:
    """Rows of Parquet or Arrow, numbered from 1 in their file."""
    table = open_table(path, columns, segment.begin, segment.end)
    if columns[0] not in table.names:
        raise CorpusError(f"{path} has no column {columns[0]!r}; it has {', '.join(map(repr, table.names[:12]))}")
    told = 0
    for number, value in table:
        yield Row(number, _bad_cell(value) if isinstance(value, Exception) else value)
        now = segment.size * (number - table.before) // table.count
        if now > told + TELL_BYTES:
            done(now - told)
            told = now
    done(segment.size - told)


def _bad_cell(error: Exception) -> BadRow:
    if isinstance(error, UnicodeDecodeError):
        return BadRow("not UTF-8", f"is not UTF-8 ({error.reason})")
    return BadRow("damaged", f"is damaged, with the rest of its row group ({error})")


def _lines(segment: Segment, path: Path, done: Callable[[int], None]) -> Iterator[Row]:
    """Rows of JSONL that begin in the segment."""
    number = read = told = 0
    with Lines(path) as lines:
        try:
            for line in lines_of(lines, segment):
                number += 1
                if isinstance(line, LongLine):
                    yield Row(number, line)
                    line.skip()
                else:
                    yield Row(number, None if line.isspace() else _parsed(line))
                read = lines.raw.tell() if lines.errors else read + (line.size if isinstance(line, LongLine) else len(line))
                if read > told + TELL_BYTES:
                    done(min(read, segment.size) - told)
                    told = min(read, segment.size)
        except BadRow as bad:
            yield Row(number + 1, bad)
    done(segment.size - told)


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
