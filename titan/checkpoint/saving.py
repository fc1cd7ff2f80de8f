"""When a checkpoint is written: while training waits, or beside it.

Beside it, training waits for a copy in memory alone (`staging`); one thread writes that copy, on a process group of its own, so
that its plans and barriers never mix with training's collectives. There is one save at a time: one that is due while another is
under way waits for it, or is left out.

Ranks see their threads end at different moments, and all have to do the same, so no rank acts on what only it sees: whether a
save is under way, and whether it failed, travels with the count of the next step's tokens. So a failure is heard of, on
every rank, before the next step begins.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from titan.checkpoint.manifest import CheckpointError
from titan.config import Checkpoint
from titan.ranks import Ranks
from titan.terminal import warn

Write = Callable[[], Path]


@dataclass
class Pending:
    """A save under way."""

    step: int
    started: float
    beside: bool
    """Whether training goes on meanwhile."""
    result: Future[Path]


class Saver:
    """Runs a rank's saves."""

    def __init__(self, config: Checkpoint, ranks: Ranks, saved: int, say: Callable[[str], None]) -> None:
        """saved: the step that the run goes on from. say: prints a line for people, on rank 0."""
        self.saved = saved
        """The newest step that is saved, or being saved and not known to have failed."""
        self.config, self.ranks, self.say = config, ranks, say
        self.stalled = 0.0
        """Seconds that training has waited for saves; whoever reads them sets them back."""
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Pending | None = None

    @property
    def busy(self) -> bool:
        """Whether this rank's thread still writes."""
        return self._pending is not None and not self._pending.result.done()

    @property
    def failed(self) -> bool:
        """Whether what this rank's thread wrote came to nothing, and nobody has heard of it yet."""
        done = self._pending is not None and self._pending.result.done()
        return done and self._pending.result.exception() is not None  # type: ignore[union-attr]

    def look(self, failed: bool) -> None:
        """Between steps: tell of a save that is done. failed: on any rank. CheckpointError if the job is to stop for that."""
        if failed:
            self.finish()
        elif self._pending is not None and not self.busy and not self.failed:
            self._tell()

    def save(self, step: int, prepare: Callable[[], Write], *, busy: bool, last: bool) -> None:
        """Save a step. CheckpointError, on all ranks, if it cannot be and the job is to stop.

        prepare: makes a copy of what is to be saved, if that is to happen beside training, and returns what writes it.
        busy: whether any rank still writes another. last: nothing comes after this one: it is on disk when this returns.
        """
        if busy and not last and self.config.when_busy == "skip":
            self.say(f"step {step} is not saved: an earlier save is still under way")
            return
        self.finish()  # which counts its own waiting
        began = time.perf_counter()
        result: Future[Path] = Future()
        beside = self.config.async_save and not last
        try:
            write = prepare()
            if beside:
                result = self._thread.submit(write)
            else:
                result.set_result(write())
        except Exception as error:
            result.set_exception(error)
        self._pending, self.saved = Pending(step, began, beside, result), step
        stalled = time.perf_counter() - began
        self.stalled += stalled
        if not beside:  # else a thread that is done at once would be heard of on this rank alone
            self.finish(last=last)
        elif stalled > 1:
            self.say(f"saving step {step} beside training, which waited {stalled:.1f} s for it")

    def finish(self, last: bool = False) -> None:
        """Wait for a save that is under way. last: its failure is the job's, whatever checkpoint.on_error says."""
        if self._pending is None:
            return
        began, step = time.perf_counter(), self._pending.step
        error = self._pending.result.exception()
        self.stalled += time.perf_counter() - began
        if error is None:
            self._tell()
            return
        self._pending, self.saved = None, step - 1
        lost = f"step {step} is not saved: {error}"
        if last or self.config.on_error == "stop":
            raise CheckpointError(lost) from error
        if self.ranks.first:
            warn(f"{lost}\nTraining goes on (checkpoint.on_error); what follows the step saved before would be lost.")

    def _tell(self) -> None:
        assert self._pending is not None
        pending, self._pending = self._pending, None
        took = f" ({time.perf_counter() - pending.started:.1f} s, beside training)" if pending.beside else ""
        self.say(f"saved {pending.result.result()}{took}")
