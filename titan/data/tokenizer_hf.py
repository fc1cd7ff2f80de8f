"""Hugging Face's tokenizer.json, read by their `tokenizers` library.

The file says how text becomes ids, but not which token ends a document. That is the eos_token of tokenizer_config.json
beside it; else the first eos_token_id of generation_config.json or config.json; else a token of a well-known name.
A post-processor of the file (a start token put before each text) is not applied, and special tokens in the text are text.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from titan.data.tokenizer import ids_below, utf8

if TYPE_CHECKING:
    import tokenizers

MODEL, CONFIG = "tokenizer.json", "tokenizer_config.json"
DOCUMENT_ENDS = ("<|end_of_text|>", "<|endoftext|>", "</s>", "<eos>")


class HuggingFaceTokenizer:
    """A tokenizer.json. `path` says where its bytes are from, and beside which files to look for the document's end."""

    def __init__(self, model: bytes, path: Path) -> None:
        try:
            import tokenizers
        except ImportError as error:
            raise ValueError(f"data.tokenizer: {path} is a tokenizer.json; to read it: pip install tokenizers") from error
        try:
            self._tokenizer = tokenizers.Tokenizer.from_buffer(model)
        except Exception as error:  # the library raises nothing narrower
            raise ValueError(f"data.tokenizer: {path} is no tokenizer.json that tokenizers can read ({error})") from error
        self._tokenizer.encode_special_tokens = True  # their spellings are text
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        config = _read(path.with_name(CONFIG))
        self.document_end = _document_end(self._tokenizer, config, path)
        self.vocab_size = max(self._tokenizer.get_vocab(with_added_tokens=True).values()) + 1
        self.fingerprint = hashlib.sha256(b"tokenizers\0%d\0" % self.document_end + model).hexdigest()
        self.files = {MODEL: model, CONFIG: self._config_file(config, path)}

    def encode(self, text: str) -> np.ndarray:
        utf8(text)  # the library's own error says that a str is no str
        # Of the library's calls only this one leaves out the offsets, a quarter of the time.
        encoding = self._tokenizer.encode_batch_fast([text], add_special_tokens=False)[0]
        return np.array(encoding.ids, dtype=np.int32)

    def decode(self, tokens: Sequence[int] | np.ndarray) -> str:
        ids = [token for token in ids_below(tokens, self.vocab_size) if token != self.document_end]
        return str(self._tokenizer.decode(ids, skip_special_tokens=True))

    def _config_file(self, config: dict[str, Any], path: Path) -> bytes:
        """tokenizer_config.json as it is where it says what ends a document, else with that added."""
        if config.get("eos_token"):
            return path.with_name(CONFIG).read_bytes()
        plain = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
        eos = self._tokenizer.id_to_token(self.document_end)
        return json.dumps({**plain, **config, "eos_token": eos}, indent=2, ensure_ascii=False).encode()


def _read(path: Path) -> dict[str, Any]:
    """A JSON file's object; {} where there is no such file."""
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"data.tokenizer: {path} is no JSON ({error})") from error
    if not isinstance(found, dict):
        raise ValueError(f"data.tokenizer: {path} holds no object")
    return found


def _document_end(tokenizer: tokenizers.Tokenizer, config: dict[str, Any], path: Path) -> int:
    """The id of the token that ends a document; ValueError where nothing says which one."""
    name = config.get("eos_token")
    if name:
        found = tokenizer.token_to_id(str(name["content"] if isinstance(name, dict) else name))
        if found is None:
            raise ValueError(f"data.tokenizer: {path} has no token {name!r}, the eos_token of {path.with_name(CONFIG)}")
        return found
    for other in ("generation_config.json", "config.json"):
        listed = _read(path.with_name(other)).get("eos_token_id")
        first = listed[0] if isinstance(listed, list) and listed else listed
        if isinstance(first, int):
            if tokenizer.id_to_token(first) is None:
                raise ValueError(f"data.tokenizer: {path} has no token {first}, the eos_token_id of {path.with_name(other)}")
            return first
    added = {token.content: number for number, token in tokenizer.get_added_tokens_decoder().items()}
    for known in DOCUMENT_ENDS:
        if known in added:
            return added[known]
    raise ValueError(
        f"data.tokenizer: nothing says which token of {path} ends a document; "
        f'put {CONFIG} beside it with "eos_token": one of its tokens'
    )
