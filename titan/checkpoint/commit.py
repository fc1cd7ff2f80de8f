"""Make a folder that many ranks wrote appear in one instant, whole, or not at all.

A save can die at any moment: a preempted node, a full disk, a lost power supply. POSIX gives one operation that
cannot be seen half done, the rename. So a step is written under a name that nobody reads, and renamed when it is whole:

    <root>/.step-00000010.tmp/    being written: its leftovers after a crash are ignored, and swept
    <root>/step-00000010/         committed: never written again

    begin     rank 0 makes the temporary folder; a barrier; every rank writes its files into it; a barrier
    commit    rank 0 adds manifest.json (what should be here, with sizes), then fsyncs files, folder, renames, fsyncs the root

The order of the fsyncs is what makes the rename mean something: a file system may bring the new name to the disk before the
bytes it names, unless those are on the disk already. A folder's own entries need an fsync of the folder.

This file needs no torch: listing and checking checkpoints works anywhere.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from titan.files import fsync, write_atomically

FORMAT = "titan-checkpoint"
VERSION = 1
MANIFEST = "manifest.json"


class CheckpointError(Exception):
    """A checkpoint that cannot be written, read or trusted. The message names the file, what is wrong and what to do."""


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


def is_plain_name(name: object) -> bool:
    """Whether a name read from a file is that of a file in the same folder: no way up, no way out, nothing hidden."""
    return isinstance(name, str) and re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9._-]*", name) is not None and ".." not in name


# JSON that survives


def write_json(path: Path, value: dict[str, Any], indent: int | None = 2) -> None:
    """Write an object as JSON, so that `path` holds the old text or the new one, whatever happens. Equal objects, equal bytes.

    ValueError for NaN and infinities, which JSON has no words for; TypeError for what is not JSON; CheckpointError where the
    disk refuses.
    """
    text = json.dumps(value, sort_keys=True, allow_nan=False, indent=indent) + "\n"
    try:
        write_atomically(path, text)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be written ({error})") from error


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file. CheckpointError, naming the file, where there is none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"), parse_constant=_refuse_constant)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file; the checkpoint is not complete") from None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not valid JSON ({error}); use another checkpoint") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: expected a JSON object, found {type(value).__name__}; use another checkpoint")
    return value


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def read_format(path: Path, name: str, version: int) -> dict[str, Any]:
    """`read_json` of a file that says which format and version it is; CheckpointError unless they are these."""
    value = read_json(path)
    if value.get("format") != name:
        raise CheckpointError(f"{path}: format is {value.get('format')!r}, expected {name!r}; this is not a titan checkpoint")
    if value.get("version") != version:
        raise CheckpointError(
            f"{path}: version is {value.get('version')!r}, this titan reads {version}; use the titan that wrote it"
        )
    return value


# What is there


def read_manifest(folder: Path) -> dict[str, Any]:
    """What a committed folder says that it holds: {"format", "version", "step", "files": {name: {"bytes": int}}}."""
    path = folder / MANIFEST
    manifest = read_format(path, FORMAT, VERSION)
    step, files = manifest.get("step"), manifest.get("files")
    if type(step) is not int or step < 0:
        raise CheckpointError(f"{path}: step is {step!r}, expected a whole number, 0 or more; use another checkpoint")
    if not isinstance(files, dict):
        raise CheckpointError(f"{path}: files is {files!r}, expected an object; use another checkpoint")
    for name, entry in files.items():
        size = entry.get("bytes") if isinstance(entry, dict) else None
        if not is_plain_name(name) or type(size) is not int or size < 0:
            raise CheckpointError(f"{path}: files has {name!r}: {entry!r}, not a plain name and a size; do not trust it")
    return manifest


def verify(folder: Path) -> dict[str, Any]:
    """The manifest of a committed folder, if every file it lists is there in that size; else CheckpointError with its name."""
    manifest = read_manifest(folder)
    for name, entry in sorted(manifest["files"].items()):
        path = folder / name
        if path.is_symlink() or not path.is_file():
            raise CheckpointError(f"{path}: listed in {MANIFEST}, but not a file there; use another checkpoint")
        if (size := path.stat().st_size) != entry["bytes"]:
            raise CheckpointError(f"{path}: {size} bytes, {MANIFEST} says {entry['bytes']}; use another checkpoint")
    return manifest


def committed_steps(root: Path) -> list[int]:
    """The steps that were committed under `root`, ascending. What has another name, or no readable manifest, does not count."""
    steps = []
    for path in root.iterdir() if root.is_dir() else ():
        step = _step(path, step_folder)
        try:
            if step is not None and read_manifest(path)["step"] == step:
                steps.append(step)
        except CheckpointError:
            continue
    return sorted(steps)


def newest(root: Path) -> Path | None:
    """The folder of the newest committed step under `root`, or None."""
    steps = committed_steps(root)
    return step_folder(root, steps[-1]) if steps else None


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
    finally:
        barrier()
    if not temp.is_dir():
        reason = "rank 0 could not make it (its own error says why), or the ranks do not share this folder"
        raise CheckpointError(f"rank {rank}: {temp} is not there: {reason}")
    return temp


def commit(temp: Path) -> Path:
    """Turn the temporary folder into the committed step, and return that. For rank 0, after every rank has written its files.

    When this returns, the step is on the disk. Until the rename inside it, a crash leaves the earlier steps as they were.
    CheckpointError where the step is committed already, or where something other than plain files is in the folder.
    """
    step = _step(temp, temp_folder)
    if step is None or not temp.is_dir():
        raise CheckpointError(f"{temp}: not a folder made by begin; nothing was committed")
    return seal(temp, step_folder(temp.parent, step), step)


def seal(temp: Path, final: Path, step: int) -> Path:
    """Commit a folder of any name: list its files in a manifest, sync, rename to `final`, which lies beside it."""
    if os.path.lexists(final):
        raise CheckpointError(f"{final}: exists already, and a step is never written twice; {temp} was left as it is")
    files = {}
    for path in sorted(set(temp.iterdir()) - {temp / MANIFEST}):
        if not is_plain_name(path.name) or path.is_symlink() or not path.is_file():
            raise CheckpointError(f"{path}: only plain files belong in a checkpoint; nothing was committed")
        fsync(path)
        files[path.name] = {"bytes": path.stat().st_size}
    write_json(temp / MANIFEST, {"format": FORMAT, "version": VERSION, "step": step, "files": files})
    os.rename(temp, final)
    fsync(temp.parent)
    return final
