"""The run as a person watches it: a line for each logged step, and on a terminal a bar that moves in between.

A line holds as many figures as the width has room for, the important ones first: 80 columns show how well and how fast it
learns and how long it takes, 120 what that costs too. Each figure keeps its place, so that a column can be read downwards.
"""

from __future__ import annotations

import math
import sys
import time
from dataclasses import dataclass
from typing import Any, TextIO

from titan.terminal import BOLD, DIM, RESET, beside, columns, has_colours, is_terminal, showable

PLAIN_COLUMNS = 120
BAR_SECONDS = 0.1


@dataclass(frozen=True)
class Figure:
    """One figure of a line: a value between two dim labels."""

    before: str
    value: str
    after: str
    rank: int
    """Which figures go first where there is no room: the highest ranks."""
    bold: bool = False

    @property
    def width(self) -> int:
        return len(self.before + self.value + self.after)


class Console:
    """Rank 0's lines on stdout, its bar on stderr."""

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self.step_seconds = math.nan
        self.drawn = -math.inf
        # Not through the log's copy of stderr: a bar is for eyes alone.
        self.bar: TextIO | None = sys.__stderr__ if sys.__stderr__ is not None and is_terminal(sys.__stderr__) else None

    def step(self, record: dict[str, Any]) -> None:
        """A logged step's line."""
        self.step_seconds = record["step_seconds"]
        self._print(step_figures(record, self.steps))

    def validation(self, record: dict[str, Any]) -> None:
        """What was measured on held-out data after a step."""
        figures = [
            Figure("step ", of(record["step"], self.steps), "", 0),
            Figure("validation loss ", f"{record['validation_loss']:.4f}", "", 1, bold=True),
        ]
        if "validation_bits_per_byte" in record:  # not where the data do not say how much text they are
            figures.append(Figure("", f"{record['validation_bits_per_byte']:.4f}", " bits per byte", 2))
        self._print(figures)

    def samples(self, step: int, texts: list[str]) -> None:
        """Texts of the model, numbered, beneath one heading. They may hold anything."""
        width = columns(sys.stdout, PLAIN_COLUMNS)
        shown = [showable(text, sys.stdout).strip("\n") for text in texts]
        blocks = [beside(f"{place:>3} ", text, width) for place, text in enumerate(shown, 1)]
        print(f"samples after step {step}:", *blocks, sep="\n", flush=True)

    def progress(self, step: int) -> None:
        """A step is on its way: redraw the bar, a few times a second at most. Nothing waits for a device."""
        now = time.perf_counter()
        if self.bar is not None and now - self.drawn > BAR_SECONDS:
            self.drawn = now
            # The cursor stays at the start: a warning that someone prints meanwhile writes over the bar, not behind it.
            self.bar.write(f"\x1b[K{bar(step, self.steps, self.step_seconds, columns(self.bar, 80))}\r")
            self.bar.flush()

    def clear(self) -> None:
        """Take the bar away, before anything else is printed."""
        if self.bar is not None:
            self.bar.write("\x1b[K")
            self.bar.flush()

    def _print(self, figures: list[Figure]) -> None:
        print(line(figures, columns(sys.stdout, PLAIN_COLUMNS), has_colours(sys.stdout)), flush=True)


def step_figures(record: dict[str, Any], steps: int) -> list[Figure]:
    """All figures of a logged step."""
    seconds = record["step_seconds"]
    waiting = min(1.0, record["data_seconds"] / seconds) if seconds > 0 else 0.0
    return [
        Figure("step ", of(record["step"], steps), "", 0),
        Figure("loss ", f"{record['loss']:.4f}", "", 1, bold=True),
        Figure("grad ", f"{record['grad_norm']:.2f}", "", 4),
        Figure("lr ", rate(record["lr"]), "", 5),
        Figure("", f"{count(record['tokens_per_second']):>6}", " tok/s", 3),
        Figure("", f"{seconds:.2f}", " s", 6),
        Figure("data ", f"{waiting:3.0%}", "", 9),
        Figure("", f"{short(record['memory_gib']):>4}", " GiB", 8),
        Figure("mfu ", f"{record['mfu']:3.0%}", "", 7),
        Figure("", f"{duration((steps - record['step']) * seconds):>6}", " left", 2),
    ]


def line(figures: list[Figure], width: int, colours: bool) -> str:
    """The figures that fit into `width` columns, two blanks apart, in their order."""
    kept: list[Figure] = []
    for figure in sorted(figures, key=lambda f: f.rank):
        if sum(f.width + 2 for f in kept) + figure.width <= width:
            kept.append(figure)
    shown = [figure for figure in figures if figure in kept]
    if not colours:
        return "  ".join(f.before + f.value + f.after for f in shown)
    return "  ".join(f"{dim(f.before)}{f'{BOLD}{f.value}{RESET}' if f.bold else f.value}{dim(f.after)}" for f in shown)


def dim(text: str) -> str:
    return f"{DIM}{text}{RESET}" if text else ""


def bar(step: int, steps: int, step_seconds: float, width: int) -> str:
    """A bar of at most `width` - 1 columns: the last one would wrap on some terminals."""
    left = "" if math.isnan(step_seconds) else f" {duration((steps - step) * step_seconds)} left"
    head = f"step {of(step, steps)} "
    room = min(40, width - 1 - len(head) - len(left) - 2)
    done = "#" * (room * step // steps) if room >= 5 else ""
    return (f"{head}[{done:<{room}}]{left}" if room >= 5 else head + left.strip())[: width - 1]


def of(step: int, steps: int) -> str:
    return f"{step:>{len(str(steps))}}/{steps}"


def duration(seconds: float) -> str:
    """A time for people, by its two largest units: 12s, 4m10s, 1h23m, 3d04h."""
    if not math.isfinite(seconds):
        return "?"
    whole = max(0, round(seconds))
    minutes, hours, days = whole // 60, whole // 3600, whole // 86400
    if days:
        return f"{days}d{hours % 24:02}h"
    if hours:
        return f"{hours}h{minutes % 60:02}m"
    return f"{minutes}m{whole % 60:02}s" if minutes else f"{whole}s"


def rate(lr: float) -> str:
    """A learning rate: 3.0e-4."""
    return f"{lr:.1e}".replace("e-0", "e-")


def count(number: float) -> str:
    """A large number in at most six characters: 12,345 or 123k or 12.3M."""
    return f"{number:,.0f}" if number < 99_999.5 else si(number).replace(" ", "")


def si(number: float) -> str:
    """A number in three digits before its unit: "12.3 k", "1.98 P"."""
    for size, prefix in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= 0.9995 * size:
            return f"{short(number / size)} {prefix}"
    return f"{short(number)} "


def short(number: float) -> str:
    """A number in three digits: 0.42, 1.23, 12.3, 123."""
    return f"{number:.{2 if number < 9.995 else 1 if number < 99.95 else 0}f}"
