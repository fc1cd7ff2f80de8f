"""Files of tiktoken ranks, as Llama 3's tokenizer.model is one: a line a token, its bytes in base64 and its rank.

The text is cut by a regular expression into words, and in each word the two neighbours whose concatenation has the lowest
rank become one, again and again (byte pair encoding: Sennrich et al. 2016, arXiv:1508.07909). The rank is the id.
The file has only the ranks. The expression and the 256 special tokens after the ranks are Llama 3's, whatever the number of
ranks: llama/tokenizer.py in https://github.com/meta-llama/llama3. `<|end_of_text|>` ends a document.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from titan.data.tokenizer import as_array, ids_below, utf8

PATTERN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
DOCUMENT_START, DOCUMENT_END = "<|begin_of_text|>", "<|end_of_text|>"
SPECIALS = [
    DOCUMENT_START,
    DOCUMENT_END,
    *(f"<|reserved_special_token_{i}|>" for i in range(4)),
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|reserved_special_token_4|>",
    "<|eot_id|>",
    *(f"<|reserved_special_token_{i}|>" for i in range(5, 251)),
]
# On a million of them the regular expression overflows its stack. Real text has no run of so many.
WHITE_SPACE = 100_000
LONG_WHITE_SPACE = re.compile(rf"(?<!\s)\s{{{WHITE_SPACE},}}")


class TiktokenTokenizer:
    """Tiktoken ranks with Llama 3's words and special tokens. `path` says where the file's bytes are from.

    `ranks`: a token's bytes -> its id.
    """

    def __init__(self, model: bytes, path: Path) -> None:
        try:
            import tiktoken
        except ImportError as error:
            raise ValueError(f"data.tokenizer: {path} has tiktoken ranks; to read them: pip install tiktoken") from error
        self.ranks = _read(model, path)
        self.document_end = len(self.ranks) + SPECIALS.index(DOCUMENT_END)
        self.vocab_size = len(self.ranks) + len(SPECIALS)
        self.fingerprint = hashlib.sha256(b"tiktoken\0" + model).hexdigest()
        self.files = {"tokenizer.model": model}
        self.special = {name: len(self.ranks) + i for i, name in enumerate(SPECIALS)}
        self.strips: dict[str, tuple[bool, bool]] = {}
        self.chat = {"bos_token": DOCUMENT_START, "eos_token": DOCUMENT_END}
        self._encoding = tiktoken.Encoding(path.name, pat_str=PATTERN, mergeable_ranks=self.ranks, special_tokens=self.special)

    def encode(self, text: str) -> np.ndarray:
        utf8(text)  # tiktoken would put U+FFFD for what is no Unicode
        return as_array([token for part in _parts(text) for token in self._encoding.encode_ordinary(part)])

    def encode_behind(self, text: str, special: bool) -> np.ndarray:
        return self.encode(text)

    def decode(self, tokens: Sequence[int] | np.ndarray) -> str:
        return self._encoding.decode(ids_below(tokens, len(self.ranks)))


def _read(model: bytes, path: Path) -> dict[bytes, int]:
    """Token -> rank. ValueError unless every byte is a token and the ranks are 0, 1, 2 and so on."""
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(model.splitlines(), start=1):
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except ValueError as error:
            raise ValueError(f"data.tokenizer: {path}, line {number}: {line[:40]!r} is no base64 and rank") from error
    if sorted(ranks.values()) != list(range(len(ranks))):
        raise ValueError(f"data.tokenizer: {path} is damaged: the ranks of its {len(ranks)} tokens are not 0, 1, 2 and so on")
    missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
    if missing:
        raise ValueError(f"data.tokenizer: {path}: {len(missing)} of the 256 bytes are no tokens, {missing[0]} is the first")
    return ranks


def _parts(text: str) -> Iterator[str]:
    """The text, cut only inside runs of white space longer than WHITE_SPACE."""
    start = 0
    for run in LONG_WHITE_SPACE.finditer(text):
        for cut in range(run.start() + WHITE_SPACE, run.end(), WHITE_SPACE):
            yield text[start:cut]
            start = cut
    yield text[start:]
