"""What the reader's terminal can show: its width, colours and characters.

Colour and redrawing are for a terminal alone: a pipe, a file or a CI log gets plain lines. NO_COLOR (no-color.org), set to
anything, switches colour off; TERM=dumb stands for a terminal that knows no escape codes at all. Nothing here imports torch.
"""

from __future__ import annotations

import os
import re
import sys
import textwrap
from typing import TextIO

ESCAPES = re.compile(r"\x1b\[[0-9;?]*[ -/]*[@-~]")
BOLD, DIM, RESET = "\x1b[1m", "\x1b[2m", "\x1b[0m"


def is_terminal(stream: TextIO) -> bool:
    """Whether a person looks at the stream through a terminal that understands escape codes."""
    return stream.isatty() and os.environ.get("TERM") != "dumb"


def has_colours(stream: TextIO) -> bool:
    """Whether to colour what goes to the stream."""
    return is_terminal(stream) and not os.environ.get("NO_COLOR")


def columns(stream: TextIO, otherwise: int) -> int:
    """Width of the stream's terminal (COLUMNS, where it is set), or `otherwise` where the stream is no terminal."""
    if not stream.isatty():
        return otherwise
    try:
        return asked("COLUMNS") or os.get_terminal_size(stream.fileno()).columns or 80
    except (OSError, ValueError):
        return 80


def lines(stream: TextIO) -> int | None:
    """Height of the stream's terminal (LINES, where it is set), or None where the stream is no terminal."""
    if not stream.isatty():
        return None
    try:
        return asked("LINES") or os.get_terminal_size(stream.fileno()).lines or 24
    except (OSError, ValueError):
        return 24


def asked(variable: str) -> int | None:
    """A whole number above 0 in an environment variable, or None."""
    said = os.environ.get(variable, "")
    return int(said) or None if said.isdecimal() else None


def plain(text: str) -> str:
    """The text without escape codes for colour and cursor."""
    return ESCAPES.sub("", text)


def showable(text: str, stream: TextIO) -> str:
    """Text of unknown origin, made safe to print: control characters and what the stream cannot encode become "?" or U+FFFD.

    A model's sample may hold anything, an escape code that repaints the terminal included.
    """
    safe = "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in text)
    encoding = stream.encoding or "utf-8"
    return safe.encode(encoding, "replace").decode(encoding)


def beside(lead: str, text: str, width: int) -> str:
    """A lead and a text beside it, wrapped within `width` columns; its line breaks and blanks count, as in code."""
    wrapper = textwrap.TextWrapper(
        max(width, 20) - len(lead), drop_whitespace=False, replace_whitespace=False, tabsize=4, break_on_hyphens=False
    )
    rows = [row.rstrip() for line in text.split("\n") for row in wrapper.wrap(line) or [""]]
    return "\n".join(f"{' ' * len(lead) if i else lead}{row}".rstrip() for i, row in enumerate(rows))


def labelled(label: str, text: str, width: int) -> str:
    """A label of at most 8 characters and a text that wraps beside it, within `width` columns where words allow."""
    wrapper = textwrap.TextWrapper(
        max(width, 20), initial_indent=f"{label:9}", subsequent_indent=" " * 9, break_long_words=False, break_on_hyphens=False
    )
    return wrapper.fill(text)


def plural(number: int, noun: str) -> str:
    """1 document, 1,234 documents."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def warn(text: str) -> None:
    """Say something, on stderr, that is not to be missed."""
    bar = "!" * min(columns(sys.stderr, 120), 120)
    print(f"{bar}\n! titan: {text}\n{bar}", file=sys.stderr, flush=True)
