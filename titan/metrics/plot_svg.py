"""A picture as SVG: one file that needs nothing else, for a README, a report or a browser.

It follows the reader's light or dark theme. The colours are Okabe and Ito's, which people with any of the common forms of
colour blindness can tell apart; past six runs the lines are dashed. Points are in pixels from the upper left corner.
"""

from __future__ import annotations

from html import escape

from titan.metrics.plot import Axis, Picture, Point, shown_ticks, shown_value

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
DASHES = ("", "7 3", "2 3")
WIDTH, HEIGHT, LEFT, BOTTOM = 800, 450, 64, 50
LETTER = 6.7  # the width of a typical letter at 12 pixels
STYLE = """
  text { font: 12px system-ui, sans-serif; fill: #24292f } .small { fill: #57606a } .title { font-size: 15px; font-weight: 600 }
  .page { fill: #ffffff } .held { fill: #ffffff } .grid { stroke: #d8dee4 } .axis { stroke: #8c959f }
  .curve { fill: none; stroke-width: 2; stroke-linejoin: round }
  @media (prefers-color-scheme: dark) {
    text { fill: #e6edf3 } .small { fill: #9198a1 } .page { fill: #0d1117 } .held { fill: #0d1117 }
    .grid { stroke: #2b313a } .axis { stroke: #6e7681 }
  }
"""


def svg(picture: Picture) -> str:
    """The picture as an SVG document."""
    labels = [end_label(c.name, c.points, len(picture.curves) > 1) for c in picture.curves]
    right = WIDTH - 38 - LETTER * max((len(label) for label in labels), default=0)
    keys, top = legend(picture)
    frame = Frame(picture.x, picture.y, LEFT, right, top, HEIGHT - BOTTOM)
    body = [*axes(frame), *keys]
    for index, curve in enumerate(picture.curves):
        if len(curve.points) > 1:
            line = " ".join(f"{x:.1f},{y:.1f}" for x, y in map(frame.pixel, curve.points))
            body.append(f'<polyline class="curve" {pen(index)} points="{line}"/>')
        elif curve.points:
            x, y = frame.pixel(curve.points[0])
            body.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{COLOURS[index % len(COLOURS)]}"/>')
        body += [held_out(*frame.pixel(point), index) for point in curve.held_out]
    body += end_labels(frame, picture, labels)
    title = escape(cleaned(picture.title))
    names = escape(cleaned(", ".join(curve.name for curve in picture.curves)))
    size = f'viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}"'
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img">',
            f"<title>{title}: {names}</title>",
            f"<style>{STYLE}</style>",
            f'<rect class="page" width="{WIDTH}" height="{HEIGHT}" rx="6"/>',
            f'<text class="title" x="{LEFT}" y="26">{title}</text>',
            *body,
            "</svg>\n",
        ]
    )


class Frame:
    """The rectangle that the axes span."""

    def __init__(self, x: Axis, y: Axis, left: float, right: float, top: float, bottom: float) -> None:
        self.x, self.y = x, y
        self.left, self.right, self.top, self.bottom = left, right, top, bottom

    def pixel(self, point: Point) -> Point:
        across = self.left + self.x.place(point[0]) * (self.right - self.left)
        return across, self.bottom - self.y.place(point[1]) * (self.bottom - self.top)


def axes(frame: Frame) -> list[str]:
    """Grid lines, their values, and what is measured."""
    parts = []
    for value, shown in zip(frame.y.ticks, shown_ticks(frame.y), strict=True):
        _, y = frame.pixel((frame.x.low, value))
        parts.append(f'<line class="grid" x1="{frame.left}" x2="{frame.right:.1f}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="small" text-anchor="end" x="{frame.left - 8}" y="{y + 4:.1f}">{shown}</text>')
    for value, shown in zip(frame.x.ticks, shown_ticks(frame.x), strict=True):
        x, _ = frame.pixel((value, frame.y.low))
        parts.append(f'<line class="axis" x1="{x:.1f}" x2="{x:.1f}" y1="{frame.bottom}" y2="{frame.bottom + 5}"/>')
        parts.append(f'<text class="small" text-anchor="middle" x="{x:.1f}" y="{frame.bottom + 19}">{shown}</text>')
    parts.append(f'<line class="axis" x1="{frame.left}" x2="{frame.right:.1f}" y1="{frame.bottom}" y2="{frame.bottom}"/>')
    middle = (frame.left + frame.right) / 2
    parts.append(f'<text class="small" text-anchor="middle" x="{middle:.1f}" y="{HEIGHT - 12}">{frame.x.label}</text>')
    return parts


def legend(picture: Picture) -> tuple[list[str], float]:
    """Which line is whose, in rows under the title; and where the rows end."""
    parts, x, y = [], float(LEFT), 48.0
    entries = [(index, cleaned(curve.name)) for index, curve in enumerate(picture.curves)]
    if any(curve.held_out for curve in picture.curves):
        entries.append((-1, "validation"))
    for index, name in entries:
        name = shortened(name, 60)
        width = 34 + LETTER * len(name) + 14
        if x + width > WIDTH and x > LEFT:
            x, y = float(LEFT), y + 18
        if index >= 0:
            parts.append(f'<line class="curve" {pen(index)} x1="{x:.1f}" x2="{x + 26:.1f}" y1="{y - 4:.1f}" y2="{y - 4:.1f}"/>')
        else:
            parts.append(f'<circle class="held axis" stroke-width="2" cx="{x + 13:.1f}" cy="{y - 4:.1f}" r="4"/>')
        parts.append(f'<text x="{x + 32:.1f}" y="{y:.1f}">{escape(name)}</text>')
        x += width
    return parts, y + 18


def end_label(name: str, points: list[Point], with_name: bool) -> str:
    """What stands where a line ends: its last value, and whose it is where there are several."""
    if not points:
        return ""
    return shown_value(points[-1][1]) + (f" {shortened(cleaned(name), 16)}" if with_name else "")


def end_labels(frame: Frame, picture: Picture, labels: list[str]) -> list[str]:
    """The labels right of the lines' ends, moved apart where they would cover one another."""
    ends = [(frame.pixel(c.points[-1]), i) for i, c in enumerate(picture.curves) if c.points]
    ends.sort(key=lambda end: end[0][1])
    heights: list[float] = []
    for (_, y), _ in ends:
        heights.append(max(y, heights[-1] + 14) if heights else y)
    lowest = frame.bottom
    for place in reversed(range(len(heights))):  # not below the axis: push back up
        heights[place] = min(heights[place], lowest)
        lowest = heights[place] - 14
    parts = []
    for ((x, y), index), height in zip(ends, heights, strict=True):
        colour = COLOURS[index % len(COLOURS)]
        parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" fill="{colour}"/>')
        if len(ends) > 1:
            parts.append(f'<circle cx="{frame.right + 14:.1f}" cy="{height:.1f}" r="3.5" fill="{colour}"/>')
        start = frame.right + (22 if len(ends) > 1 else 10)
        parts.append(f'<text x="{start:.1f}" y="{height + 4:.1f}">{escape(labels[index])}</text>')
    return parts


def held_out(x: float, y: float, index: int) -> str:
    return f'<circle class="held" stroke="{COLOURS[index % len(COLOURS)]}" stroke-width="2" cx="{x:.1f}" cy="{y:.1f}" r="4"/>'


def pen(index: int) -> str:
    dashes = DASHES[index // len(COLOURS) % len(DASHES)]
    return f'stroke="{COLOURS[index % len(COLOURS)]}"' + (f' stroke-dasharray="{dashes}"' if dashes else "")


def cleaned(text: str) -> str:
    """Text without what XML cannot hold."""
    return "".join(c if c.isprintable() else "\ufffd" for c in text)


def shortened(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1] + "\u2026"
