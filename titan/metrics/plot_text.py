"""A picture in the terminal.

With colours, or for one run, lines are drawn in braille characters, each a grid of 2 x 4 dots. Where colours cannot tell runs
apart, each run is drawn with a letter-sized mark of its own; and where the stream does not know Unicode, in ASCII altogether.
"""

from __future__ import annotations

from itertools import pairwise

from titan.metrics.plot import Axis, Picture, Point, shown_value

ROWS = 16
COLOURS = (32, 208, 35, 175, 214, 117)  # of the 256 that terminals know: near those of the SVG
MARKS = "*+x#@%"
DOTS = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))  # of U+2800, by row and column
UNICODE = {"side": "┤", "wall": "│", "corner": "└", "floor": "─", "tick": "┬", "held": "●"}
ASCII = {"side": "+", "wall": "|", "corner": "+", "floor": "-", "tick": "+", "held": "o"}
Cells = dict[tuple[int, int], tuple[str, int]]


def text(picture: Picture, width: int, colours: bool, unicode: bool) -> str:
    """The picture in at most `width` columns, at least 30, with axes and legend; lines end in a newline."""
    signs = UNICODE if unicode else ASCII
    braille = unicode and (colours or len(picture.curves) == 1)
    labels = tick_rows(picture.y)
    margin = max(map(len, labels.values()), default=0)
    columns = max(width, 30) - margin - 2
    cells: Cells = {}
    for index, curve in enumerate(picture.curves):
        scale = (2, 4) if braille else (1, 1)
        dots = line_dots(places(picture, curve.points), columns * scale[0], ROWS * scale[1])
        if braille:
            cells |= {cell: (sign, index) for cell, sign in braille_cells(dots).items()}
        else:
            cells |= {(row, column): (MARKS[index % len(MARKS)], index) for column, row in dots}
    for index, curve in enumerate(picture.curves):
        for column, row in dots_of(places(picture, curve.held_out), columns, ROWS):
            cells[row, column] = (signs["held"], index)
    lines = [picture.y.label + (" (logarithmic)" if picture.y.log else "")]
    for row in range(ROWS):
        side = signs["side"] if row in labels else signs["wall"]
        drawn = "".join(coloured(*cells.get((row, column), (" ", -1)), colours) for column in range(columns))
        lines.append(f"{labels.get(row, ''):>{margin}} {side}{drawn}".rstrip())
    lines += floor(picture.x, margin, columns, signs)
    lines += legend(picture, max(width, 30), colours, braille, signs)
    return "\n".join(lines) + "\n"


def tick_rows(axis: Axis) -> dict[int, str]:
    """Row -> the value that stands beside it. Rows are counted from the top."""
    return {round((1 - axis.place(value)) * (ROWS - 1)): shown_value(value) for value in axis.ticks}


def floor(axis: Axis, margin: int, columns: int, signs: dict[str, str]) -> list[str]:
    """The x axis: a line with ticks, the values under them as far as they have room, and what is measured."""
    line, below = [signs["floor"]] * columns, [" "] * (columns + margin + 2)
    free = 0
    for value in axis.ticks:
        column, shown = round(axis.place(value) * (columns - 1)), shown_value(value)
        start = min(max(margin + 2 + column - len(shown) // 2, 0), len(below) - len(shown))
        if start >= free:
            line[column] = signs["tick"]
            below[start : start + len(shown)] = shown
            free = start + len(shown) + 2
    return [
        f"{'':{margin}} {signs['corner']}{''.join(line)}",
        "".join(below).rstrip(),
        f"{axis.label:^{columns + margin + 2}}".rstrip(),
    ]


def legend(picture: Picture, width: int, colours: bool, braille: bool, signs: dict[str, str]) -> list[str]:
    """Which line is whose, wrapped between entries."""
    entries = [
        ((chr(0x28FF) if braille else MARKS[index % len(MARKS)]) * 2, index, curve.name)
        for index, curve in enumerate(picture.curves)
    ]
    if any(curve.held_out for curve in picture.curves):
        entries.append((signs["held"], -1, "validation"))
    rows, free = [""], width
    for sign, index, name in entries:
        name = name[: width - len(sign) - 1]
        size = len(sign) + 1 + len(name)
        if size > free and rows[-1]:
            rows.append("")
            free = width
        rows[-1] += ("  " if rows[-1] else "") + f"{coloured(sign, index, colours)} {name}"
        free -= size + 2
    return rows


def places(picture: Picture, points: list[Point]) -> list[Point]:
    """Points as shares of the two axes, y downwards."""
    return [(picture.x.place(x), 1 - picture.y.place(y)) for x, y in points]


def dots_of(shares: list[Point], columns: int, rows: int) -> list[tuple[int, int]]:
    """The dot that each point falls on, as (column, row)."""
    return [(round(x * (columns - 1)), round(y * (rows - 1))) for x, y in shares]


def line_dots(shares: list[Point], columns: int, rows: int) -> list[tuple[int, int]]:
    """The dots of a line through the points, in order, without gaps."""
    dots = dots_of(shares, columns, rows)
    line = dots[:1]
    for (x1, y1), (x2, y2) in pairwise(dots):
        steps = max(abs(x2 - x1), abs(y2 - y1), 1)
        line += [(round(x1 + (x2 - x1) * i / steps), round(y1 + (y2 - y1) * i / steps)) for i in range(1, steps + 1)]
    return line


def braille_cells(dots: list[tuple[int, int]]) -> dict[tuple[int, int], str]:
    """(row, column) of a cell -> the character with its dots."""
    masks: dict[tuple[int, int], int] = {}
    for x, y in dots:
        cell = y // 4, x // 2
        masks[cell] = masks.get(cell, 0) | DOTS[y % 4][x % 2]
    return {cell: chr(0x2800 + mask) for cell, mask in masks.items()}


def coloured(sign: str, index: int, colours: bool) -> str:
    """A sign in its run's colour; index -1 is nobody's."""
    return f"\x1b[38;5;{COLOURS[index % len(COLOURS)]}m{sign}\x1b[0m" if colours and index >= 0 else sign
