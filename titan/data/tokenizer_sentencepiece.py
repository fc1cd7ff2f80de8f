"""Sentencepiece models (Kudo and Richardson 2018, arXiv:1808.06226); the end-of-sentence token ends a document."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import sentencepiece

from titan.data.tokenizer import ids_below, utf8


class SentencePieceTokenizer:
    """A sentencepiece model of any type. `path` says where its bytes are from."""

    def __init__(self, model: bytes, path: Path) -> None:
        try:
            self._processor = sentencepiece.SentencePieceProcessor()
            self._processor.LoadFromSerializedProto(model)
        except RuntimeError as error:
            raise ValueError(
                f"data.tokenizer: {path} is neither a sentencepiece model ({error}) nor a tokenizer.json nor tiktoken ranks"
            ) from error
        self.vocab_size = int(self._processor.vocab_size())
        self.document_end = int(self._processor.eos_id())
        self.fingerprint = hashlib.sha256(b"sentencepiece\0" + model).hexdigest()
        self.files = {"tokenizer.model": model}
        if self.document_end < 0:
            raise ValueError(f"data.tokenizer: {path} has no end-of-sentence token; train it with eos_id=2 or another free id")

    def encode(self, text: str) -> np.ndarray:
        return np.array(self._processor.encode(utf8(text)), dtype=np.int32)

    def decode(self, tokens: Sequence[int] | np.ndarray) -> str:
        return str(self._processor.decode(ids_below(tokens, self.vocab_size)))
