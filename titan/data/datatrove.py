"""datatrove's token files, which nanotron reads: NAME.ds and NAME.ds.index.

    NAME.ds          tokens, uint16 or uint32, little-endian
    NAME.ds.index    uint64, little-endian, one a document: the position one past its last token

How wide a token is follows from the two: the last end is the number of tokens. Beside them may lie NAME.ds.metadata, which
names the tokenizer in a way that proves nothing, and NAME.ds.loss, a mask of the tokens that count in the loss, which
titan does not read: such a dataset is refused.

Source: src/datatrove/pipeline/tokens/tokenizer.py.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from titan.data.foreign import ForeignFile, Unsaid
from titan.data.shards import between


class DatatroveFile(ForeignFile):
    """One .ds with its .index."""

    format = "datatrove .ds"

    def __init__(self, path: Path, unsaid: Unsaid) -> None:
        index = path.with_name(path.name + ".index")
        super().__init__(path, unsaid, path, index)
        if path.with_name(path.name + ".loss").exists():
            raise self.error("has a mask of the loss beside it, which titan does not read; prepare the text with titan instead")
        size, index_size = path.stat().st_size, index.stat().st_size
        if not index_size or index_size % 8:
            raise self.error(f"{index.name} has {index_size} bytes, no whole number of document ends: it was cut short")
        self._ends = self.map(index, "u8", 0, index_size // 8)
        tokens = int(self._ends[-1])
        if tokens == 0 or size not in (2 * tokens, 4 * tokens):
            said = f"holds {size} bytes where {index.name} ends with token {tokens}, which is neither 2 nor 4 bytes a token"
            raise self.error(f"{said}: one of the two was cut short or is damaged")
        self.tokens = self.map(path, "u2" if size == 2 * tokens else "u4", 0, tokens)
        self.documents = len(self._ends)

    def ends_between(self, after: int, before: int) -> np.ndarray:
        ends = between(self._ends, after, before)
        if np.any(ends[1:] < ends[:-1]):
            raise self.error(f"has document ends that do not rise, near token {after}: its index is damaged")
        return np.unique(ends)  # an empty document ends where it begins
