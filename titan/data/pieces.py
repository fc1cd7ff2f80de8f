"""Pieces: how the work of preparing is shared out. A piece is made by one process at a time and becomes a shard of each split.

Where pieces begin and end follows from the files' names and sizes alone: so the result is the same for any number of processes,
and a piece that an interrupted run has finished is one that the next run need not make. A plain JSONL file is cut anywhere (a
line belongs to the piece in which it begins), a Parquet file between its row groups; text, packed and Arrow files are taken
whole. Of pieces there are some 256, but none is below 4 MiB, about a second of work, nor above 1 GiB,
which is what is lost when a process dies.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from titan.data.corpora import Corpus
from titan.data.tables import row_groups

PIECES, SMALLEST, LARGEST = 256, 1 << 22, 1 << 30
CUT_ANYWHERE = (".jsonl", ".ndjson")


@dataclass(frozen=True)
class Segment:
    """A file, or a part of it."""

    name: str
    text: str | Path
    size: int
    """Bytes, of work."""
    begin: int = 0
    end: int | None = None
    """None: to the end of the file. Bytes of lines, row groups of Parquet."""

    @property
    def place(self) -> str:
        """What people call it."""
        return str(self.text) if isinstance(self.text, Path) else self.name


def pieces(corpus: Corpus) -> list[list[Segment]]:
    """The corpus in pieces of about equal size, in order. Empty files are in none."""
    sizes = {name: corpus.size(name) for name in corpus.texts}
    target = min(LARGEST, max(SMALLEST, -(-sum(sizes.values()) // PIECES)))
    found: list[list[Segment]] = []
    room = 0
    for name, size in sizes.items():
        for segment in _segments(name, corpus.texts[name], size, target, room):
            if room <= 0:
                found.append([])
                room = target
            found[-1].append(segment)
            room -= segment.size
    return found


def _segments(name: str, text: str | Path, size: int, target: int, room: int) -> list[Segment]:
    """A file in parts, of which the first fills the room that is left and the others are of the target size."""
    if not size:
        return []
    if isinstance(text, Path) and size > target:
        if text.name.endswith(CUT_ANYWHERE):
            cuts = [0, *range(room if room > 0 else target, size, target), size]
            return [Segment(name, text, end - begin, begin, end) for begin, end in pairwise(cuts)]
        if text.suffix == ".parquet":
            return _row_groups(name, text, target)
    return [Segment(name, text, size)]


def _row_groups(name: str, text: Path, target: int) -> list[Segment]:
    found, begin, size = [], 0, 0
    groups = row_groups(text)
    for group, bytes_of_group in enumerate(groups, 1):
        size += bytes_of_group
        if size >= target or group == len(groups):
            found.append(Segment(name, text, max(1, size), begin, group))
            begin, size = group, 0
    return found
