"""manifest.json: which files a committed folder holds, with the size and the SHA-256 of each.

A disk or a network that returns other bytes than it was given says nothing of it. So what each file holds is noted while it is
written, from the bytes in memory, and checked against before anything is loaded. The digests are those of `sha256sum`. They
guard against accidents; whoever can change a file can change the manifest.

What others wrote is read here as something that anyone may have written: names that lead out of the folder, links and numbers
that make no sense are refused. No torch: listing and checking checkpoints works anywhere.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from titan.files import write_atomically

FORMAT = "titan-checkpoint"
VERSION = 2
MANIFEST = "manifest.json"


class CheckpointError(Exception):
    """A checkpoint that cannot be written, read or trusted. The message names the file, what is wrong and what to do."""


class DamagedError(CheckpointError):
    """A committed folder that does not hold what its manifest says, or has no manifest that makes sense."""


class Written(NamedTuple):
    """What a file holds: its size, and its SHA-256 in hexadecimal digits."""

    bytes: int
    sha256: str


class Manifest(NamedTuple):
    """What a committed folder holds: a step, and files by name."""

    step: int
    files: dict[str, Written]


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
        raise DamagedError(f"{path}: no such file; the checkpoint is not complete") from None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from error
    except (ValueError, RecursionError) as error:
        raise DamagedError(f"{path}: not valid JSON ({error}); use another checkpoint") from error
    if not isinstance(value, dict):
        raise DamagedError(f"{path}: expected a JSON object, found {type(value).__name__}; use another checkpoint")
    return value


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def read_format(path: Path, name: str, version: int) -> dict[str, Any]:
    """`read_json` of a file that says which format and version it is; CheckpointError unless they are these."""
    value = read_json(path)
    if value.get("format") != name:
        raise DamagedError(f"{path}: format is {value.get('format')!r}, expected {name!r}; this is not a titan checkpoint")
    if value.get("version") != version:
        raise CheckpointError(
            f"{path}: version is {value.get('version')!r}, this titan reads {version}; use the titan that wrote it"
        )
    return value


# The manifest


def is_plain_name(name: object) -> bool:
    """Whether a name read from a file is that of a file in the same folder: no way up, no way out, nothing hidden."""
    return isinstance(name, str) and re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9._-]*", name) is not None and ".." not in name


def read_manifest(folder: Path) -> Manifest:
    """What a committed folder says that it holds: {"format", "version", "step", "files": {name: {"bytes", "sha256"}}}.

    DamagedError where it says nothing, or nothing that makes sense; CheckpointError where another titan has to read it.
    """
    path = folder / MANIFEST
    raw = read_format(path, FORMAT, VERSION)
    step, files = raw.get("step"), raw.get("files")
    if type(step) is not int or step < 0:
        raise DamagedError(f"{path}: step is {step!r}, expected a whole number, 0 or more; use another checkpoint")
    if not isinstance(files, dict):
        raise DamagedError(f"{path}: files is {files!r}, expected an object; use another checkpoint")
    for name, entry in files.items():
        size, digest = (entry.get("bytes"), entry.get("sha256")) if isinstance(entry, dict) else (None, None)
        if not is_plain_name(name) or type(size) is not int or size < 0 or not _is_digest(digest):
            said = "not a plain name, a size and a SHA-256; do not trust it"
            raise DamagedError(f"{path}: files has {name!r}: {entry!r}, {said}")
    return Manifest(step, {name: Written(entry["bytes"], entry["sha256"]) for name, entry in files.items()})


def write_manifest(folder: Path, manifest: Manifest) -> None:
    files = {name: written._asdict() for name, written in manifest.files.items()}
    write_json(folder / MANIFEST, {"format": FORMAT, "version": VERSION, "step": manifest.step, "files": files})


def check_sizes(folder: Path) -> Manifest:
    """The manifest of a committed folder, if every file it lists is there in that size; else DamagedError with its name."""
    manifest = read_manifest(folder)
    for name, written in sorted(manifest.files.items()):
        path = folder / name
        if path.is_symlink() or not path.is_file():
            raise DamagedError(f"{path}: listed in {MANIFEST}, but not a file there; use another checkpoint")
        if (size := path.stat().st_size) != written.bytes:
            raise DamagedError(f"{path}: {size} bytes, {MANIFEST} says {written.bytes}; use another checkpoint")
    return manifest


def check_contents(folder: Path, files: Mapping[str, Written], progress: Callable[[int], object] = lambda size: None) -> None:
    """DamagedError unless each of the files holds what was written; OSError where one cannot be read.

    progress: called with the number of bytes that were read since the last call.
    """
    for name, written in files.items():
        if (found := digest(folder / name, progress)) != written.sha256:
            said = f"its SHA-256 is {found[:12]}.., {MANIFEST} says {written.sha256[:12]}.."
            raise DamagedError(f"{folder / name}: not what was written: {said}; use another checkpoint")


def verify(folder: Path, progress: Callable[[int], object] = lambda size: None) -> Manifest:
    """The manifest of a committed folder, if everything in it is as it was written; else DamagedError naming the file."""
    manifest = check_sizes(folder)
    check_contents(folder, manifest.files, progress)
    return manifest


def digest(path: Path, progress: Callable[[int], object] = lambda size: None) -> str:
    """SHA-256 of a file, in hexadecimal digits."""
    found, buffer = hashlib.sha256(), memoryview(bytearray(1 << 20))
    with open(path, "rb", buffering=0) as file:
        while size := file.readinto(buffer):
            found.update(buffer[:size])
            progress(size)
    return found.hexdigest()


def _is_digest(value: object) -> bool:
    return isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) is not None
