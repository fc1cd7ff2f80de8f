"""Tokenizers: text to token ids and back.

Four are known. `bytes` has one token for each byte of the UTF-8 text and one more, 256, that ends a document: nothing to
train, nothing to download. The others are read from a file, which is told by its content: a sentencepiece model, Hugging
Face's tokenizer.json, a file of tiktoken ranks.

All encode text and only text: a text that spells `</s>` gives the tokens of those four characters. The token that ends a
document is put between documents by whoever writes the shards, so no document can end itself. Special tokens come into a
conversation from its chat template alone: `titan.data.chat` looks for their spellings, and encodes what is between them.

`fingerprint` is a hash of all that decides the token ids; shards carry it, and a dataset of another tokenizer is refused.
"""

from __future__ import annotations

import hashlib
import re
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

FILES = ("tokenizer.json", "tokenizer.model")
"""What is looked for in a folder, in this order."""
DOCUMENT_END = "<|end_of_text|>"
"""How 256 of `bytes` is spelled where a name is needed."""


class Tokenizer(Protocol):
    """What the rest of titan knows of a tokenizer."""

    vocab_size: int
    """Token ids are in [0, vocab_size)."""
    document_end: int
    """The token that ends a document."""
    fingerprint: str
    """Hex SHA-256 of the kind and of all that decides the ids: where there is one, the model file's bytes."""
    files: dict[str, bytes]
    """What to keep beside a checkpoint, file name -> contents; the first is what `load_tokenizer` reads. {} for bytes."""
    special: dict[str, int]
    """Spelling -> id of the special tokens: those that transformers takes out of a text unless split_special_tokens=True."""
    strips: dict[str, tuple[bool, bool]]
    """Of special tokens that take white space along: spelling -> whether that before it, and that behind it."""
    chat: dict[str, str]
    """What a chat template may ask for: eos_token and others, with their spellings; and chat_template, where there is one."""

    def encode(self, text: str) -> np.ndarray:
        """The text's token ids, int32 [tokens], without any special token. ValueError where the text is no valid Unicode."""

    def encode_behind(self, text: str, special: bool) -> np.ndarray:
        """As `encode`, of a text that stands behind a special token (special=True) or behind other text (False).

        Some tokenizers put a space before a text: this never does behind other text, and behind a special token where the
        tokenizer's file says so.
        """

    def decode(self, tokens: Sequence[int] | np.ndarray) -> str:
        """The text of the tokens; bytes that are no UTF-8 give U+FFFD. Special tokens and ids that are no token have none."""


class BytesTokenizer:
    """One token a byte of UTF-8; 256 ends a document."""

    vocab_size = 257
    document_end = 256
    fingerprint = hashlib.sha256(b"bytes").hexdigest()

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.special = {DOCUMENT_END: self.document_end}
        self.strips: dict[str, tuple[bool, bool]] = {}
        self.chat = {"eos_token": DOCUMENT_END}

    def encode(self, text: str) -> np.ndarray:
        return np.frombuffer(utf8(text), dtype=np.uint8).astype(np.int32)

    def encode_behind(self, text: str, special: bool) -> np.ndarray:
        return self.encode(text)

    def decode(self, tokens: Sequence[int] | np.ndarray) -> str:
        return bytes(ids_below(tokens, self.document_end)).decode("utf-8", errors="replace")


def load_tokenizer(spec: str) -> Tokenizer:
    """The tokenizer of `data.tokenizer`: "bytes", the path of a tokenizer's file, or of a folder that holds one.

    Raises FileNotFoundError where there is no such file, ValueError where it is no usable tokenizer.
    """
    if spec == "bytes":
        return BytesTokenizer()
    path = Path(spec)
    if path.is_dir():
        found = [path / name for name in FILES if (path / name).is_file()]
        if not found:
            raise FileNotFoundError(f"data.tokenizer: the folder {spec!r} holds neither {' nor '.join(FILES)}")
        path = found[0]
    if not path.is_file():
        raise FileNotFoundError(
            f'data.tokenizer: no file {spec!r}; give "bytes", or the path of a sentencepiece .model file, of a tokenizer.json, '
            "of tiktoken ranks, or of a folder with one of them"
        )
    model = path.read_bytes()
    # Each kind needs its own package, and only those who use it need that.
    if re.match(rb"\s*\{", model):
        from titan.data.tokenizer_hf import HuggingFaceTokenizer

        return HuggingFaceTokenizer(model, path)
    if re.match(rb"[A-Za-z0-9+/]+={0,2} [0-9]+\s", model):
        from titan.data.tokenizer_tiktoken import TiktokenTokenizer

        return TiktokenTokenizer(model, path)
    from titan.data.tokenizer_sentencepiece import SentencePieceTokenizer

    return SentencePieceTokenizer(model, path)


def utf8(text: str) -> bytes:
    """The text's UTF-8. A lone surrogate, half of a character, has none: ValueError."""
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"the text is no valid Unicode: {text[error.start]!r} at character {error.start} is half of a surrogate pair; "
            'read the text with errors="replace"'
        ) from error


def as_array(ids: list[int]) -> np.ndarray:
    """int32 [tokens]; by way of `array`, which takes a third of the time that numpy takes to look at a list."""
    return np.frombuffer(array("i", ids), dtype=np.int32)


def ids_below(tokens: Sequence[int] | np.ndarray, end: int) -> list[int]:
    """The ids in [0, end). A model may have more rows than its tokenizer has tokens, and may so sample others."""
    ids = np.asarray(tokens, dtype=np.int64)
    return [int(token) for token in ids[(ids >= 0) & (ids < end)]]
