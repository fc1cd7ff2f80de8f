"""Curves of runs and the axes they share: what a picture shows, before it is drawn. No torch, no numpy.

titan/metrics/plot_svg.py draws it for a page, titan/metrics/plot_text.py for a terminal.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from titan.metrics.console import count
from titan.metrics.history import Record, number, read_history

X = {"step": "step", "tokens": "tokens", "time": "training time"}
Y = {
    "loss": "loss",
    "validation_loss": "validation loss",
    "grad_norm": "gradient norm",
    "lr": "learning rate",
    "tokens_per_second": "tokens a second",
    "mfu": "mfu (%)",
}
Point = tuple[float, float]
MOST_POINTS = 1500
LETTERS = ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


@dataclass(frozen=True)
class Curve:
    """One run: its points in ascending x, and what was measured on held-out data, where that is shown beside them."""

    name: str
    points: list[Point]
    held_out: list[Point]


@dataclass(frozen=True)
class Axis:
    """Values from `low` to `high` on a linear or logarithmic scale, with round ticks."""

    label: str
    low: float
    high: float
    log: bool
    ticks: list[float]

    def place(self, value: float) -> float:
        """Where a value lies: 0 at `low`, 1 at `high`."""
        if self.log:
            return (math.log(value) - math.log(self.low)) / (math.log(self.high) - math.log(self.low))
        return (value - self.low) / (self.high - self.low)


@dataclass(frozen=True)
class Picture:
    """Everything that is drawn."""

    curves: list[Curve]
    x: Axis
    y: Axis

    @property
    def title(self) -> str:
        return f"{self.y.label} by {self.x.label}{', logarithmic' if self.y.log else ''}"


def picture(runs: dict[str, Path], x: str = "step", y: str = "loss", log: bool = False) -> Picture:
    """The picture of runs: name -> file of metrics. Raises ValueError where no run has such figures."""
    curves = [curve(name, read_history(file), x, y) for name, file in runs.items()]
    if log:
        curves = [Curve(c.name, positive(c.points), positive(c.held_out)) for c in curves]
    shown = [point for c in curves for point in (*c.points, *c.held_out)]
    if not shown:
        raise ValueError(f"no {Y[y]} in {', '.join(str(file) for file in runs.values())}")
    label, unit = X[x], 1.0
    if x == "time":
        longest = max(point[0] for point in shown)
        unit, name = next(((s, n) for s, n in ((3600.0, "hours"), (60.0, "minutes")) if longest >= 2 * s), (1.0, "seconds"))
        label = f"{label} in {name}"
    scaled = [Curve(c.name, thinned(over(c.points, unit)), over(c.held_out, unit)) for c in curves]
    across = axis(label, [p[0] / unit for p in shown], 8, whole=x != "time")
    return Picture(scaled, across, axis(Y[y], [p[1] for p in shown], 6, log, 0.04))


def curve(name: str, records: Sequence[Record], x: str, y: str) -> Curve:
    """A run's curve. x: a key of X; time is the time spent in training steps, so that a pause between two starts is none."""
    points, held_out = [], []
    seconds, before = 0.0, 0
    for record in records:
        seconds += (number(record, "step_seconds") or 0.0) * (record["step"] - before)
        before = record["step"]
        at = seconds if x == "time" else number(record, x)
        value = number(record, y)
        if at is not None and value is not None:
            points.append((at, 100 * value if y == "mfu" else value))
        if y == "loss" and at is not None and (held := number(record, "validation_loss")) is not None:
            held_out.append((at, held))
    return Curve(name, points, held_out)


def axis(label: str, values: list[float], most_ticks: int, log: bool = False, margin: float = 0.0, whole: bool = False) -> Axis:
    """An axis that has room for all values; log needs them above 0. whole: there is nothing between two whole numbers."""
    low, high = min(values), max(values)
    if low == high:
        room = max(1, abs(low) // 10) if whole else abs(low) / 10 or 1
        low, high = (low / 2, high * 2) if log else (low - room, high + room)
    if log:
        room = (high / low) ** margin
        low, high = low / room, high * room
        ticks = log_ticks(low, high, most_ticks)
    else:
        room = (high - low) * margin
        low, high = low - room, high + room
        ticks = round_ticks(low, high, most_ticks, whole)
    return Axis(label, low, high, log, ticks)


def round_ticks(low: float, high: float, most: int, whole: bool = False) -> list[float]:
    """At most `most` multiples of 1, 2 or 5 times a power of ten, from `low` to `high`."""
    power = 10.0 ** max(math.floor(math.log10((high - low) / most)), 0 if whole else -math.inf)
    step = next(s for s in (power, 2 * power, 5 * power, 10 * power, 20 * power) if fits(low, high, s) <= most)
    first = math.ceil(low / step - 1e-9)
    return [float(f"{(first + i) * step:.12g}") for i in range(fits(low, high, step))]


def fits(low: float, high: float, step: float) -> int:
    """Multiples of `step` from `low` to `high`."""
    return math.floor(high / step + 1e-9) - math.ceil(low / step - 1e-9) + 1


def log_ticks(low: float, high: float, most: int) -> list[float]:
    """Round values for a logarithmic axis: 1, 2, 5 of each power of ten, powers alone where it is long, or as if linear."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for heads in ((1, 2, 5), (1,)):
        found = [head * 10.0**power for power in powers for head in heads]
        inside = [float(f"{value:.12g}") for value in found if low <= value <= high]
        if 3 <= len(inside) <= most:
            return inside
    return round_ticks(low, high, most) if len(inside) < 3 else inside[:: math.ceil(len(inside) / most)]


def shown_ticks(axis: Axis) -> list[str]:
    """The ticks' values, all written in one way: "80k" beside "100k", "0.5e-4" beside "1e-4"."""
    largest = max(map(abs, axis.ticks), default=0.0)
    if axis.log:  # from decade to decade each in its own unit
        return [in_unit(tick, *unit_of(tick, 1e3)) for tick in axis.ticks]
    return [in_unit(tick, *unit_of(largest, 1e5)) for tick in axis.ticks]


def unit_of(value: float, letters_from: float) -> tuple[float, str]:
    """What to divide by, and how to write that: a letter for large values, a power of ten for small ones."""
    if value >= letters_from:
        return next((size, letter) for size, letter in LETTERS if value >= size)
    if 0 < value < 1e-3:
        power = math.floor(math.log10(value) + 1e-9)
        return 10.0**power, f"e{power}"
    return 1.0, ""


def in_unit(value: float, unit: float, written: str) -> str:
    """A value in a unit, with as many digits as it has."""
    shown = f"{float(f'{value / unit:.9g}'):,}".removesuffix(".0")
    return shown + written if value else "0"


def shown_value(value: float) -> str:
    """A point's value in a few characters."""
    return count(value) if abs(value) >= 10_000 else f"{value:.4g}"


def positive(points: list[Point]) -> list[Point]:
    return [point for point in points if point[1] > 0]


def over(points: list[Point], unit: float) -> list[Point]:
    return [(x / unit, y) for x, y in points]


def thinned(points: list[Point]) -> list[Point]:
    """Not more points than a picture can show: of each stretch its lowest and its highest, and the ends."""
    if len(points) <= MOST_POINTS:
        return points
    size = math.ceil(2 * len(points) / (MOST_POINTS - 2))
    kept = {points[0], points[-1]}
    for i in range(0, len(points), size):
        stretch = points[i : i + size]
        kept |= {min(stretch, key=lambda p: p[1]), max(stretch, key=lambda p: p[1])}
    return sorted(kept)
