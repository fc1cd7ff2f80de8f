"""A TOML file's text with some keys changed, and all else as it was: comments, order, blank lines. No torch."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import tomli

from titan.toml import to_toml


def with_keys(text: str, values: Mapping[str, Any]) -> str:
    """The text with table.key -> value set. A key that is there keeps its line and comment; others are added to their table.

    Raises ValueError where the text spells a table in a way that this does not edit (inline, or with dotted keys).
    """
    newline = "\r\n" if "\r\n" in text else "\n"
    lines = text.removesuffix(newline).split(newline)
    for name, value in values.items():
        table, key = name.split(".")
        _set(lines, table, key, value)
    changed = newline.join(lines) + newline
    wanted = tomli.loads(text)
    try:
        for name, value in values.items():
            table, key = name.split(".")
            wanted.setdefault(table, {})[key] = tomli.loads(f"it = {to_toml(value)}")["it"]
        same = tomli.loads(changed) == wanted
    except (tomli.TOMLDecodeError, AttributeError, TypeError):
        same = False
    if not same:
        raise ValueError("cannot be edited: its tables are not written as [table] with a key and its value a line")
    return changed


def _set(lines: list[str], table: str, key: str, value: Any) -> None:
    entry = f"{key} = {to_toml(value)}"
    begin = next((at for at, line in enumerate(lines) if re.match(rf"\s*\[\s*{table}\s*\]", line)), None)
    if begin is None:
        lines += ["", f"[{table}]", entry]
        return
    end = next((at for at in range(begin + 1, len(lines)) if re.match(r"\s*\[", lines[at])), len(lines))
    for at in range(begin + 1, end):
        if re.match(rf"\s*{key}\s*=", lines[at]):
            lines[at] = entry + _comment(lines[at])
            return
    last = max(at for at in range(begin, end) if lines[at].strip() and not lines[at].lstrip().startswith("#"))
    lines.insert(last + 1, entry)


def _comment(line: str) -> str:
    """What follows a line's key and value: the longest tail from a # on before which all is TOML."""
    for at in (place for place, sign in enumerate(line) if sign == "#"):
        try:
            tomli.loads(line[:at])
        except tomli.TOMLDecodeError:
            continue
        return line[len(line[:at].rstrip()) :]
    return ""
