"""What a run's config says now, and said when a checkpoint was saved: the keys that differ."""

from __future__ import annotations

from typing import Any

import tomli

FREE = ("job",)
"""Tables that say nothing of what is computed."""


def changes(before: str, now: str) -> list[str]:
    """A line for each key whose value differs between two resolved TOMLs: "key: before -> now"."""
    old, new = _flat(tomli.loads(before)), _flat(tomli.loads(now))
    keys = [key for key in dict.fromkeys((*old, *new)) if key.split(".")[0] not in FREE]
    return [f"{key}: {_word(old, key)} -> {_word(new, key)}" for key in keys if old.get(key) != new.get(key)]


def _flat(table: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in table.items():
        found |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return found


def _word(values: dict[str, Any], key: str) -> str:
    return repr(values[key]) if key in values else "(none)"
