"""Pipeline schedules as CSV files: a row a rank, and in its cells the rank's actions, in order.

    0F0,0F1,   ,0I0,0W0,0B1          stage 0 is rank 0's: forward of micro batches 0 and 1, backward in two parts, and whole
    1F0,1B0,1F1,1B1                  stage 1 is rank 1's

Empty cells are for the eye: actions run as soon as they can. A file that is read runs: every micro batch passes each stage once
up and once down, in an order that the ranks can keep. The format is PyTorch's.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import cast

from titan.parallel.timeline import Action, Kind, Orders, timeline

CELL = re.compile(r"([0-9]{1,6})([FBIW])([0-9]{1,6})")


def as_csv(orders: Orders) -> str:
    """The orders as the text of a file that read_csv reads."""
    return "".join(",".join(map(str, order)) + "\n" for order in orders)


def read_csv(path: Path, ranks: int, stages_per_rank: int, micro_batches: int) -> tuple[Orders, list[int]]:
    """Orders, and the rank of each stage, from a file. stages_per_rank: 0 for whatever the file has.

    Raises ValueError, naming row and cell (from 1), where the file is not a schedule of so many ranks and micro batches.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: cannot be read as a schedule: {error}") from error
    rows = [line.split(",") for line in lines if line.strip()]
    if len(rows) != ranks:
        raise ValueError(f"{path}: has {len(rows)} rows, but the pipeline {ranks} ranks: a row is a rank")
    home: dict[int, int] = {}
    seen: set[Action] = set()
    orders: Orders = [[] for _ in rows]
    for rank, cells in enumerate(rows):
        for column, cell in enumerate(cells):
            if not cell.strip():
                continue
            where = f"{path}: row {rank + 1}, cell {column + 1} ({cell.strip()})"
            match = CELL.fullmatch(cell.strip())
            if match is None:
                raise ValueError(f"{where}: is not stage, F, B, I or W, and micro batch, as in 0F0")
            action = Action(int(match[1]), cast(Kind, match[2]), int(match[3]))
            fault = _fault(action, rank, home, seen, micro_batches)
            if fault:
                raise ValueError(f"{where}: {fault}")
            seen.add(action)
            orders[rank].append(action)
    _complete(path, home, seen, ranks, stages_per_rank, micro_batches)
    owners = [home[stage] for stage in range(len(home))]
    try:
        timeline(orders, owners)
    except ValueError as error:
        raise ValueError(f"{path}: {error} (rank 0 is row 1)") from error
    return orders, owners


def _fault(action: Action, rank: int, home: dict[int, int], seen: set[Action], micro_batches: int) -> str | None:
    """What is wrong with the next action of a row."""
    stage, kind, micro = action
    if micro >= micro_batches:
        return f"there are {micro_batches} micro batches, numbered from 0"
    if home.setdefault(stage, rank) != rank:
        return f"stage {stage} is in row {home[stage] + 1} already, and a stage is on one rank"
    if action in seen:
        return "comes a second time"
    if kind in "BI" and (other := action._replace(kind="I" if kind == "B" else "B")) in seen:
        return f"{other} is this backward pass already"
    first = action._replace(kind="I" if kind == "W" else "F")
    if kind != "F" and first not in seen:
        return f"needs {first} before it in its row"
    return None


def _complete(
    path: Path, home: dict[int, int], seen: set[Action], ranks: int, stages_per_rank: int, micro_batches: int
) -> None:
    """Raise ValueError where stages or actions are missing."""
    for stage in range(len(home)):
        if stage not in home:
            raise ValueError(f"{path}: no row has stage {stage}, though there are stages up to {max(home)}")
    for rank in range(ranks):
        count = list(home.values()).count(rank)
        if count == 0:
            raise ValueError(f"{path}: row {rank + 1} has no actions, but every rank needs a stage")
        if stages_per_rank not in (0, count):
            raise ValueError(f"{path}: row {rank + 1} has {count} stages, not {stages_per_rank} as the plan says")
    for stage, rank in sorted(home.items()):
        for micro in range(micro_batches):
            last: Kind = "W" if Action(stage, "I", micro) in seen else "B"
            for action in (Action(stage, "F", micro), Action(stage, last, micro)):
                if action not in seen:
                    raise ValueError(f"{path}: row {rank + 1} lacks {action}")
