"""Encoding: a piece of a corpus becomes a shard of each split, and a marker that says so.

The marker is written last, and is all that tells a finished piece from one that was interrupted. It has what the report at the
end needs: counts, and the rows that were left out.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import chain
from pathlib import Path
from typing import NoReturn

import numpy as np

from titan.data.chat import Chat, ChatError
from titan.data.corpora import CorpusError
from titan.data.held_out import place_of
from titan.data.lines import BadRow, lines_before
from titan.data.pieces import Segment
from titan.data.rows import Row, TextFile, rows, texts_of
from titan.data.shard_writer import ShardWriter
from titan.data.shards import TokenShard
from titan.data.tokenizer import Tokenizer
from titan.files import write_atomically

LISTED, EMPTY = 1000, "empty"
REMEDY = 'mend it, or set data.on_bad = "skip" to leave such rows out'
SPLITS = ("train", "validation")


class BadRowError(CorpusError):
    """A row is no document, and such rows are not to be left out. The message names file, line and what is wrong."""


@dataclass
class Made:
    """What a marker says of a piece."""

    bound: float
    """Documents were held out whose place is below it (`titan.data.held_out`)."""
    documents: list[int] = field(default_factory=lambda: [0, 0])
    """Of each split."""
    tokens: list[int] = field(default_factory=lambda: [0, 0])
    lowest: float = 1.0
    """Place of any document."""
    highest: float = 0.0
    lines: list[int] = field(default_factory=list)
    """Rows of each segment."""
    bad: dict[str, int] = field(default_factory=dict)
    """Rows that were left out, by kind."""
    listed: list[tuple[int, int, str]] = field(default_factory=list)
    """The first LISTED of them: segment, row, what is wrong."""

    def leave_out(self, segment: int, row: int, bad: BadRow) -> None:
        """A row is no document."""
        self.bad[bad.kind] = self.bad.get(bad.kind, 0) + 1
        if len(self.listed) < LISTED:
            self.listed.append((segment, row, str(bad)))

    def note(self, at: float) -> None:
        """A document with this place was written."""
        self.lowest, self.highest = min(self.lowest, at), max(self.highest, at)


def marker(folder: Path, number: int) -> Path:
    return folder / f"piece-{number:05d}.json"


def read_marker(folder: Path, number: int) -> Made | None:
    """What a piece became; None where it is not finished."""
    with contextlib.suppress(FileNotFoundError):
        return Made(**json.loads(marker(folder, number).read_text()))
    return None


@dataclass(frozen=True)
class Encoder:
    """Makes pieces. The two callables are told of bytes of input and of tokens that are done."""

    folder: Path
    tokenizer: Tokenizer
    chat: Chat | None
    """Rows are conversations."""
    column: str
    """The key or column of a row's text or messages."""
    skip_bad: bool
    read: Callable[[int], None]
    made: Callable[[int], None]

    def make(self, number: int, piece: list[Segment], bound: float) -> Made:
        """Write a piece's shards and its marker. Raises BadRowError, CorpusError, OSError; then there is no marker."""
        found = Made(bound)
        columns = [self.column] if self.chat is None else [self.column, "tools"]
        paths = [self.folder / f"{split}-{number:05d}.tokens" for split in SPLITS]
        with contextlib.ExitStack() as stack:
            writers = [stack.enter_context(self._writer(path)) for path in paths]
            for index, segment in enumerate(piece):
                found.lines.append(0)
                for row in rows(segment, columns, self.read):
                    found.lines[-1] = max(found.lines[-1], row.number)
                    if row.value is None:
                        continue
                    try:
                        self._add(row, segment, writers, found)
                    except BadRow as bad:
                        if bad.kind != EMPTY and not self.skip_bad:
                            refuse(segment, row.number, bad)
                        found.leave_out(index, row.number, bad)
            found.documents, found.tokens = [w.documents for w in writers], [w.tokens for w in writers]
            for path, writer in zip(paths, writers, strict=True):
                if writer.finish() is None:
                    path.unlink(missing_ok=True)  # of another bound
                else:
                    TokenShard(path).verify()
        write_atomically(marker(self.folder, number), json.dumps(asdict(found)))
        return found

    def _writer(self, path: Path) -> ShardWriter:
        own = self.tokenizer
        return ShardWriter(path, vocab_size=own.vocab_size, tokenizer=own.fingerprint, masked=self.chat is not None)

    def _add(self, row: Row, segment: Segment, writers: list[ShardWriter], found: Made) -> None:
        """Write a row. Raises BadRow; then nothing of it is written."""
        if self.chat is not None:
            self._add_conversation(self.chat, row, writers, found)
            return
        texts = texts_of(row, self.column)
        first = next(texts, "")
        if not first:
            raise BadRow(EMPTY, "is empty")
        identity = segment.name if isinstance(row.value, TextFile) else first
        at = place_of(identity)
        writer = writers[at < found.bound]
        second = next(texts, None)
        if second is None:
            ids = np.append(self._encode(first, self.tokenizer.encode), np.int32(self.tokenizer.document_end))
            writer.add(ids, len(first.encode()))
        else:
            before, encode = writer.place(), self.tokenizer.encode
            try:
                for text in chain((first, second), texts):
                    writer.add(self._encode(text, encode), len(text.encode()))
                    encode = partial(self.tokenizer.encode_behind, special=False)
            except BadRow:
                writer.back_to(before)
                raise
            writer.add(np.array([self.tokenizer.document_end]), 0)
        writer.end_document()
        found.note(at)

    def _encode(self, text: str, encode: Callable[[str], np.ndarray]) -> np.ndarray:
        try:
            ids = encode(text)
        except ValueError as error:
            raise BadRow("no Unicode", f"cannot be made into tokens: {error}") from error
        self.made(len(ids))
        return ids

    def _add_conversation(self, chat: Chat, row: Row, writers: list[ShardWriter], found: Made) -> None:
        if isinstance(row.value, BadRow):
            raise row.value
        if not isinstance(row.value, dict):
            raise BadRow("conversation", "is a conversation of more than 4 MiB")
        if self.column not in row.value:
            raise BadRow("field missing", f"has no {self.column!r}; it has {', '.join(map(repr, list(row.value)[:6]))}")
        try:
            encoded = chat.encode({"messages": row.value[self.column], "tools": row.value.get("tools")})
        except ChatError as error:
            raise BadRow("conversation", str(error)) from error
        identity = json.dumps(row.value[self.column], sort_keys=True, default=str)
        at = place_of(identity)
        writer = writers[at < found.bound]
        writer.add(encoded.ids, encoded.size, encoded.counted)
        writer.end_document()
        found.note(at)
        self.made(len(encoded.ids))


def refuse(segment: Segment, number: int, bad: BadRow) -> NoReturn:
    """Raise a BadRowError for a row of a segment."""
    raise BadRowError(f"{place(segment, number, lines_before(segment))} {bad}; {REMEDY}") from bad


def place(segment: Segment, number: int, before: int) -> str:
    """A row's file and line for people. before: lines of its file before the segment."""
    if not number:
        return segment.place
    return f"{segment.place}:{number + (0 if segment.place.endswith('.parquet') else before)}"


def must_change(one: Made, bound: float) -> bool:
    """Whether a piece has a document on the wrong side of another bound."""
    return one.bound != bound and any(one.documents) and (one.lowest < bound if bound > one.bound else one.highest >= bound)
