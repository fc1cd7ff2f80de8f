"""metrics.jsonl read back: one record a logged step. No torch.

A run that was killed may leave a last line that is cut. Of a step with two lines each figure is the later one's: a resumed run
did it again, or made up for the validation in which the start before was stopped. What is not a number in JSON (a loss of NaN)
was written as null.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

Record = dict[str, Any]


def read_history(file: Path) -> list[Record]:
    """The records in ascending order of their step; lines that are none are passed over. Raises FileNotFoundError."""
    found: dict[int, Record] = {}
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict) and type(record.get("step")) is int:
            found.setdefault(record["step"], {}).update(record)
    return [found[step] for step in sorted(found)]


def number(record: Record, key: str) -> float | None:
    """A record's finite number; None where there is none."""
    value = record.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def numbers(records: list[Record], key: str) -> list[float]:
    """All finite numbers under a key."""
    return [value for record in records if (value := number(record, key)) is not None]
