"""status.json: how the run in a folder stands, in one small file.

A scheduler's script, or a person, asks one thing of a run's folder: is it running, finished, stopped with everything
saved, or failed, and why? Exit codes do not always come through (plain torchrun turns each of them into 1), a file does.
It is replaced as a whole, so a reader finds the old state or the new one and never half of it.
"""

from __future__ import annotations

import json
import time
from enum import IntEnum
from pathlib import Path
from typing import Any

from titan.files import write_atomically


class Exit(IntEnum):
    """The exit codes of a run."""

    FINISHED = 0
    FAILED = 1
    WRONG_CONFIG = 2
    STOPPED = 75


class Failed(RuntimeError):
    """What a command was asked to do failed, for a reason that is said in one sentence: exit code 1, without a traceback."""


def write_status(output: Path, state: str, **facts: object) -> None:
    """Replace `<output>/status.json` with {"state": state, **facts, "time": seconds since 1970}, on disk when this returns.

    `facts` are what JSON can hold: exit_code, step, rank, error, traceback. Raises OSError where the folder cannot be written.
    """
    output.mkdir(parents=True, exist_ok=True)
    write_atomically(output / "status.json", json.dumps({"state": state, **facts, "time": time.time()}, indent=1) + "\n")


def write_first_failure(output: Path, since: float, **facts: object) -> None:
    """Write the state "failed", unless another rank has failed since `since` (seconds since 1970): the first reason stays.

    One rank's failure makes the others fail a moment later, with errors that only say that a peer is gone.
    """
    try:
        before = read_status(output)
    except (OSError, ValueError):
        before = None
    if before is None or before["state"] != "failed" or before.get("time", 0) < since:
        write_status(output, "failed", **facts)


def read_status(output: Path) -> dict[str, Any] | None:
    """What `<output>/status.json` holds; None where there is none. Raises ValueError where it is not a status."""
    path = output / "status.json"
    try:
        status = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}); remove it, it is written again at the next start") from error
    if not isinstance(status, dict) or "state" not in status:
        raise ValueError(f"{path} holds no state; remove it, it is written again at the next start")
    return status
