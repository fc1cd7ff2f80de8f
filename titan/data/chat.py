"""Chats: a conversation as token ids, and which of them belong to an assistant's turn.

A chat model reads one text: its chat template, a program in Jinja, writes the messages of a conversation one after the other,
each between the special tokens that the model knows. The language and what templates may ask for are described in
https://huggingface.co/docs/transformers/chat_templating. Trained on, only what the model is to write itself counts in the loss,
the assistant's turns; the rest is context (Touvron et al. 2023, arXiv:2307.09288, section 3.1).

Where a turn is: let R(m) be the text of the messages m, and R+(m) the same with the start of an assistant's answer behind it
(add_generation_prompt), which is what a model is asked to continue. The turn of message k is what R(m[1..k]) has behind
R+(m[1..k-1]): the content and what closes it. This needs no marks in the template, but that it appends: R(m[1..k]) must
start with R+(m[1..k-1]), and the whole text with R(m[1..k]). What does not is refused.

The text is cut where turns begin and end, and each part is encoded alone: a prompt gives the ids that a model gets when it is
asked, and no token is half a turn's.

Contents are text. Before the template sees them, a character that no text has (a Unicode noncharacter) is put into every
spelling of a special token, and taken out when the rendered text has been cut at those spellings that are left. So only the
template writes special tokens. Otherwise, and but for the cuts, the ids are those of transformers' apply_chat_template.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from titan.data.chat_template import compiled
from titan.data.tokenizer import Tokenizer, utf8

MOST_MESSAGES = 1000  # the whole is rendered for each turn, so time grows with the square
VERSION = 1  # of the rules above: others give other ids
NONCHARACTERS = [chr(code) for code in range(0xFDD0, 0xFDF0)]
NOTHING = "(?!)"  # the regular expression that is found nowhere


class ChatError(ValueError):
    """A conversation that cannot be used. The message says why, and not where it is."""


class Encoded(NamedTuple):
    """A conversation as tokens."""

    ids: np.ndarray
    """int32 [tokens]; the last one ends the document."""
    counted: np.ndarray
    """bool [tokens]: whether the token is of an assistant's turn."""
    size: int
    """UTF-8 bytes of the messages' contents."""


class Chat:
    """A chat template with a tokenizer. A copy sent to another process is made there anew."""

    def __init__(self, template: str, tokenizer: Tokenizer) -> None:
        """template: Jinja. Raises ValueError where it is none."""
        self.template, self.tokenizer = template, tokenizer
        self._names = {key: spelling for key, spelling in tokenizer.chat.items() if key != "chat_template"}
        identity = json.dumps([VERSION, template, sorted(self._names.items())])
        self.fingerprint = hashlib.sha256(identity.encode()).hexdigest()
        """Hex SHA-256 of the template and of the spellings that it may ask for."""
        self._template = compiled(template)
        spellings = sorted(tokenizer.special)
        for spelling in spellings:
            if len(spelling) == 1:
                raise ValueError(f"the special token {spelling!r} is one character, which no content could have as text")
        self._special = re.compile(f"({_any_of(spellings)})")
        # Only the first character is taken, so that a spelling which begins inside another is found, too.
        rests = {first: [s[1:] for s in spellings if s[0] == first] for first in sorted({s[0] for s in spellings})}
        self._first = re.compile("|".join(f"{re.escape(a)}(?={_any_of(rest)})" for a, rest in rests.items()) or NOTHING)

    def __reduce__(self) -> tuple[Any, ...]:
        return Chat, (self.template, self.tokenizer)

    def encode(self, row: Mapping[str, Any]) -> Encoded:
        """A conversation's tokens: row["messages"], and row["tools"] where it has some; what else it has is not looked at.

        tokenizer.document_end is put behind them unless the template has; what no template wrote is not counted.
        A key of a message that is None is left out, as transformers does. Raises ChatError.
        """
        messages, tools = _checked(row)
        try:
            size = sum(len(utf8(message.get("content", ""))) for message in messages)
            known = json.dumps([self.template, messages, tools], ensure_ascii=False, default=str)
            breaker = next((mark for mark in NONCHARACTERS if mark not in known), None)
            if breaker is None:
                raise ChatError("it has all noncharacters from U+FDD0 to U+FDEF, of which one must be free")
            text, borders = self._render(messages, self._broken(messages, breaker), self._broken(tools, breaker))
            parts = self._parts(text, borders, breaker)
        except ChatError:
            raise
        except (ValueError, RecursionError) as error:  # half a character; lists in lists in lists
            raise ChatError(str(error)) from error
        ids = np.concatenate(parts)
        counted = np.repeat(np.arange(len(parts)) % 2 == 1, [len(part) for part in parts])  # turns are every second part
        if not counted.any():
            raise ChatError("the chat template writes nothing for the assistant's turns")
        if ids[-1] != self.tokenizer.document_end:
            ids, counted = np.append(ids, np.int32(self.tokenizer.document_end)), np.append(counted, False)
        return Encoded(ids, counted, size)

    def _render(self, messages: list[Any], broken: list[Any], tools: Any) -> tuple[str, list[int]]:
        """The conversation's text, and its borders: 0, each turn's start and end, its length."""
        text, borders = self._text(broken, tools, False), [0]
        for number, message in enumerate(messages, start=1):
            if message["role"] != "assistant":
                continue
            before = self._text(broken[: number - 1], tools, True)
            after = text if number == len(messages) else self._text(broken[:number], tools, False)
            if not after.startswith(before):
                raise ChatError(
                    f"the chat template does not write message {number}, an assistant's, behind its generation prompt, so that "
                    "nothing tells which tokens are the answer's; give a template that does"
                )
            if not text.startswith(after) or len(before) < borders[-1]:
                raise ChatError(
                    f"the chat template writes the messages up to number {number}, an assistant's, in another way when more "
                    "follow; give a template that only appends, or conversations that end with their first answer"
                )
            borders += [len(before), len(after)]
        return text, [*borders, len(text)]

    def _text(self, messages: list[Any], tools: Any, prompt: bool) -> str:
        """What the template writes."""
        try:
            return self._template.render(messages=messages, tools=tools, add_generation_prompt=prompt, **self._names)
        except Exception as error:  # whatever a program can do wrong
            date = "; give one with a fixed date" if "strftime_now" in str(error) else ""
            raise ChatError(f"the chat template does not take it: {str(error) or type(error).__name__}{date}") from error

    def _broken(self, value: Any, breaker: str) -> Any:
        """A value of a row with `breaker` behind the first character of what spells a special token."""
        if isinstance(value, str):
            return self._first.sub(lambda found: found[0] + breaker, value)
        if isinstance(value, Mapping):
            return {self._broken(key, breaker): self._broken(item, breaker) for key, item in value.items()}
        return [self._broken(item, breaker) for item in value] if isinstance(value, list) else value

    def _parts(self, text: str, borders: list[int], breaker: str) -> list[np.ndarray]:
        """The ids of what is between two borders each, int32 [tokens]."""
        tokenizer, neither, parts = self.tokenizer, (False, False), []
        behind: str | None = None  # the special token before a piece; "" for other text, None for nothing
        for start, end in pairwise(borders):
            ids = [np.zeros(0, dtype=np.int32)]
            pieces = self._special.split(text[start:end])  # text, special token, text and so on
            for i, piece in enumerate(pieces):
                if i % 2:
                    ids.append(np.array([tokenizer.special[piece]], dtype=np.int32))
                    behind = piece
                    continue
                if behind and tokenizer.strips.get(behind, neither)[1]:
                    piece = piece.lstrip()
                if i + 1 < len(pieces) and tokenizer.strips.get(pieces[i + 1], neither)[0]:
                    piece = piece.rstrip()
                piece = piece.replace(breaker, "")
                if piece:
                    ids.append(tokenizer.encode(piece) if behind is None else tokenizer.encode_behind(piece, behind != ""))
                    behind = ""
            parts.append(np.concatenate(ids))
        return parts


def load_chat(spec: str, tokenizer: Tokenizer) -> Chat:
    """The chat template of `data.chat_template`: the path of a Jinja file, or "" for the tokenizer's own.

    Raises ValueError where there is none, or where it is no valid Jinja.
    """
    if spec:
        try:
            template = Path(spec).read_bytes().decode()
        except OSError as error:
            raise ValueError(f"data.chat_template: {spec!r} cannot be read ({error.strerror}); give a Jinja file") from error
        except UnicodeDecodeError as error:
            raise ValueError(f"data.chat_template: {spec!r} is no UTF-8 text ({error}); give a Jinja file") from error
    elif "chat_template" in tokenizer.chat:
        template = tokenizer.chat["chat_template"]
    else:
        raise ValueError(
            "data.chat_template: the tokenizer has no chat template; give the path of a Jinja file, "
            "or a tokenizer.json with a chat_template.jinja beside it"
        )
    try:
        return Chat(template, tokenizer)
    except ValueError as error:
        raise ValueError(f"data.chat_template: {repr(spec) if spec else 'the template of the tokenizer'}: {error}") from error


def _checked(row: Mapping[str, Any]) -> tuple[list[dict[str, Any]], list[Any] | None]:
    """The messages, without what is None, and the tools. ChatError unless they are a conversation with an answer."""
    messages, tools = row.get("messages"), row.get("tools")
    if not isinstance(messages, list) or not messages:
        raise ChatError('it has no "messages", a list of at least one')
    if not (tools is None or isinstance(tools, list)):
        raise ChatError('its "tools" are no list')
    if len(messages) > MOST_MESSAGES:
        raise ChatError(f"it has {len(messages):,} messages, more than {MOST_MESSAGES:,}; make several conversations of it")
    found = []
    for number, message in enumerate(messages, start=1):
        if not isinstance(message, Mapping):
            raise ChatError(f"message {number} is no object")
        message = {key: value for key, value in message.items() if value is not None}
        if not isinstance(message.get("role"), str):
            raise ChatError(f'message {number} has no "role" that is a string')
        if not isinstance(message.get("content", "" if message.get("tool_calls") else None), str):
            raise ChatError(f'message {number} has no "content" that is a string')
        found.append(message)
    if all(message["role"] != "assistant" for message in found):
        raise ChatError("no message is an assistant's")
    return found, tools


def _any_of(words: list[str]) -> str:
    """A regular expression of the longest word that fits. It reads a character once, where a list would be tried one by one."""
    rests: dict[str, list[str]] = {}
    for word in words:
        rests.setdefault(word[:1], []).append(word[1:])
    longer = [re.escape(first) + _any_of(rest) for first, rest in rests.items() if first]
    if "" in rests:  # a word ends here
        return f"(?:{'|'.join(longer)})?" if longer else ""
    return f"(?:{'|'.join(longer)})" if longer else NOTHING
