"""A job that hangs ends, and says where.

One rank that comes to no collective any more makes all others wait for it, and each only knows that it waits. So every rank has
a thread that notices when no step was done for `job.hang_seconds`. It writes the stacks of all its threads into its log, and
leaves beside it, for whoever reports, where its main thread is and which collectives it has under way. Rank 0 puts these
together on the console: the rank that hangs is the one that is in no collective, or in another one than the rest.

A Python thread cannot act where the main thread never gives up the interpreter's lock. For that there is faulthandler's timer,
in C: some seconds later it writes the stacks, too, and ends the process.
"""

from __future__ import annotations

import faulthandler
import json
import math
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from titan.logs import log_path
from titan.ranks import Ranks

ANSWER_SECONDS = 3.0
LATER_SECONDS = 15.0


class HangError(RuntimeError):
    """No step was done for too long."""


class Watchdog:
    """Watches over one rank's main thread, which calls `beat` as it goes on."""

    def __init__(self, output: Path, ranks: Ranks, seconds: float, end: Callable[[BaseException], None]) -> None:
        """seconds: without a beat. end: how the process leaves with an error."""
        self.output, self.ranks, self.seconds, self.end = output, ranks, seconds, end
        self.step = 0
        self.log = log_path(output, ranks.rank).open("a")
        self._last = time.monotonic()
        self._over = threading.Event()
        self._main = threading.get_ident()
        _report_path(output, ranks.rank).unlink(missing_ok=True)
        self.beat(0)
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def beat(self, step: int) -> None:
        """The main thread is at work on this step."""
        self.step, self._last = step, time.monotonic()
        faulthandler.dump_traceback_later(self.seconds + LATER_SECONDS, exit=True, file=self.log)

    def rest(self) -> None:
        """Until the next beat, no time is too long: what follows has a time limit of its own."""
        self._last = math.inf
        faulthandler.cancel_dump_traceback_later()

    def close(self) -> None:
        self.rest()
        self._over.set()

    def _watch(self) -> None:
        while not self._over.wait(min(1.0, self.seconds / 4)):
            if time.monotonic() - self._last > self.seconds:
                self._tell()
                return

    def _tell(self) -> None:
        print(f"titan: no step for {self.seconds:g} s; the stacks of rank {self.ranks.rank}:", file=self.log, flush=True)
        faulthandler.dump_traceback(self.log)
        mine = {"step": self.step, "where": self._where(), "pending": pending_collectives(self.ranks.device)}
        _report_path(self.output, self.ranks.rank).write_text(json.dumps(mine))
        if not self.ranks.first:
            time.sleep(2 * ANSWER_SECONDS)  # rank 0 has the whole picture: its words come first
            self.end(HangError(f"no step for {self.seconds:g} s in step {self.step}: {_line(self.ranks.rank, mine)}"))
        time.sleep(ANSWER_SECONDS)
        lines = [_line(rank, _read(_report_path(self.output, rank))) for rank in range(self.ranks.world)]
        said = "\n".join([f"no step for {self.seconds:g} s; where the ranks are:", *lines])
        self.end(HangError(f"{said}\nThe stacks are in {self.output / 'logs'}."))

    def _where(self) -> str:
        """The main thread's innermost frame, and the innermost of ours around it."""
        frame = sys._current_frames().get(self._main)
        stack = traceback.extract_stack(frame)
        ours = [entry for entry in stack if f"{os.sep}titan{os.sep}" in entry.filename]
        shown = dict.fromkeys(f"{Path(e.filename).name}:{e.lineno} {e.name}" for e in (*ours[-1:], *stack[-1:]))
        return " > ".join(shown)


def pending_collectives(device: torch.device) -> list[str]:
    """What PyTorch's flight recorder has of collectives that were begun and are not done; empty where it has none."""
    name = "_dump_nccl_trace_json" if device.type == "cuda" else "_dump_fr_trace_json"
    dump = getattr(torch._C._distributed_c10d, name, None)
    try:
        entries = json.loads(dump(True, False))["entries"] if dump else []
        return [_collective(entry) for entry in entries if not entry.get("retired", True)][-4:]
    except (RuntimeError, ValueError, LookupError, TypeError, AttributeError):  # PyTorch's own format, which may change
        return []


def _collective(entry: dict[str, Any]) -> str:
    number = entry["p2p_seq_id"] if entry["is_p2p"] else entry["collective_seq_id"]
    return f"{entry['profiling_name']} {number} of group {entry['process_group'][0]}, {entry['input_sizes']}"


def _line(rank: int, found: dict[str, Any] | None) -> str:
    if found is None:
        return f"  rank {rank}: no answer"
    waits = "; ".join(found["pending"]) or "no collective under way"
    return f"  rank {rank}: step {found['step']}, {found['where']}; {waits}"


def _report_path(output: Path, rank: int) -> Path:
    return output / "logs" / f"hang-rank-{rank}.json"


def _read(path: Path) -> dict[str, Any] | None:
    try:
        found: dict[str, Any] = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return found
