"""A crew: the pieces of a corpus made by several processes of this machine, each piece by one.

They are started anew (spawn), not forked: whoever prepares may have threads. They end with the process that started them,
however that ends, and at its word in mid-piece. One that dies takes nothing with it but the piece it was at.
"""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import FIRST_EXCEPTION, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from titan.data.chat import load_chat
from titan.data.encode import Encoder
from titan.data.pieces import Segment
from titan.data.tokenizer import load_tokenizer
from titan.progress import ProgressBar

TELL_SECONDS = 0.1


class CrewError(RuntimeError):
    """A process died. The message says what it may have been at."""


@dataclass(frozen=True)
class Job:
    """What all pieces have in common."""

    folder: Path
    tokenizer: str
    """As `load_tokenizer` takes it."""
    chat_template: str | None
    """As `load_chat` takes it; None: rows are texts."""
    column: str
    skip_bad: bool

    def encoder(self, read: Callable[[int], None], made: Callable[[int], None]) -> Encoder:
        tokenizer = load_tokenizer(self.tokenizer)
        chat = None if self.chat_template is None else load_chat(self.chat_template, tokenizer)
        return Encoder(self.folder, tokenizer, chat, self.column, self.skip_bad, read, made)


@dataclass(frozen=True)
class Task:
    """A piece to be made."""

    number: int
    piece: list[Segment]
    bound: float


def make(job: Job, tasks: list[Task], workers: int, progress: ProgressBar) -> None:
    """Make the pieces. Raises what `Encoder.make` raises for the first that fails, or CrewError; those done stay done."""
    if min(workers, len(tasks)) <= 1:
        encoder = job.encoder(progress.add, progress.count)
        for task in tasks:
            encoder.make(task.number, task.piece, task.bound)
        return
    context = multiprocessing.get_context("spawn")
    counters, stop = (context.Value("q"), context.Value("q")), context.RawValue("b", 0)
    with ProcessPoolExecutor(
        min(workers, len(tasks)), mp_context=context, initializer=_start, initargs=(job, counters, stop)
    ) as crew:
        waiting = {crew.submit(_make, task): task for task in tasks}
        told = [0, 0]
        try:
            while waiting:
                finished = wait(waiting, TELL_SECONDS, FIRST_EXCEPTION).done
                now = [counter.get_obj().value for counter in counters]  # without the lock, which a killed process may hold
                progress.count(now[1] - told[1])
                progress.add(now[0] - told[0])
                told = now
                at = list(waiting.values())[:workers]  # those not done that were handed out first
                for future in finished:
                    _result(future, at)
                    del waiting[future]
        finally:
            stop.value = 1
            crew.shutdown(cancel_futures=True)


def _result(future: Future[Any], at: list[Task]) -> None:
    try:
        future.result()
    except BrokenProcessPool as error:
        files = ", ".join(dict.fromkeys(segment.place for task in at for segment in task.piece[:1]))
        raise CrewError(
            f"a process that made tokens died (killed, or out of memory?), near {files}; "
            "what is done is kept: start again, perhaps with fewer --workers"
        ) from error


class _Stopped(Exception):
    """Others failed, or the user stopped."""


class _Teller:
    """Adds to a number that is shared between processes, ten times a second."""

    def __init__(self, shared: Any, stop: Any) -> None:
        self.shared, self.stop = shared, stop
        self.own, self.last = 0, time.monotonic()

    def __call__(self, count: int) -> None:
        self.own += count
        if time.monotonic() - self.last > TELL_SECONDS:
            self.tell()
            if self.stop.value:
                raise _Stopped

    def tell(self) -> None:
        with self.shared.get_lock():
            self.shared.value += self.own
        self.own, self.last = 0, time.monotonic()


def _start(job: Job, counters: tuple[Any, Any], stop: Any) -> None:
    """Set a process up for `_make`, which finds its tools on the function itself."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's Ctrl-C is for the one that started us, which tells us
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # every core has a process already
    threading.Thread(target=_end_with_parent, daemon=True).start()
    tellers = [_Teller(counter, stop) for counter in counters]
    _make.tools = (job.encoder(*tellers), tellers)  # type: ignore[attr-defined]


def _make(task: Task) -> None:
    encoder, tellers = _make.tools  # type: ignore[attr-defined]
    try:
        encoder.make(task.number, task.piece, task.bound)
    finally:
        for teller in tellers:
            teller.tell()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)
