"""Sentencepiece models (Kudo and Richardson 2018, arXiv:1808.06226); the end-of-sentence token ends a document."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import sentencepiece

from titan.data.tokenizer import as_array, ids_below, utf8


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
        self.special = {self._processor.id_to_piece(i): i for i in range(self.vocab_size) if self._processor.is_control(i)}
        self.strips: dict[str, tuple[bool, bool]] = {}
        ids = {name: getattr(self._processor, f"{name}_id")() for name in ("bos", "eos", "unk", "pad")}
        self.chat = {f"{name}_token": self._processor.id_to_piece(i) for name, i in ids.items() if i >= 0}
        self._bare: sentencepiece.SentencePieceProcessor | None = None
        self.fingerprint = hashlib.sha256(b"sentencepiece\0" + model).hexdigest()
        self.files = {"tokenizer.model": model}
        if self.document_end < 0:
            raise ValueError(f"data.tokenizer: {path} has no end-of-sentence token; train it with eos_id=2 or another free id")

    def encode(self, text: str) -> np.ndarray:
        return as_array(self._processor.encode(utf8(text)))

    def encode_behind(self, text: str, special: bool) -> np.ndarray:
        if special:
            return self.encode(text)
        if self._bare is None:
            self._bare = _without_space(self.files["tokenizer.model"])
        return as_array(self._bare.encode(utf8(text)))

    def decode(self, tokens: Sequence[int] | np.ndarray) -> str:
        return str(self._processor.decode(ids_below(tokens, self.vocab_size)))


def _without_space(model: bytes) -> sentencepiece.SentencePieceProcessor:
    """The model without the space that it may put before a text."""
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]  # made when the module is imported
    proto.ParseFromString(model)
    proto.normalizer_spec.add_dummy_prefix = False
    processor = sentencepiece.SentencePieceProcessor()
    processor.LoadFromSerializedProto(proto.SerializeToString())
    return processor
