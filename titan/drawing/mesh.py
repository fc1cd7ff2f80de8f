"""The mesh as a picture: a cell a rank, a band a pipeline rank, and in words what the ranks of a band hold.

In a band, tp and cp lie from left to right and the data dimensions from top to bottom, so that neighbours on a row talk most. A
colour tells which samples a rank sees: cells of one colour see the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

from titan.config import Degrees
from titan.drawing.svg import BLUE, GREEN, GREY, ORANGE, PINK, SKY, WIDTH, YELLOW, box, label, page, wrapped

COLOURS = (BLUE, YELLOW, GREEN, PINK, SKY, ORANGE, GREY)
MOST_ROWS = 16


@dataclass(frozen=True)
class Place:
    """A rank on the mesh."""

    rank: int
    pp: int
    replicate: int
    shard: int
    cp: int
    tp: int


def places(plan: Degrees) -> list[Place]:
    """Every rank, in order: the last axis fastest."""
    axes = (plan.pp, plan.dp_replicate, plan.dp_shard, plan.cp, plan.tp)
    return [Place(rank, *at) for rank, at in enumerate(product(*map(range, axes)))]


def words(plan: Degrees, at: Place) -> str:
    """A rank's coordinates: pp 0, dp_shard 1, tp 1; "alone" where it has none."""
    named = (("pp", at.pp), ("dp_replicate", at.replicate), ("dp_shard", at.shard), ("cp", at.cp), ("tp", at.tp))
    return ", ".join(f"{name} {place}" for name, place in named if getattr(plan, name) > 1) or "alone"


def svg(title: str, plan: Degrees, holds: Sequence[str]) -> str:
    """holds: of each pipeline rank, in words, what its ranks have of the model."""
    across, rows = plan.cp * plan.tp, plan.dp_replicate * plan.dp_shard
    shown = min(rows, MOST_ROWS)
    width = min((WIDTH - 150) / across, 90)
    height = min(30.0, max(16.0, width))
    again = f" (after {len(COLOURS)}, they begin again)" if plan.data_parallel > len(COLOURS) else ""
    note = [f"A colour: ranks that see the same samples{again}."]
    if across > 1:
        names = [f"{name} {degree}" for name, degree in (("cp", plan.cp), ("tp", plan.tp)) if degree > 1]
        note.append(f"From left to right: {', then '.join(names)}.")
    names = [f"{n} {d}" for n, d in (("dp_replicate", plan.dp_replicate), ("dp_shard", plan.dp_shard)) if d > 1]
    if names:
        note.append(f"From top to bottom: {', then '.join(names)}.")
    if shown < rows:
        note.append(f"The first {shown} of {rows} rows; the others are alike.")
    body, y = wrapped(16, 52, " ".join(note))
    by_pp: list[list[Place]] = [[] for _ in range(plan.pp)]
    for at in places(plan):
        by_pp[at.pp].append(at)
    for number, (ranks, said) in enumerate(zip(by_pp, holds, strict=True)):
        y += 14
        lead, y = wrapped(16, y + 8, (f"pipeline rank {number}: " if plan.pp > 1 else "") + said, "")
        body += lead
        y -= 6
        for row in range(shown):
            for at in ranks[row * across : (row + 1) * across]:
                x = 16 + (at.cp * plan.tp + at.tp) * width
                colour = COLOURS[(at.replicate * plan.dp_shard + at.shard) % len(COLOURS)]
                body.append(box(x, y, width - 2, height - 2, colour, hint=f"rank {at.rank}: {words(plan, at)}"))
                if width > 9 * len(str(at.rank)):
                    ink = "dark" if colour in (YELLOW, SKY) else "in"
                    body.append(label(x + width / 2 - 1, y + height / 2 + 3, str(at.rank), ink))
            first = ranks[row * across]
            if names:
                which = [f"replica {first.replicate}"] * (plan.dp_replicate > 1)
                which += [f"shard {first.shard}"] * (plan.dp_shard > 1)
                body.append(label(16 + across * width + 6, y + height / 2 + 4, ", ".join(which), "small"))
            y += height
    return page(y + 16, title, f"{plan.world} ranks; " + "; ".join(holds), body)
