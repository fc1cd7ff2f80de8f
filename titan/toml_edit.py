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
    lines = text.splitlines()
    for name, value in values.items():
        table, key = name.split(".")
        _set(lines, table, key, value)
    changed = "\n".join(lines) + "\n"
    wanted = tomli.loads(text)
    try:
        for name, value in values.items():
            table, key = name.split(".")
            wanted.setdefault(table, {})[key] = value
        found = tomli.loads(changed)
    except (tomli.TOMLDecodeError, AttributeError, TypeError) as error:
        raise ValueError(f"cannot be edited: {error}") from error
    if found != wanted:
        raise ValueError("cannot be edited: its tables are not written as [table] with a key a line")
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
            comment = re.search(r"\s+#[^\"']*$", lines[at])
            lines[at] = entry + (comment[0] if comment else "")
            return
    last = max(at for at in range(begin, end) if lines[at].strip() and not lines[at].lstrip().startswith("#"))
    lines.insert(last + 1, entry)
