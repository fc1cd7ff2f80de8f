"""Who attends to whom, as rectangles: the tiles that causal attention within documents leaves of queries x keys.

A document mask is no matrix. With the documents' spans known on the host, a sequence of queries against itself is one causal
square on the diagonal per document, and no layer waits for the device to learn the shapes. Context parallelism holds pieces
of a sequence, as a list of spans in ascending order: queries in one piece see all of an earlier one, nothing of a later one,
and the causal square of their own, each cut to the document.

                keys  0        s      S
    queries 0   [ \\                   ]       two documents, [0, s) and [s, S): the queries of the second half of
            s   [____\\                ]       the sequence are one piece; as tiles they are a full rectangle
            h   [         |############ \\]    (#, the part of their document before h) and a square
            S                                  on the diagonal
"""

from __future__ import annotations

from itertools import groupby
from typing import NamedTuple

from torch import Tensor

Span = tuple[int, int]
"""begin, end"""
Pieces = tuple[Span, ...]
"""Spans of a sequence in ascending order, which a tensor holds one after the other."""


class Tile(NamedTuple):
    """In these rows of the batch, queries q attend to keys k: to all of them, or causally, the i-th to the first i.

    Spans are places in the tensors that go with it. Causal needs as many keys as queries.
    """

    rows: Span
    q: Span
    k: Span
    causal: bool


class Documents:
    """Where the documents of a micro batch begin and end in its whole sequences. Made once, on the host, and not changed."""

    __slots__ = ("_tiles", "batch", "rows", "seq_len")

    def __init__(self, rows: tuple[Pieces, ...]) -> None:
        """rows: for each row of the batch its documents' spans, in order and without gaps."""
        self.rows = rows
        self.batch, self.seq_len = len(rows), rows[0][-1][1]
        self._tiles: dict[tuple[Pieces, Pieces], tuple[Tile, ...]] = {}

    @classmethod
    def of(cls, document_ids: Tensor) -> Documents:
        """document_ids: int64 [batch, seq], on the host. A document is a run of equal ids."""
        edges: list[list[int]] = [[0] for _ in document_ids]
        for row, last in (document_ids[:, 1:] != document_ids[:, :-1]).nonzero().tolist():
            edges[row].append(last + 1)
        return cls(tuple(tuple(zip(row, [*row[1:], document_ids.shape[1]], strict=True)) for row in edges))

    @classmethod
    def whole(cls, batch: int, seq_len: int) -> Documents:
        """Every row is one document."""
        return cls((((0, seq_len),),) * batch)

    @classmethod
    def given(cls, documents: Documents | None, batch: int, seq_len: int) -> Documents:
        """What a core was given, or whole rows. ValueError if it is of another batch: spans would silently be cut off."""
        if documents is None:
            return cls.whole(batch, seq_len)
        if (documents.batch, documents.seq_len) != (batch, seq_len):
            theirs = f"[{documents.batch}, {documents.seq_len}]"
            raise ValueError(f"the documents are those of a batch {theirs}, the queries of a batch [{batch}, {seq_len}]")
        return documents

    def tiles(self, queries: Pieces, keys: Pieces) -> tuple[Tile, ...]:
        """Causal attention within documents, of the queries at these positions to the keys at those.

        A piece of the queries lies within one of the keys, or meets none. Remembered, since every layer asks the same.
        """
        if (queries, keys) not in self._tiles:
            found: list[Tile] = []
            for spans, equal_rows in groupby(enumerate(self.rows), key=lambda row: row[1]):
                numbers = [number for number, _ in equal_rows]
                for document in spans:
                    found += _tiles_of(document, (numbers[0], numbers[-1] + 1), queries, keys)
            self._tiles[queries, keys] = tuple(found)
        return self._tiles[queries, keys]


def _tiles_of(document: Span, rows: Span, queries: Pieces, keys: Pieces) -> list[Tile]:
    if queries == keys:  # whatever lies between the pieces: later in the tensor is later in the sequence
        same = _places(keys, *document)
        return [Tile(rows, same, same, True)] if same[0] < same[1] else []
    found: list[Tile] = []
    for piece in queries:
        begin, end = max(piece[0], document[0]), min(piece[1], document[1])
        if begin >= end:
            continue
        q, before, same = _places(queries, begin, end), _places(keys, document[0], begin), _places(keys, begin, end)
        if same[0] < same[1]:
            found.append(Tile(rows, q, same, True))
        if before[0] < before[1]:
            if found and found[-1][1:] == ((found[-1].q[0], q[0]), before, False):  # neighbours that see the same keys
                q = (found.pop().q[0], q[1])
            found.append(Tile(rows, q, before, False))
    return found


def _places(pieces: Pieces, begin: int, end: int) -> Span:
    """Where a tensor that holds these pieces has the positions begin .. end of the sequence."""
    first, last = (sum(min(max(position - a, 0), b - a) for a, b in pieces) for position in (begin, end))
    return first, last
