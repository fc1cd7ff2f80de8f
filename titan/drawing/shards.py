"""A parameter's shards: the whole matrix as a rectangle, cut where the plan cuts it, with the ranks that hold each part."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

from titan.drawing.mesh import COLOURS
from titan.drawing.svg import SKY, WIDTH, YELLOW, box, label, page, wrapped

Rectangle = tuple[tuple[int, ...], tuple[int, ...]]
"""offset, size"""
GAP, TALL = 24, 150


def owners(by_rank: Sequence[Rectangle | None]) -> dict[Rectangle, list[int]]:
    """Each part that there is, in order, with the ranks that hold it. None: a rank that holds nothing of the parameter."""
    found: dict[Rectangle, list[int]] = defaultdict(list)
    for rank, part in enumerate(by_rank):
        if part is not None and all(part[1]):
            found[part].append(rank)
    return dict(sorted(found.items()))


def ranges(ranks: Sequence[int]) -> str:
    """0, 2-5, 8"""
    runs: list[list[int]] = []
    for rank in ranks:
        if runs and rank == runs[-1][-1] + 1:
            runs[-1].append(rank)
        else:
            runs.append([rank])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def svg(title: str, parameters: Mapping[str, tuple[tuple[int, ...], dict[Rectangle, list[int]]]]) -> str:
    """parameters: name -> shape of the whole, and its parts. Drawn in two columns, each on a scale of its own."""
    body, y = wrapped(16, 52, "Rows from top to bottom, columns from left to right; in each part the ranks that hold it.")
    y += 8
    column = (WIDTH - 3 * 16) / 2
    items = list(parameters.items())
    for first in range(0, len(items), 2):
        pair = items[first : first + 2]
        for i, (name, (shape, parts)) in enumerate(pair):
            left = 16 + i * (column + 16)
            body.append(label(left, y + 12, name.removesuffix(".weight")))
            body.append(label(left, y + 30, " x ".join(f"{n:,}" for n in shape), "small"))
            body += rectangles(left, y + 38, column, shape, parts)
        y += TALL + 38 + GAP
    return page(y, title, "; ".join(f"{name}: {len(parts)} parts" for name, (_, parts) in items), body)


def rectangles(x: float, y: float, width: float, shape: tuple[int, ...], parts: dict[Rectangle, list[int]]) -> list[str]:
    """The parts of one parameter. A vector is a column of its elements."""
    rows, columns = shape[0], shape[1] if len(shape) > 1 else 1
    wide = min(width, max(70.0, TALL * columns / rows)) if len(shape) > 1 else 70.0
    found = []
    for number, ((offset, size), ranks) in enumerate(parts.items()):
        top, tall = y + TALL * offset[0] / rows, TALL * size[0] / rows
        left, across = (x + wide * offset[1] / columns, wide * size[1] / columns) if len(shape) > 1 else (x, wide)
        said = ranges(ranks)
        hint = f"rows {offset[0]:,} to {offset[0] + size[0] - 1:,}"
        if len(shape) > 1:
            hint += f", columns {offset[1]:,} to {offset[1] + size[1] - 1:,}"
        colour = COLOURS[number % len(COLOURS)]
        found.append(box(left, top, across, tall, colour, "gap", f"{hint}: rank {said}"))
        if tall > 12 and across > 7 * len(said):
            found.append(label(left + across / 2, top + tall / 2 + 4, said, "dark" if colour in (YELLOW, SKY) else "in"))
    return found
