"""Tokenizers: text to token ids and back.

Two are known. `bytes` has one token for each byte of the UTF-8 text and one more, 256, that ends a document: nothing to
train, nothing to download. A sentencepiece model (Kudo and Richardson 2018, arXiv:1808.06226) is read from its file.

Both encode text and only text: a text that spells `</s>` gives the tokens of those four characters. The token that ends a
document is put between documents by whoever writes the shards, so no document can end itself. `fingerprint` is a
hash of all that decides the token ids; shards carry it, and a dataset made with another tokenizer is refused.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np


class Tokenizer(Protocol):
    """What the rest of titan knows of a tokenizer."""

    vocab_size: int
    """Token ids are in [0, vocab_size)."""
    document_end: int
    """The token that ends a document."""
    fingerprint: str
    """Hex SHA-256 of the kind and, where there is one, the model file's bytes."""
    files: dict[str, bytes]
    """What to keep beside a checkpoint, file name -> contents; the first is what `load_tokenizer` reads. {} for bytes."""

    def encode(self, text: str) -> np.ndarray:
        """The text's token ids, int32 [tokens], without any special token."""

    def decode(self, tokens: Sequence[int] | np.ndarray) -> str:
        """The text of the tokens. Special tokens have none."""


class BytesTokenizer:
    """One token a byte of UTF-8; 256 ends a document."""

    vocab_size = 257
    document_end = 256
    fingerprint = hashlib.sha256(b"bytes").hexdigest()

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}

    def encode(self, text: str) -> np.ndarray:
        return np.frombuffer(text.encode("utf-8"), dtype=np.uint8).astype(np.int32)

    def decode(self, tokens: Sequence[int] | np.ndarray) -> str:
        ids = np.asarray(tokens, dtype=np.int64)
        return bytes(ids[ids < self.document_end].tolist()).decode("utf-8", errors="replace")


class SentencePieceTokenizer:
    """A sentencepiece model; its end-of-sentence token ends a document."""

    def __init__(self, path: Path) -> None:
        import sentencepiece  # only those who use such a model need the package

        model = path.read_bytes()
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        except RuntimeError as error:
            raise ValueError(f"data.tokenizer: {path} is not a sentencepiece model ({error})") from error
        self.vocab_size = int(self._processor.vocab_size())
        self.document_end = int(self._processor.eos_id())
        self.files = {"tokenizer.model": model}
        self.fingerprint = hashlib.sha256(b"sentencepiece\0" + model).hexdigest()
        if self.document_end < 0:
            raise ValueError(f"data.tokenizer: {path} has no end-of-sentence token; train it with eos_id=2 or another free id")

    def encode(self, text: str) -> np.ndarray:
        return np.array(self._processor.encode(text), dtype=np.int32)

    def decode(self, tokens: Sequence[int] | np.ndarray) -> str:
        return str(self._processor.decode(np.asarray(tokens, dtype=np.int64).tolist()))


def load_tokenizer(spec: str) -> Tokenizer:
    """The tokenizer of `data.tokenizer`: "bytes", or the path of a sentencepiece model file.

    Raises FileNotFoundError where there is no such file, ValueError where it is no usable model.
    """
    if spec == "bytes":
        return BytesTokenizer()
    path = Path(spec)
    if not path.is_file():
        raise FileNotFoundError(f'data.tokenizer: no file {spec!r}; give "bytes" or the path of a sentencepiece .model file')
    return SentencePieceTokenizer(path)
