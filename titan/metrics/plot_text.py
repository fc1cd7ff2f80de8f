"""A picture in the terminal.

With colours, or for one run, lines are drawn in braille characters, each a grid of 2 x 4 dots. Where colours cannot tell runs
apart, each run is drawn with a letter-sized mark of its own; and where the stream does not know Unicode, in ASCII altogether.
"""

from __future__ import annotations

import math
from itertools import pairwise
from textwrap import wrap

from titan.metrics.plot import Axis, Picture, Point, shown_ticks

LEAST_ROWS, USUAL_ROWS, MOST_ROWS = 4, 16, 24
COLOURS = (32, 208, 35, 175, 214, 117)  # of the 256 that terminals know: near those of the SVG
MARKS = "*+x#@%"
DOTS = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))  # of U+2800, by row and column
FULL = chr(0x28FF)
UNICODE = {"side": "┤", "wall": "│", "corner": "└", "floor": "─", "tick": "┬", "held": "●"}
ASCII = {"side": "+", "wall": "|", "corner": "+", "floor": "-", "tick": "+", "held": "o"}
Cells = dict[tuple[int, int], tuple[str, int]]


def text(picture: Picture, width: int, height: int | None, colours: bool, unicode: bool) -> str:
    """The picture with axes and legend; lines end in a newline.

    width: columns, at least 30. height: lines in all, kept as far as LEAST_ROWS and MOST_ROWS allow; None: USUAL_ROWS.
    """
    signs = UNICODE if unicode else ASCII
    braille = unicode and (colours or len(picture.curves) == 1)
    above, below = wrap(picture.title, max(width, 30)), legend(picture, max(width, 30), colours, braille, signs)
    rows = USUAL_ROWS if height is None else min(max(height - len(above) - 2 - len(below), LEAST_ROWS), MOST_ROWS)
    labels = tick_rows(picture.y, rows)
    margin = max(map(len, labels.values()), default=0)
    columns = max(width, 30) - margin - 2
    cells: Cells = {}
    for index, curve in enumerate(picture.curves):
        scale = (2, 4) if braille else (1, 1)
        dots = line_dots(places(picture, curve.points), columns * scale[0], rows * scale[1])
        if braille:
            drawn = braille_cells(dots)
            if len(drawn) == 1:  # a dot alone is hard to see
                drawn = dict.fromkeys(drawn, FULL)
            cells |= {cell: (sign, index) for cell, sign in drawn.items()}
        else:
            cells |= {(row, column): (MARKS[index % len(MARKS)], index) for column, row in dots}
    for index, curve in enumerate(picture.curves):
        for column, row in dots_of(places(picture, curve.held_out), columns, rows):
            cells[row, column] = (signs["held"], index)
    lines = above
    for row in range(rows):
        side = signs["side"] if row in labels else signs["wall"]
        across = "".join(coloured(*cells.get((row, column), (" ", -1)), colours) for column in range(columns))
        lines.append(f"{labels.get(row, ''):>{margin}} {side}{across}".rstrip())
    lines += floor(picture.x, margin, columns, signs)
    return "\n".join([*lines, *below]) + "\n"


def tick_rows(axis: Axis, rows: int) -> dict[int, str]:
    """Row -> the value that stands beside it, in every second row at most. Rows are counted from the top."""
    every = math.ceil(2 * len(axis.ticks) / rows)
    ticks = list(zip(axis.ticks, shown_ticks(axis), strict=True))[::every]
    return {round((1 - axis.place(value)) * (rows - 1)): shown for value, shown in ticks}


def floor(axis: Axis, margin: int, columns: int, signs: dict[str, str]) -> list[str]:
    """The x axis: a line with ticks, and the values under them as far as they have room."""
    line, below = [signs["floor"]] * columns, [" "] * (columns + margin + 2)
    free = 0
    for value, shown in zip(axis.ticks, shown_ticks(axis), strict=True):
        column = round(axis.place(value) * (columns - 1))
        start = min(max(margin + 2 + column - len(shown) // 2, 0), len(below) - len(shown))
        if start >= free:
            line[column] = signs["tick"]
            below[start : start + len(shown)] = shown
            free = start + len(shown) + 2
    return [f"{'':{margin}} {signs['corner']}{''.join(line)}", "".join(below).rstrip()]


def legend(picture: Picture, width: int, colours: bool, braille: bool, signs: dict[str, str]) -> list[str]:
    """Which line is whose, wrapped between entries."""
    entries = [
        ((FULL if braille else MARKS[index % len(MARKS)]) * 2, index, curve.name) for index, curve in enumerate(picture.curves)
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
