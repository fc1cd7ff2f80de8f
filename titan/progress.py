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


def time_words(seconds: float) -> str:
    """A time to wait for people: 40 s, 12 min, 3.5 h."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


class ProgressBar:
    """Counts up to `total`. `report` gets the lines: "<what>: 40% of 12.3 MB, 2 min left"."""

    def __init__(
        self, total: int, what: str, report: Callable[[str], None], unit: str = "B", made: str = "", done: int = 0
    ) -> None:
        """unit: of what is counted, bytes or another. made: what comes of it, if `count` counts that. done: so far."""
        self.total, self.what, self.report, self.unit_made = total, what, report, made
        self.words = size_words(total) if unit == "B" else f"{total:,} {unit}"
        self.first, self.done, self.made, self.started = done, done, 0, time.monotonic()
        self.last = self.started
        shown = sys.stderr.isatty()
        self.bar = tqdm(
            total=total, initial=done, unit=unit, unit_scale=True, leave=False, file=sys.stderr, disable=not shown, desc=what
        )

    def count(self, made: int) -> None:
        """So many more were made of it. Shown with the next `add`."""
        self.made += made

    def add(self, size: int) -> None:
        """`size` more bytes are done."""
        self.done += size
        if self.bar.disable:
            now = time.monotonic()
            if now - self.last > REPORT_SECONDS and self.done > self.first:
                self.last = now
                left = (now - self.started) * (self.total - self.done) / (self.done - self.first)
                rate = f", {self._rate()}" if self.unit_made else ""
                self.report(f"{self.what}: {self.done / self.total:.0%} of {self.words}{rate}, {time_words(left)} left")
            return
        if self.unit_made:
            self.bar.set_postfix_str(self._rate(), refresh=False)
        self.bar.update(size)

    def _rate(self) -> str:
        rate = self.made / max(1e-3, time.monotonic() - self.started)
        return f"{rate / 1e6:.2f} M {self.unit_made}/s" if rate >= 1e5 else f"{rate:,.0f} {self.unit_made}/s"

    def say(self, line: str) -> None:
        """A line for people, not on top of the bar."""
        self.bar.clear()
        self.report(line)

    def close(self) -> None:
        """Take the bar away."""
        self.bar.close()
