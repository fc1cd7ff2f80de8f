"""Which step a run goes on from: the newest that is whole, every byte of it.

All ranks share the reading: each takes some of the files. A step that does not hold what was written is set aside, under
another name and with the reason beside it, and the one before is tried. That costs the steps in between, so it is said in a way
that cannot be missed. Where damaged steps are all there is, the run does not quietly start anew: it fails.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

from titan.checkpoint.commit import damaged_folders, folders, set_aside, step_folder, sweep
from titan.checkpoint.manifest import (
    CheckpointError,
    DamagedError,
    Manifest,
    Written,
    check_contents,
    check_sizes,
    read_manifest,
)
from titan.ranks import Ranks, gathered, on_first, same_outcome
from titan.terminal import warn


def newest_whole(root: Path, ranks: Ranks) -> Path | None:
    """The newest whole step under `root`, or None where there never was one. Every rank calls it, while nobody saves.

    Leftovers of crashed saves are removed. CheckpointError, on all ranks, where only damaged steps are left, or a file cannot
    be read at all.
    """
    on_first(ranks, lambda: sweep(root))
    while True:
        folder = on_first(ranks, lambda: next(reversed(folders(root)), None))
        if folder is None:
            aside = on_first(ranks, lambda: damaged_folders(root))
            if aside:
                said = f"no whole step is left in {root}, only {', '.join(path.name for path in aside)}"
                raise CheckpointError(f"{said}: move them away to start from step 0, or name a new folder (--job.output=...)")
            return None
        reason = on_first(ranks, partial(_misnamed, folder)) or what_is_wrong(folder, ranks)
        if reason is None:
            return folder
        moved = on_first(ranks, partial(set_aside, folder, reason))
        if ranks.first:
            warn(f"{folder} is damaged and is not used: {reason}\nIt is now {moved}. What follows the step before it is lost.")


def what_is_wrong(folder: Path, ranks: Ranks) -> str | None:
    """Why a committed folder cannot be trusted, the same words on every rank; None if it is whole."""
    found = on_first(ranks, lambda: _sizes(folder))
    if isinstance(found, str):
        return found
    mine = dict(shares(found.files, ranks.world)[ranks.rank])
    reason: str | None = None
    with same_outcome(ranks):  # a file that cannot be read is no damage: it may be readable tomorrow
        try:
            check_contents(folder, mine)
        except DamagedError as error:
            reason = str(error)
        except OSError as error:
            raise CheckpointError(f"{folder}: cannot be read ({error})") from error
    return next((said for said in gathered(ranks, reason) if said), None)


def shares(files: dict[str, Written], ranks: int) -> list[list[tuple[str, Written]]]:
    """The files in as many parts as there are ranks, of about equal size."""
    parts: list[list[tuple[str, Written]]] = [[] for _ in range(ranks)]
    sizes = [0] * ranks
    for name, written in sorted(files.items(), key=lambda item: (-item[1].bytes, item[0])):
        least = sizes.index(min(sizes))
        parts[least].append((name, written))
        sizes[least] += written.bytes
    return parts


def _sizes(folder: Path) -> Manifest | str:
    try:
        return check_sizes(folder)
    except DamagedError as error:
        return str(error)


def _misnamed(folder: Path) -> str:
    """What is wrong where a step's folder holds another step; nothing is said of one that cannot be read."""
    try:
        step = read_manifest(folder).step
    except DamagedError:
        return ""
    return "" if step_folder(folder.parent, step) == folder else f"{folder}: its manifest is of step {step}"
