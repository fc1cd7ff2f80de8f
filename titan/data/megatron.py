"""Megatron-LM's indexed datasets: NAME.bin, the tokens, and NAME.idx, where sequences and documents lie.

    9 bytes      magic "MMIDIDX\\0\\0"
    uint64       version, 1
    uint8        type of the tokens: 1 uint8, 2 int8, 3 int16, 4 int32, 5 int64, 8 uint16 (6 and 7 are floating point)
    uint64       S, the number of sequences
    uint64       D, the length of the document index
    int32 [S]    length of each sequence, in tokens
    int64 [S]    where each sequence starts in NAME.bin, in bytes
    int64 [D]    the first sequence of each document, and at the end S
    int8  [S]    mode of each sequence, in multimodal datasets only

All little-endian, and the tokens of all sequences lie in NAME.bin without gaps. The index of a terabyte has gigabytes, so it
stays on the disk: a lookup is a binary search in the map. A wrong number in it cannot mislead it unseen, because around the
place that is found each sequence's length must lead to the next one's start.

Source: megatron/core/datasets/indexed_dataset.py.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from pathlib import Path

import numpy as np

from titan.data.foreign import ForeignFile, Unsaid

MAGIC = b"MMIDIDX\0\0"
HEADER = 34
TYPES = {1: "uint8", 2: "int8", 3: "int16", 4: "int32", 5: "int64", 8: "uint16"}


class MegatronFile(ForeignFile):
    """One .bin with its .idx. path: the .bin's."""

    format = "Megatron .bin and .idx"

    def __init__(self, path: Path, unsaid: Unsaid) -> None:
        index = path.with_suffix(".idx")
        super().__init__(path, unsaid, path, index)
        with index.open("rb") as file:
            header = file.read(HEADER)
        if header[:9] != MAGIC or len(header) < HEADER:
            raise self.error(f"{index.name} does not start with Megatron's magic bytes")
        version, kind = int.from_bytes(header[9:17], "little"), header[17]
        sequences, entries = (int.from_bytes(header[at : at + 8], "little") for at in (18, 26))
        if version != 1 or kind not in TYPES:
            raise self.error(f"{index.name} has version {version} and token type {kind}, which hold no tokens that titan knows")
        size = index.stat().st_size
        if size - (least := HEADER + 12 * sequences + 8 * entries) not in (0, sequences) or not sequences or entries < 2:
            said = f"{index.name} has {size} bytes, its header asks for {least} (or {sequences} more)"
            raise self.error(f"{said}: it was cut short or is damaged")
        self._lengths = self.map(index, "i4", HEADER, sequences)
        self._starts = self.map(index, "i8", HEADER + 4 * sequences, sequences)
        self._documents = self.map(index, "i8", HEADER + 12 * sequences, entries)
        self._width = np.dtype(TYPES[kind]).itemsize
        end = int(self._starts[-1]) + int(self._lengths[-1]) * self._width
        if path.stat().st_size != end or end <= 0:
            raise self.error(f"holds {path.stat().st_size} bytes, and {index.name} ends at {end}: one of the two is damaged")
        if self._starts[0] != 0 or self._documents[0] != 0 or self._documents[-1] != sequences:
            raise self.error(f"{index.name} does not begin with the first sequence and end with the last: it is damaged")
        self.tokens = self.map(path, TYPES[kind], 0, end // self._width)
        self.documents = entries - 1

    def ends_between(self, after: int, before: int) -> np.ndarray:
        # A document ends where the next one's first sequence starts. At 0 none ends, though an empty one may lie there.
        after = max(0, after)
        entries = range(1, len(self._documents))
        first = bisect_right(entries, after, key=self._begin) + 1
        last = bisect_left(entries, before, key=self._begin) + 1
        count, around = len(self._starts), self._documents[first - 1 : last + 1]
        low, high = int(around[0]), int(around[-1])
        if last < first or not 0 <= low <= high <= count or np.any(around[1:] < around[:-1]):
            raise self.error(f"has a document index that does not rise near token {after}: it is damaged")
        ends = self._starts[low:high] + self._lengths[low:high].astype(np.int64) * self._width
        if not np.array_equal(ends[: count - 1 - low], self._starts[low + 1 : high + 1]):
            raise self.error(f"has sequences that do not follow one another near token {after}: its index is damaged")
        sequences = self._documents[first:last]
        starts = self._starts[np.minimum(sequences, count - 1)] // self._width
        found = np.unique(np.where(sequences < count, starts, len(self.tokens)))  # an empty document ends where it begins
        if len(found) and not after < found[0] <= found[-1] < before:
            raise self.error(f"has an index that does not rise near token {after}: it is damaged")
        return found

    def _begin(self, entry: int) -> int:
        """Where the document of this entry begins, in tokens; of the last entry, where the data end."""
        sequence = int(self._documents[entry])
        if sequence == len(self._starts):
            return len(self.tokens)
        if not 0 <= sequence < len(self._starts):
            raise self.error(f"has a document that starts with sequence {sequence} of {len(self._starts)}: it is damaged")
        return int(self._starts[sequence]) // self._width
