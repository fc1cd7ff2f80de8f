"""Flat .bin files: tokens and nothing else, as nanoGPT writes them, or after llm.c's header of 1,024 bytes.

    llm.c        256 x int32, little-endian: magic, version, number of tokens, zeros; then the tokens
                 magic 20240520, version 1: uint16 (GPT-2's);  magic 20240801, version 7: uint32 (Llama 3's)
    nanoGPT      tokens from the first byte on, of a type that the file does not say: data.dtype does

Where documents end is not kept; it is seen by the token that ends one. (llm.c puts it before each document instead of after
it, which comes to the same but for the file's first token.)

Source: llm.c, dev/data/data_common.py; nanoGPT, data/openwebtext/prepare.py.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from titan.data.foreign import ForeignFile, Unsaid

HEADER = 1024
KNOWN = {(20240520, 1): "u2", (20240801, 7): "u4"}
EVALUATION = 20240522


class FlatFile(ForeignFile):
    """One .bin."""

    format = "flat .bin"

    def __init__(self, path: Path, unsaid: Unsaid) -> None:
        super().__init__(path, unsaid, path)
        size = path.stat().st_size
        with path.open("rb") as file:
            magic, version, tokens = (int.from_bytes(file.read(4), "little", signed=True) for _ in range(3))
        if magic == EVALUATION:
            raise self.error("is one of llm.c's evaluation files, which hold questions and not text")
        if (magic, version) in KNOWN:
            dtype, start = KNOWN[magic, version], HEADER
            if size != HEADER + tokens * np.dtype(dtype).itemsize or tokens < 1:
                said = f"holds {size} bytes, its header speaks of {tokens} tokens of {np.dtype(dtype).itemsize}"
                raise self.error(f"{said}: it was cut short or is damaged")
        elif not unsaid.dtype:
            said = 'does not say of what type its tokens are; say it: data.dtype = "uint16" is nanoGPT\'s'
            raise self.error(said)
        else:
            dtype, start = unsaid.dtype, 0
            tokens, rest = divmod(size, np.dtype(dtype).itemsize)
            if rest or not tokens:
                raise self.error(f"holds {size} bytes, no whole number of tokens of data.dtype = {dtype!r}: it was cut short")
        self.tokens = self.map(path, dtype, start, tokens)

    def ends_between(self, after: int, before: int) -> np.ndarray:
        low, high = max(0, after), min(before - 1, len(self.tokens))  # the last place that is asked for is before - 1
        ends = np.flatnonzero(self.tokens[low:high] == self.unsaid.document_end) + (low + 1)
        if after < len(self.tokens) < before and (not len(ends) or ends[-1] != len(self.tokens)):
            ends = np.append(ends, len(self.tokens))
        return ends
