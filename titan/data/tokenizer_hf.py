"""Hugging Face's tokenizer.json, read by their `tokenizers` library.

The file says how text becomes ids, but not which token ends a document. That is the eos_token of tokenizer_config.json
beside it; else the first eos_token_id of generation_config.json or config.json; else a token of a well-known name.
A post-processor of the file (a start token put before each text) is not applied, and special tokens in the text are text.

A chat template is the content of chat_template.jinja beside the file, else the chat_template of tokenizer_config.json: of
several the one named default. The names of tokens that it may use are in tokenizer_config.json, too.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from titan.data.tokenizer import as_array, ids_below, utf8

if TYPE_CHECKING:
    import tokenizers

MODEL, CONFIG, TEMPLATE = "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"
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
        if path.with_name(TEMPLATE).is_file():
            self.files[TEMPLATE] = path.with_name(TEMPLATE).read_bytes()
        eos = self._tokenizer.id_to_token(self.document_end)
        self.chat = _chat({**config, "eos_token": config.get("eos_token") or eos}, self.files.get(TEMPLATE), path)
        self.special, self.strips = _special(self._tokenizer, self.chat)
        self._behind: dict[bool, tokenizers.Tokenizer] = {}

    def encode(self, text: str) -> np.ndarray:
        return _encode(self._tokenizer, text)

    def encode_behind(self, text: str, special: bool) -> np.ndarray:
        if special not in self._behind:
            self._behind[special] = _without_space(self._tokenizer, special)
        return _encode(self._behind[special], text)

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


def _encode(tokenizer: tokenizers.Tokenizer, text: str) -> np.ndarray:
    utf8(text)  # the library's own error says that a str is no str
    # Of the library's calls only this one leaves out the offsets, a quarter of the time.
    return as_array(tokenizer.encode_batch_fast([text], add_special_tokens=False)[0].ids)


def _special(tokenizer: tokenizers.Tokenizer, chat: dict[str, str]) -> tuple[dict[str, int], dict[str, tuple[bool, bool]]]:
    """`Tokenizer.special` and `Tokenizer.strips`."""
    special, strips = {}, {}
    for key, spelling in chat.items():
        number = tokenizer.token_to_id(spelling)
        if key != "chat_template" and number is not None:
            special[spelling] = int(number)  # transformers makes it special, whatever the file says
    for number, token in tokenizer.get_added_tokens_decoder().items():
        if token.content and (token.special or token.content in special):
            special[token.content] = int(number)
            if token.lstrip or token.rstrip:
                strips[token.content] = (bool(token.lstrip), bool(token.rstrip))
    return special, strips


def _without_space(tokenizer: tokenizers.Tokenizer, special: bool) -> tokenizers.Tokenizer:
    """The tokenizer for a text behind a special token, or behind other text: without what it puts before that.

    Of a text between special tokens the library takes the start for a text's start, unless prepend_scheme is "first".
    """
    import tokenizers

    raw = tokenizer.to_str()
    file = json.loads(raw)
    for step in (*_steps(file["normalizer"]), *_steps(file["pre_tokenizer"])):
        if step["type"] == "Metaspace" and not (special and step["prepend_scheme"] == "always"):
            step["prepend_scheme"] = "never"
        elif step["type"] == "Prepend" and not special:
            step["prepend"] = ""
        elif step["type"] == "ByteLevel" and not special:
            step["add_prefix_space"] = False
    if file == json.loads(raw):
        return tokenizer
    other = tokenizers.Tokenizer.from_str(json.dumps(file))
    other.encode_special_tokens = True
    return other


def _steps(step: dict[str, Any] | None) -> Iterator[dict[str, Any]]:
    """A step of the file, and those that it is made of."""
    if step is not None:
        yield step
        for inner in (*step.get("normalizers", ()), *step.get("pretokenizers", ())):
            yield from _steps(inner)


def _chat(config: dict[str, Any], template: bytes | None, path: Path) -> dict[str, str]:
    """`Tokenizer.chat` of tokenizer_config.json and of chat_template.jinja, where there is one."""
    spellings = {key: _content(value) for key, value in config.items() if key.endswith("_token")}
    found = {key: spelling for key, spelling in spellings.items() if spelling}
    given = config.get("chat_template")
    if isinstance(given, list):
        named = {item["name"]: item.get("template") for item in given if isinstance(item, dict) and "name" in item}
        given = named.get("default")
    if isinstance(given, str):
        found["chat_template"] = given
    if template is not None:
        try:
            found["chat_template"] = template.decode()
        except UnicodeDecodeError as error:
            raise ValueError(f"data.tokenizer: {path.with_name(TEMPLATE)} is no UTF-8 ({error})") from error
    return found


def _content(token: Any) -> str | None:
    """How a token of tokenizer_config.json is spelled; None where this is no token."""
    spelling = token.get("content") if isinstance(token, dict) else token
    return spelling if isinstance(spelling, str) else None


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
