"""Which documents are held out for validation.

Each document has a place in [0, 1): a hash of a text file's name, or, where documents are rows of a file, of the text itself.
It is held out if its place lies below a bound. So a document stays on its side when others come or go, and copies of a row
land on one side. The bound is the share that is to be held out, moved a little where it would leave a side empty.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator

import numpy as np

from titan.data.corpora import Corpus, is_rows
from titan.data.lines import BadRow
from titan.data.pieces import Segment, pieces
from titan.data.rows import TextFile, rows, texts_of


def place_of(identity: str) -> float:
    """The place of a document, by its name or text."""
    digest = hashlib.sha256(identity.encode(errors="surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def bound_of(lowest: float, highest: float, share: float) -> float:
    """The bound: the share; but documents of two places or more are on both sides, and one alone is not held out.

    lowest, highest: place of any document.
    """
    if highest < share:
        return highest
    if 0 < share <= lowest < highest:
        return float(np.nextafter(lowest, 1.0))
    return share


def texts(
    corpus: Corpus, column: str, share: float, held_out: bool, bad: Callable[[Segment, int, BadRow], None]
) -> Iterator[str]:
    """The texts of one side, long ones in parts. column: a row's key of the text. bad: is told of what is no document."""
    bound = share
    if not any(map(is_rows, corpus.texts.values())):  # then all places are known beforehand
        files = [place_of(name) for name in corpus.texts if corpus.size(name)]
        bound = bound_of(min(files, default=0.0), max(files, default=1.0), share)
    for segment in (segment for piece in pieces(corpus) for segment in piece):
        for row in rows(segment, [column], lambda _: None):
            try:
                parts = texts_of(row, column)
                first = next(parts, "")
                identity = segment.name if isinstance(row.value, TextFile) else first
                if first and (place_of(identity) < bound) == held_out:
                    yield first
                    yield from parts
            except BadRow as error:
                bad(segment, row.number, error)
