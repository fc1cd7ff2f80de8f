"""Stopping on request: whoever asks, the ranks finish the step they are in, save, and leave with exit code 75.

A signal reaches ranks at different moments, so no rank acts on its own: it raises a flag that travels with the count of the
next batch's tokens, and all ranks stop after the same step. A Ctrl-C that comes more than a second after
the first signal leaves at once; a sooner one is the same request, seen twice.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import time
from types import FrameType
from typing import Any

SAME_REQUEST_SECONDS = 1.0
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
    """This rank's wish to stop: a signal, or a wall-clock budget in seconds from now."""

    def __init__(self, max_seconds: float | None = None) -> None:
        self.deadline = None if max_seconds is None else time.monotonic() + max_seconds
        self.asked: float | None = None
        for number in SIGNALS:
            signal.signal(number, self._on_signal)

    def wanted(self) -> bool:
        return self.asked is not None or (self.deadline is not None and time.monotonic() > self.deadline)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.asked is None:
            self.asked = now
        # A terminal's Ctrl-C arrives twice, directly and through the launcher; a person's second one comes later.
        elif number == signal.SIGINT and now - self.asked > SAME_REQUEST_SECONDS:
            os._exit(1)


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
