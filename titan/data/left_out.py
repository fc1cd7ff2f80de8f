"""What people are told of prepared data: how much there is of each split, and which rows were left out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

from titan.data.encode import EMPTY, LISTED, SPLITS, Made, place
from titan.data.pieces import Segment
from titan.terminal import plural

SHOWN = 5


def total(made: list[Made], empty_files: int) -> dict[str, Any]:
    """Sums over all pieces: documents and tokens by split, empty ones, and what was left out by kind."""
    bad: Counter[str] = Counter()
    for one in made:
        bad.update(one.bad)
    return {
        "documents": {split: sum(one.documents[i] for one in made) for i, split in enumerate(SPLITS)},
        "tokens": {split: sum(one.tokens[i] for one in made) for i, split in enumerate(SPLITS)},
        "empty": bad.pop(EMPTY, 0) + empty_files,
        "left_out": dict(sorted(bad.items())),
    }


def listed(pieces: list[list[Segment]], made: list[Made]) -> Iterator[tuple[str, str]]:
    """(file and line, what is wrong) of the rows that markers list."""
    lines: Counter[str] = Counter()
    for piece, one in zip(pieces, made, strict=True):
        starts = []
        for segment, count in zip(piece, one.lines, strict=True):
            starts.append(lines[segment.name])
            lines[segment.name] += count
        for index, number, why in one.listed:
            yield place(piece[index], number, starts[index]), why


def all_lines(sums: dict[str, Any], rows: list[tuple[str, str]]) -> str:
    """What the file of rows that were left out says. rows: of `listed`, and empty files."""
    more = sums["empty"] + sum(sums["left_out"].values()) - len(rows)
    last = f"and {plural(more, 'more row')}: of a piece only the first {LISTED:,} are listed\n" if more else ""
    return "".join(f"{where} {why}\n" for where, why in rows) + last


def words(sums: dict[str, Any], rows: list[tuple[str, str]], where: str) -> Iterator[str]:
    """Lines for people. where: the file with `all_lines`."""
    for split in SPLITS:
        if sums["documents"][split]:
            yield f"data: {split} has {plural(sums['documents'][split], 'document')}, {sums['tokens'][split]:,} tokens"
    if sums["empty"]:
        yield f"data: {plural(sums['empty'], 'empty document')} left out, see {where}"
    if sums["left_out"]:
        kinds = ", ".join(f"{count:,} {kind}" for kind, count in sums["left_out"].items())
        yield f"data: WARNING: {plural(sum(sums['left_out'].values()), 'row')} left out ({kinds}), see {where}:"
        yield from (f"data:   {place} {why}" for place, why in [row for row in rows if row[1] != "is empty"][:SHOWN])
