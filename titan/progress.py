"""How far a long job is: a bar on a terminal, a line every few seconds elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

from tqdm import tqdm

REPORT_SECONDS = 5.0


def size_words(count: int) -> str:
    """A number of bytes for people: 7.0 MB, 16.1 GB."""
    return f"{count / 1e9:,.1f} GB" if count >= 1e9 else f"{count / 1e6:,.1f} MB"


class ProgressBar:
    """Counts up to `total`. `report` gets the lines: "<what>: 40% of 12.3 MB"."""

    def __init__(self, total: int, what: str, report: Callable[[str], None], unit: str = "B") -> None:
        """unit: of what is counted, bytes or another."""
        self.total, self.what, self.report = total, what, report
        self.words = size_words(total) if unit == "B" else f"{total:,} {unit}"
        self.done, self.last = 0, time.monotonic()
        self.bar = tqdm(total=total, unit=unit, unit_scale=True, leave=False, file=sys.stderr, disable=not sys.stderr.isatty())

    def add(self, size: int) -> None:
        """`size` more bytes are done."""
        self.done += size
        self.bar.update(size)
        if self.bar.disable and time.monotonic() - self.last > REPORT_SECONDS:
            self.last = time.monotonic()
            self.report(f"{self.what}: {self.done / self.total:.0%} of {self.words}")

    def say(self, line: str) -> None:
        """A line for people, not on top of the bar."""
        self.bar.clear()
        self.report(line)

    def close(self) -> None:
        """Take the bar away."""
        self.bar.close()
