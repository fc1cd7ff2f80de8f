"""One job at a time in an output folder.

Two jobs that save into one folder would each take the other's steps for its own. So the first rank holds a lock on a file
there for as long as it lives. The kernel keeps the lock, not the file: a job that is killed leaves none behind. It is a POSIX
record lock (lockf), which network file systems know as well, and which the workers of a data loader do not inherit. The file
says who holds it, for the one who is refused.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import platform
import time
from pathlib import Path
from typing import IO

from titan.toml import ConfigError

FILE = ".lock"
WAIT_SECONDS = 10.0
WITHOUT_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EINVAL, errno.ENOSYS)


class InUseError(ConfigError):
    """Another job works in the output folder."""


class HeldError(Exception):
    """Another process holds a lock. The message says who."""


def lock(output: Path, wait_seconds: float = WAIT_SECONDS) -> IO[str] | None:
    """Take the lock of a folder; it is held until the file that comes back is closed, or this process ends.

    Waits a moment for a job that is about to end. None where the file system has no locks. InUseError, saying who has it.
    """
    output.mkdir(parents=True, exist_ok=True)
    try:
        return hold(output / FILE, wait_seconds)
    except HeldError as error:
        raise InUseError(f"job.output: {output} is in use by {error}; stop that first") from None


def hold(path: Path, wait_seconds: float) -> IO[str] | None:
    """Lock a file, which is made where it is not there. None where the file system has no locks. HeldError, OSError."""
    file = path.open("a+", encoding="utf-8")
    deadline = time.monotonic() + wait_seconds
    while True:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except OSError as error:
            if error.errno in WITHOUT_LOCKS:
                file.close()
                return None
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                raise
            if time.monotonic() > deadline:
                file.seek(0)
                said = file.read()
                file.close()  # now: a lock on the same file, taken later, would go with it
                raise HeldError(_holder(said)) from None
        time.sleep(0.1)
    file.truncate(0)
    job = os.environ.get("SLURM_JOB_ID")
    json.dump({"node": platform.node(), "pid": os.getpid(), "job": job, "since": time.strftime("%Y-%m-%d %H:%M:%S")}, file)
    file.flush()
    return file


def _holder(text: str) -> str:
    try:
        who = json.loads(text)
        job = f", SLURM job {who['job']}" if who["job"] else ""
        return f"another job (node {who['node']}, pid {who['pid']}{job}, since {who['since']})"
    except (ValueError, KeyError, TypeError):
        return "another job"
