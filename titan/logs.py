"""A log file for each rank, and a console that shows rank 0.

`<output>/logs/rank-<rank>.log` gets what the rank says. A rank above 0 is silent on the console: its file descriptors 1
and 2 lead to its log, so that a C++ warning or a segmentation fault's stack lands there too. Rank 0 keeps the console
and its progress bars, and what Python prints there is copied into its log, without the redrawn states of a bar and without
colours.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import sys
import time
import traceback
from pathlib import Path
from typing import IO, Any, TextIO, cast

from titan.status import write_first_failure
from titan.terminal import plain

STARTED = time.time()


def log_path(output: Path, rank: int) -> Path:
    """Where the log of a rank lies."""
    return output / "logs" / f"rank-{rank}.log"


class Tee:
    """A console stream that copies whole lines into a log. All but `write` is the console's own: isatty, fileno, encoding."""

    def __init__(self, console: IO[str], log: IO[str]) -> None:
        self._console = console
        self._log = log
        self._line = ""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._console, name)

    def write(self, text: str) -> int:
        self._console.write(text)
        *lines, rest = (self._line + text).split("\n")
        for line in lines:
            self._log.write(plain(_last_redraw(line)).rstrip("\r") + "\n")
        self._line = _last_redraw(rest)
        return len(text)

    def writelines(self, lines: Any) -> None:
        for line in lines:
            self.write(line)


def _last_redraw(line: str) -> str:
    """What a terminal would show of a line that carriage returns start over."""
    return line[line.rstrip("\r").rfind("\r") + 1 :]


def open_logs(output: Path, rank: int) -> None:
    """From here on, what this process prints is in `<output>/logs/rank-<rank>.log` (appended); only rank 0 keeps the console.

    Raises OSError, naming the file, where the log cannot be written.
    """
    path = log_path(output, rank)
    path.parent.mkdir(parents=True, exist_ok=True)
    log = path.open("a", encoding="utf-8", buffering=1)
    log.write(f"--- {time.strftime('%Y-%m-%d %H:%M:%S')} rank {rank}, node {os.uname().nodename}, pid {os.getpid()}\n")
    if rank == 0:
        sys.stdout = cast(TextIO, Tee(sys.stdout, log))
        sys.stderr = cast(TextIO, Tee(sys.stderr, log))
    else:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
            os.dup2(log.fileno(), stream.fileno())
        cast(Any, sys.stdout).reconfigure(line_buffering=True)
    faulthandler.enable(file=log)


def record_failure(error: BaseException, rank: int, output: Path | None) -> None:
    """Leave a rank's failure where it is looked for. Call it in the `except` block, just before leaving with exit code 1.

    The traceback goes into the rank's log, into torch's error file (which the launcher and torchrun read to show the
    first failure), and into status.json, where the first failure of the job stays. The console gets it only when no
    launcher is there to show it. `output` is None when the failure came before the folder was known. A full disk hides
    nothing: what can be written is.
    """
    text = "".join(traceback.format_exception(error))
    if output is not None:
        with contextlib.suppress(OSError):
            path = log_path(output, rank)
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("a", encoding="utf-8") as log:
                log.write(text)
    with contextlib.suppress(ImportError, OSError):
        from torch.distributed.elastic.multiprocessing.errors import get_error_handler

        get_error_handler().record_exception(error)
    if output is not None:
        with contextlib.suppress(OSError):
            facts = {"exit_code": 1, "rank": rank, "node": os.uname().nodename, "pid": os.getpid()}
            write_first_failure(output, _ranks_started(), error=f"{type(error).__name__}: {error}", traceback=text, **facts)
    if "TITAN_LAUNCHER" not in os.environ and (rank == 0 or output is None):
        print(text, end="", file=sys.__stderr__, flush=True)


def _ranks_started() -> float:
    """When this node's ranks were started, in seconds since 1970: a failure noted earlier is another run's.

    The launcher, or torchrun, makes the folders of the error files just before. This process' own start would be too
    late: a rank can fail while another still imports torch.
    """
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    with contextlib.suppress(OSError, IndexError):
        if file:
            return Path(file).parents[1].stat().st_mtime
    return STARTED
