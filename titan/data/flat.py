"""Flat .bin files: tokens and nothing else, as nanoGPT writes them, or after llm.c's header of 1,024 bytes.

    llm.c        256 x int32, little-endian: magic, version, number of tokens, zeros; then the tokens
                 magic 20240520, version 1: uint16 (GPT-2's);  magic 20240801, version 7: uint32 (Llama 3's)
    nanoGPT      tokens from the first byte on, of a type that the file does not say: data.dtype does

Where documents end is not kept; it is seen by the token that stands between them. nanoGPT writes the one that ends a document
after it. llm.c writes one before each document: GPT-2's <|endoftext|>, which is its tokenizer's end, but Llama 3's
<|begin_of_text|>, which is not.

Source: llm.c, dev/data/data_common.py; nanoGPT, data/openwebtext/prepare.py.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np

from titan.data.foreign import ForeignFile, Unsaid

HEADER = 1024
KNOWN = {(20240520, 1): "u2", (20240801, 7): "u4"}
BEGIN_OF_TEXT = 128_000
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
        self._begins = (magic, version) in KNOWN
        self._between = BEGIN_OF_TEXT if (magic, version) == (20240801, 7) else unsaid.document_end
        if self._begins:
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
        # The same bytes of another type, or with others between documents, are other data.
        said = f"{self.fingerprint} {self.tokens.dtype.name} {self._between}"
        self.fingerprint = hashlib.sha256(said.encode()).hexdigest()

    def ends_between(self, after: int, before: int) -> np.ndarray:
        size, after = len(self.tokens), max(0, after)
        shift = 0 if self._begins else 1  # a document ends before the token that begins the next one, or after its own last
        low, high = after + 1 - shift, min(before - shift, size)
        ends = np.flatnonzero(self.tokens[low:high] == self._between) + (low + shift)
        if after < size < before and (not len(ends) or ends[-1] != size):
            ends = np.append(ends, size)
        return ends
