"""One string out of a JSON object that is too long to be held: a line of JSONL may be a whole library.

`json.loads` needs the line, and the text made of it, in memory. Here the line comes in pieces. All strings longer than a limit
are taken out of it, and what is left, the skeleton, is short: it is parsed at the end, so that a line which is no JSON is found
out as any other. Only the wanted string's contents are passed on, decoded piece by piece.

Whether a long string is the wanted one is decided where it begins: the skeleton so far, with the string and a brace to close
it, is a JSON object exactly if we stand at its top level, and then the key that has the string is the last one.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from typing import Any

KEPT = 1 << 16
"""Bytes of a string that stay in the skeleton."""
SKELETON = 1 << 22
PLAIN = re.compile(rb'[^"]*+')
STRING = re.compile(rb'[^"\\]*+(?:\\.[^"\\]*+)*+', re.DOTALL)
MARK = "\0long"
ESCAPE = 12  # bytes of the longest thing that must not be cut: two surrogates


def long_string(pieces: Iterable[bytes], field: str) -> Iterator[Any]:
    """The parts of the string under `field` of one JSON object, in order; or, where that is short or no string, its value.

    pieces: the object's bytes, UTF-8. Raises ValueError, perhaps after some parts, where it is no JSON, not UTF-8 or no object,
    and KeyError where it has no such field.
    """
    skeleton, rest, found = bytearray(), b"", 0
    kind = ""  # of the string that we are in: kept so far, wanted, left out
    for piece in pieces:
        rest, at = rest + piece, 0
        while True:
            if not kind:
                end = PLAIN.match(rest, at).end()  # type: ignore[union-attr]
                skeleton += rest[at:end]
                if len(skeleton) > SKELETON:
                    raise ValueError(f"it holds more than {SKELETON >> 20} MiB beside its long strings")
                if end == len(rest):
                    rest = b""
                    break
                kind, at = "kept", end + 1
            end = STRING.match(rest, at).end()  # type: ignore[union-attr]
            closed = rest[end : end + 1] == b'"'
            if kind == "kept":
                if not closed and len(rest) - at <= KEPT:
                    rest = rest[at:]
                    break
                if closed and end - at <= KEPT:
                    skeleton += b'"' + rest[at : end + 1]
                    kind, at = "", end + 1
                    continue
                wanted = _key(skeleton) == field
                found += wanted
                kind = "wanted" if wanted else "left out"
                skeleton += json.dumps(MARK).encode()
            text, used = _decoded(rest[at:end], whole=closed)  # whoever is left out may be broken, too
            if kind == "wanted":
                yield text
            if not closed:
                rest = rest[at + used :]
                break
            kind, at = "", end + 1
    if kind:
        raise ValueError("a string has no end")
    value = json.loads(skeleton)
    if not isinstance(value, dict):
        raise ValueError("it is no object")
    if not found:
        yield value[field]
    elif found > 1 or value.get(field) != MARK:
        raise ValueError(f"it has {field!r} twice")


def _key(skeleton: bytearray) -> str | None:
    """The key of the string that begins behind the skeleton, if it is a value of the outermost object."""
    try:
        value = json.loads(bytes(skeleton) + json.dumps(MARK).encode() + b"}")
    except ValueError:
        return None
    return next((key for key, one in reversed(value.items()) if one == MARK), None) if isinstance(value, dict) else None


def _decoded(raw: bytes, whole: bool) -> tuple[str, int]:
    """The text of a string's contents, and how many bytes were used: those at the end may be half of something."""
    for cut in range(len(raw), -1 if whole else max(-1, len(raw) - ESCAPE - 1), -1):
        try:
            text = json.loads(b'"' + raw[:cut] + b'"')
        except ValueError:
            if whole:
                raise
            continue
        if whole or not "\ud800" <= text[-1:] <= "\udbff":
            return text, cut
    if len(raw) > ESCAPE:
        json.loads(b'"' + raw[:-ESCAPE] + b'"')  # raises what is wrong
        raise ValueError("a string is no JSON")
    return "", 0
