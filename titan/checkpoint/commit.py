"""Make a folder that many ranks wrote appear in one instant, whole, or not at all.

A save can die at any moment: a preempted node, a full disk, a lost power supply. POSIX gives one operation that
cannot be seen half done, the rename. So a step is written under a name that nobody reads, and renamed when it is whole:

    <root>/.step-00000010.tmp/    being written: its leftovers after a crash are ignored, and swept
    <root>/step-00000010/         committed: never written again
    <root>/step-00000010.damaged/ was committed, but no longer holds what was written: set aside, with the reason in it

    begin     rank 0 makes the temporary folder; a barrier; every rank writes its files into it; a barrier
    commit    rank 0 adds manifest.json (what should be here, with sizes and checksums), then fsyncs files, folder, renames,
              fsyncs the root
    remove    the same backwards: the rename first, then the files

The order of the fsyncs is what makes the rename mean something: a file system may bring the new name to the disk before the
bytes it names, unless those are on the disk already. A folder's own entries need an fsync of the folder.

This file needs no torch: listing and checking checkpoints works anywhere.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Mapping
from itertools import count
from pathlib import Path

from titan.checkpoint.manifest import (
    MANIFEST,
    CheckpointError,
    Manifest,
    Written,
    digest,
    is_plain_name,
    read_manifest,
    write_manifest,
)
from titan.files import fsync

REASON = "DAMAGED.txt"


# Names


def step_folder(root: Path, step: int) -> Path:
    """Where step `step` lies once it is committed."""
    return root / f"step-{step:08d}"


def temp_folder(root: Path, step: int) -> Path:
    """Where step `step` lies while it is written."""
    return root / f".step-{step:08d}.tmp"


def _step(path: Path, folder: Callable[[Path, int], Path]) -> int | None:
    """The step in a folder's name, or None where `folder` would not give this very name."""
    digits = re.search("[0-9]{8,}", path.name)
    return int(digits[0]) if digits and folder(path.parent, int(digits[0])).name == path.name else None


# What is there


def committed_steps(root: Path) -> list[int]:
    """The steps that were committed under `root`, ascending. What has another name, or no readable manifest, does not count."""
    steps = []
    for path in root.iterdir() if root.is_dir() else ():
        step = _step(path, step_folder)
        try:
            if step is not None and read_manifest(path).step == step:
                steps.append(step)
        except CheckpointError:
            continue
    return sorted(steps)


def newest(root: Path) -> Path | None:
    """The folder of the newest committed step under `root`, or None."""
    steps = committed_steps(root)
    return step_folder(root, steps[-1]) if steps else None


def folders(root: Path) -> list[Path]:
    """The folders under `root` that have the name of a committed step, whatever is in them, by step."""
    found = ((_step(path, step_folder), path) for path in (root.iterdir() if root.is_dir() else ()))
    return [path for _, path in sorted((step, path) for step, path in found if step is not None)]


def damaged_folders(root: Path) -> list[Path]:
    """What was set aside under `root`."""
    return sorted(path for path in root.glob("step-*.damaged*") if path.is_dir())


def step_of(folder: Path) -> Path:
    """A run's folder stands for its newest committed step; any other for itself. CheckpointError where nothing is there."""
    found = newest(folder / "checkpoints") or newest(folder)
    if found is None and not any((folder / name).is_file() for name in (MANIFEST, "config.json")):
        raise CheckpointError(f"{folder} is neither a committed step nor a run's folder with one, nor a Hugging Face folder")
    return found or folder


def sweep(root: Path) -> list[Path]:
    """Remove, and return, what crashed saves left under `root`. For rank 0, while nobody saves."""
    left = [path for path in root.iterdir() if _step(path, temp_folder) is not None] if root.is_dir() else []
    for path in left:
        _remove(path)
    return sorted(left)


def remove(root: Path, step: int) -> None:
    """Remove a committed step, so that a crash meanwhile leaves a leftover, and no step that lacks files. For rank 0."""
    _remove(temp_folder(root, step))
    os.rename(step_folder(root, step), temp_folder(root, step))
    fsync(root)
    _remove(temp_folder(root, step))


def set_aside(folder: Path, reason: str) -> Path:
    """Rename a folder that has the name of a committed step but is none, so that it is in nobody's way; its new name."""
    names = (f"{folder.name}.damaged{f'-{number}' if number else ''}" for number in count())
    aside = next(path for path in map(folder.with_name, names) if not os.path.lexists(path))
    os.rename(folder, aside)
    if aside.is_dir():
        (aside / REASON).write_text(reason + "\n")
    fsync(folder.parent)
    return aside


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


# A save


def begin(root: Path, step: int, rank: int, barrier: Callable[[], object]) -> Path:
    """Make the empty temporary folder for `step` (rank 0) and return it, on every rank once it is there.

    A leftover of an earlier crash is removed. CheckpointError where the step is there already: a folder is never written
    twice. `barrier` returns when all ranks have called it; it is called once, also when rank 0 fails.
    """
    temp, final = temp_folder(root, step), step_folder(root, step)
    try:
        if rank == 0:
            if os.path.lexists(final):
                state = "is committed already" if step in committed_steps(root) else "exists, but is not a committed checkpoint"
                raise CheckpointError(f"{final}: {state}; a step is never written twice: move it away to save this step")
            root.mkdir(parents=True, exist_ok=True)
            fsync(root.parent)
            _remove(temp)
            temp.mkdir()
    except OSError as error:
        raise CheckpointError(f"{temp}: cannot be made ({error})") from error
    finally:
        barrier()
    if not temp.is_dir():
        reason = "rank 0 could not make it (its own error says why), or the ranks do not share this folder"
        raise CheckpointError(f"rank {rank}: {temp} is not there: {reason}")
    return temp


def commit(temp: Path, written: Mapping[str, Written] | None = None) -> Path:
    """Turn the temporary folder into the committed step, and return that. For rank 0, after every rank has written its files.

    written: what is known to be in files, noted as they were written; the others are read.
    When this returns, the step is on the disk. Until the rename inside it, a crash leaves the earlier steps as they were.
    CheckpointError where the step is committed already, or where something other than plain files is in the folder.
    """
    step = _step(temp, temp_folder)
    if step is None or not temp.is_dir():
        raise CheckpointError(f"{temp}: not a folder made by begin; nothing was committed")
    try:
        return seal(temp, step_folder(temp.parent, step), step, written)
    except OSError as error:
        raise CheckpointError(f"{temp}: cannot be committed ({error})") from error


def seal(temp: Path, final: Path, step: int, written: Mapping[str, Written] | None = None) -> Path:
    """Commit a folder of any name: list its files in a manifest, sync, rename to `final`, which lies beside it."""
    if os.path.lexists(final):
        raise CheckpointError(f"{final}: exists already, and a step is never written twice; {temp} was left as it is")
    files = {}
    for path in sorted(set(temp.iterdir()) - {temp / MANIFEST}):
        if not is_plain_name(path.name) or path.is_symlink() or not path.is_file():
            raise CheckpointError(f"{path}: only plain files belong in a checkpoint; nothing was committed")
        fsync(path)
        files[path.name] = (written or {}).get(path.name) or Written(path.stat().st_size, digest(path))
        if (size := path.stat().st_size) != files[path.name].bytes:
            raise CheckpointError(f"{path}: {size} bytes, not the {files[path.name].bytes} that were written")
    if missing := sorted(set(written or {}) - set(files)):
        raise CheckpointError(f"{temp / missing[0]}: was written, but is not there; the ranks must share this folder")
    write_manifest(temp, Manifest(step, files))
    os.rename(temp, final)
    fsync(temp.parent)
    return final
