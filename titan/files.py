"""Files that survive a crash: a reader finds the old contents or the new ones, never half of them.

Written under another name, synced to the disk, renamed, and the folder synced too, since a rename is an entry in it. In that
order: a file system may bring the new name to the disk before the bytes, unless those are there already.
"""

from __future__ import annotations

import os
import platform
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def write_atomically(path: Path, text: str) -> None:
    """Replace a file's contents, UTF-8; they are on the disk when this returns. Raises OSError."""
    write_bytes_atomically(path, text.encode())


def write_bytes_atomically(path: Path, content: bytes) -> None:
    """Replace a file's contents; they are on the disk when this returns. Raises OSError."""
    temporary = temporary_name(path)
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    fsync(path.parent)


def temporary_name(path: Path) -> Path:
    """Under what name this process writes a file that is to become `path`."""
    return path.with_name(f".{path.name}.{platform.node()}.{os.getpid()}.tmp")


def remove_leftovers(folder: Path) -> None:
    """Remove the temporary files in a folder that dead processes of this host left."""
    for file in folder.glob(".*.tmp"):
        owner = re.search(rf"\.{re.escape(platform.node())}\.(\d+)\.tmp$", file.name)
        if owner and not _is_alive(int(owner[1])):
            file.unlink(missing_ok=True)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # someone else's
        pass
    return True


@contextmanager
def temporary_folder(final: Path) -> Iterator[Path]:
    """A new folder beside `final`, to be filled and renamed to it; what is not renamed is removed. Raises OSError.

    What dead processes of this host left of the same is removed first. Of other hosts' processes nothing is known.
    """
    final.parent.mkdir(parents=True, exist_ok=True)
    prefix = f".{final.name}.{platform.node()}."
    for leftover in final.parent.glob(f"{prefix}*.tmp"):
        pid = re.match(r"(\d+)\.[0-9a-f]+\.tmp$", leftover.name.removeprefix(prefix))
        if pid and not _is_alive(int(pid[1])):
            shutil.rmtree(leftover, ignore_errors=True)
    temporary = final.with_name(f"{prefix}{os.getpid()}.{secrets.token_hex(4)}.tmp")
    temporary.mkdir()
    try:
        yield temporary
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def publish(temporary: Path, final: Path) -> None:
    """Rename a filled `temporary_folder` to its name, or take what another process put there first: it holds the same."""
    try:
        temporary.rename(final)
    except OSError:
        if not final.is_dir():
            raise
    fsync(final.parent)


def fsync(path: Path) -> None:
    """Wait until a file's bytes, or a folder's entries, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
