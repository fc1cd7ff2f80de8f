"""Stopping on request: whoever asks, the ranks finish the step they are in, save, and leave with exit code 75.

Who may ask: a signal (SIGTERM, SIGUSR1, Ctrl-C), a file named `stop` in the output folder, a wall-clock budget
(job.max_seconds), or SLURM's own time limit for the job, early enough to save.

A signal reaches ranks at different moments, so no rank acts on its own: it raises a flag that travels with the count of the
next batch's tokens, and all ranks stop after the same step. A Ctrl-C that comes more than a second after
the first signal leaves at once; a sooner one is the same request, seen twice.

Whoever submits the job again has to know why it stopped: what ran out of time goes on, what a person stopped does not. So the
reason is in status.json, and, for the script that a scheduler runs, in the file that TITAN_REASON_FILE names.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import FrameType
from typing import Any

SAME_REQUEST_SECONDS = 1.0
FILE_SECONDS = 1.0
STOP_FILE = "stop"
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


def die_with_launcher() -> None:
    """Have the kernel kill this rank when its launcher dies (Linux): a rank of a job that is gone would go on writing into
    the folder that the next start of the job uses."""
    if sys.platform != "linux" or "TITAN_LAUNCHER" not in os.environ:
        return
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    if os.getppid() != int(os.environ["TITAN_LAUNCHER"]):  # it is dead already
        os.kill(os.getpid(), signal.SIGKILL)


class Stop:
    """This rank's wish to stop: a signal, a file, or a time at which it has to."""

    def __init__(self, seconds: float | None = None) -> None:
        """seconds: how much time there is, from now; None: no end."""
        self.deadline = None if seconds is None else time.monotonic() + seconds
        self.file: Path | None = None
        """One whose being there asks for a stop; for one rank to look at."""
        self.asked: float | None = None
        self._looked = -FILE_SECONDS
        self._file_is_there = False
        for number in SIGNALS:
            signal.signal(number, self._on_signal)

    def wanted(self) -> bool:
        """Whether a person, or a program, asks to stop."""
        return self.asked is not None or self._look()

    def out_of_time(self) -> bool:
        return self.deadline is not None and time.monotonic() > self.deadline

    def now(self) -> bool:
        return self.wanted() or self.out_of_time()

    def done(self) -> None:
        """Stopped, and saved: the file has been heeded, the next start is not to stop for it."""
        if self.file is not None:
            self.file.unlink(missing_ok=True)

    def _look(self) -> bool:
        now = time.monotonic()
        if self.file is not None and now - self._looked > FILE_SECONDS:
            self._looked, self._file_is_there = now, self.file.exists()
        return self._file_is_there

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.asked is None:
            self.asked = now
        # A terminal's Ctrl-C arrives twice, directly and through the launcher; a person's second one comes later.
        elif number == signal.SIGINT and now - self.asked > SAME_REQUEST_SECONDS:
            os._exit(1)


def seconds_left(budget: float | None, to_save: float, environ: Mapping[str, str] = os.environ) -> float | None:
    """Until when to stop by itself, in seconds from now; None: never. budget: job.max_seconds.

    to_save: how long before SLURM's time limit, where the job has one that SLURM tells of; at most a tenth of the whole time.
    """
    begin, end = (environ.get(f"SLURM_JOB_{which}_TIME", "") for which in ("START", "END"))
    found = [] if budget is None else [budget]
    if begin.isdigit() and end.isdigit():
        found.append(int(end) - min(to_save, (int(end) - int(begin)) / 10) - time.time())
    return min(found, default=None)


def tell_reason(reason: str) -> None:
    """Leave why it stopped for the script that started it, if it asked for that."""
    if file := os.environ.get("TITAN_REASON_FILE"):
        Path(file).write_text(reason + "\n")


class StoppedEarlyError(BaseException):
    """A signal came before the ranks were started: there is nothing to save."""


class StopRequest:
    """The signals that ask the launcher to stop, noted while the `with` block runs.

    `signal` is the first one that came. A second Ctrl-C sets `at_once`; one that follows at once is the same key, seen twice.
    """

    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self.at_once = False
        self.started = False
        self._time = 0.0
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopRequest:
        self._before = {number: signal.getsignal(number) for number in self.numbers}
        for number, handler in self._before.items():
            if handler != signal.SIG_IGN:  # as nohup leaves SIGHUP
                signal.signal(number, self._note)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.signal is None:
            self.signal, self._time = signal.Signals(number), now
        elif number == signal.SIGINT and now - self._time > SAME_REQUEST_SECONDS:
            self.at_once = True
        if not self.started:
            raise StoppedEarlyError
