"""The agent that watches over a node's ranks: torch's elastic agent, with our meaning of an end.

torch's agent brings the nodes together at a meeting point (the rendezvous), numbers the ranks and starts them; that part is
used as it is. What an exit means is decided here, because torch knows only 0 and failed:

- A rank that leaves with 75 has stopped on request, saved. The others are waited for, as after a 0.
- A signal to the launcher reaches each rank once, as SIGTERM, and only the rank's own process: the workers of its data
  loader live on while it saves. A rank that is not done when its time is over is killed.
- A rank that leaves with anything else ends the job: SIGTERM to all processes of the node, SIGKILL a few seconds later.
  The other nodes hear of it through the store that the agents share, where the first to write wins.

Sources: torch.distributed.elastic.agent.server (run, _invoke_run, _exit_barrier), torch.distributed.elastic.multiprocessing.
"""

from __future__ import annotations

import contextlib
import json
import signal
import socket
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch.distributed import Store
from torch.distributed.elastic.agent.server.api import RunResult, WorkerGroup, WorkerSpec, WorkerState
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import LogsSpecs, SubprocessContext

from titan.status import Exit
from titan.stop import SAME_REQUEST_SECONDS, StopRequest

GRACE_SECONDS = 5
ENDING_KEY = "titan/ending"


@dataclass(frozen=True)
class Ending:
    """Why a node's ranks were ended before they ended themselves. `traceback` is empty where no rank left one."""

    code: int
    reason: str
    rank: int | None = None
    traceback: str = ""


class Agent(LocalElasticAgent):
    """One node's ranks, from their start to the last exit. After `run()`, `code` is the launcher's exit code.

    `ending` says why, where the ranks did not end by themselves; `elsewhere` is the node whose ending came first.
    """

    def __init__(self, spec: WorkerSpec, logs_specs: LogsSpecs, stop: StopRequest, shutdown_seconds: float) -> None:
        super().__init__(spec, logs_specs, exit_barrier_timeout=shutdown_seconds)
        self.code: int = Exit.FAILED
        self.ending: Ending | None = None
        self.elsewhere = ""
        self._stop = stop
        self._shutdown_seconds = shutdown_seconds
        self._deadline: float | None = None

    def _start_workers(self, worker_group: WorkerGroup) -> dict[int, Any]:
        self._stop.started = True
        return super()._start_workers(worker_group)  # type: ignore[no-any-return]

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        """Called ten times a second: what became of the ranks, and what to do about it."""
        codes = self._exit_codes(worker_group)
        broken = {rank: code for rank, code in codes.items() if code is not None and code not in (Exit.FINISHED, Exit.STOPPED)}
        running = [rank for rank, code in codes.items() if code is None]
        if broken:
            return self._end(self._first_failure(worker_group, broken))
        if not running:
            self.code = Exit.STOPPED if Exit.STOPPED in codes.values() else Exit.FINISHED
            return RunResult(state=WorkerState.SUCCEEDED, return_values=codes)
        if self._others_ended():
            return self._end(Ending(Exit.FAILED, "the connection to the other nodes' launchers is lost"))
        if self._stop.at_once:
            left = "stopped at once: what followed the last checkpoint is lost"
            return self._end(Ending(Exit.FAILED, left), death=signal.SIGKILL)
        if self._stop.signal is not None and self._deadline is None:
            self._forward(worker_group, running)
        if self._deadline is not None and time.monotonic() > self._deadline:
            late = f"{_ranks(running)}: not done {self._shutdown_seconds:g} s after the signal, and killed"
            advice = "what followed the last checkpoint is lost; job.shutdown_seconds sets the time"
            return self._end(Ending(Exit.FAILED, f"{late}; {advice}"), death=signal.SIGKILL)
        return RunResult(state=WorkerState.HEALTHY)

    def _forward(self, worker_group: WorkerGroup, running: list[int]) -> None:
        """Ask each rank to stop, once. Not its process group: the data loader's workers are needed until it has stopped."""
        assert self._stop.signal is not None
        patience = f"at most {self._shutdown_seconds:g} s; Ctrl-C more than {SAME_REQUEST_SECONDS:g} s from now leaves at once"
        message = f"titan: {self._stop.signal.name}: the ranks finish their step, save and stop ({patience})"
        print(message, file=sys.stderr, flush=True)
        self._deadline = time.monotonic() + self._shutdown_seconds
        for worker in worker_group.workers:
            if worker.global_rank in running:
                self._context.subprocess_handlers[worker.local_rank].proc.send_signal(signal.SIGTERM)

    def _others_ended(self) -> bool:
        try:
            return self._nodes > 1 and self._shared.check([ENDING_KEY])
        except RuntimeError:  # the store went down with its launcher
            return True

    def _first_ending(self, ending: Ending) -> tuple[str, Ending]:
        """Tell the other nodes, or learn that one of them was first: (that node or "" for this one, the first ending)."""
        if self._nodes == 1:
            return "", ending
        here = [self._worker_group.group_rank, socket.gethostname()]
        try:
            first = json.loads(self._shared.compare_set(ENDING_KEY, "", json.dumps([here, asdict(ending)])))
        except RuntimeError:
            return "", ending
        return ("" if first[0] == here else first[0][1]), Ending(**first[1])

    def _end(self, ending: Ending, death: signal.Signals = signal.SIGTERM) -> RunResult:
        """End this node's ranks, with the first reason there was on any node."""
        self.elsewhere, self.ending = self._first_ending(ending)
        self.code = self.ending.code
        self._shutdown(death)
        if self._nodes > 1:
            # One node holds the store: all wait a moment for each other, so that it does not go before the rest have read.
            self._exit_barrier_timeout = 2 * GRACE_SECONDS
            self._exit_barrier()
        return RunResult(state=WorkerState.FAILED)

    def _shutdown(self, death_sig: signal.Signals = signal.SIGTERM, timeout: float = GRACE_SECONDS) -> None:
        """SIGTERM to what still runs, SIGKILL after a short time: nothing worth waiting for is left. torch would wait 30 s."""
        if self._pcontext is not None:
            self._pcontext.close(death_sig, GRACE_SECONDS)

    @property
    def _nodes(self) -> int:
        return self._worker_group.group_world_size or 1

    @property
    def _shared(self) -> Store:
        """The store that the agents of all nodes see."""
        assert self._worker_group.store is not None
        return self._worker_group.store

    @property
    def _context(self) -> SubprocessContext:
        assert isinstance(self._pcontext, SubprocessContext)
        return self._pcontext

    def _exit_codes(self, worker_group: WorkerGroup) -> dict[int, int | None]:
        handlers = self._context.subprocess_handlers
        return {worker.global_rank: handlers[worker.local_rank].proc.poll() for worker in worker_group.workers}

    def _first_failure(self, worker_group: WorkerGroup, broken: dict[int, int]) -> Ending:
        """The cause among the failures: the others fail because a peer is gone.

        A rank that a signal killed wrote no error file and is the cause (but for SIGABRT, by which a watchdog ends a rank
        that waits for a dead one). Else it is the rank that wrote its error file first.
        """
        if self._stop.signal is not None and all(-code in self._stop.numbers for code in broken.values()):
            return Ending(Exit.STOPPED, f"{_ranks(list(broken))}: stopped while starting, before there was anything to save")
        files = {w.global_rank: Path(self._context.error_files[w.local_rank]) for w in worker_group.workers}
        written = {rank: file.stat().st_mtime_ns for rank, file in files.items() if file.exists()}
        killed = [rank for rank, code in broken.items() if code < 0 and -code != signal.SIGABRT and rank not in written]
        rank = killed[0] if killed else min(written, key=written.__getitem__) if written else next(iter(broken))
        pid = next(worker.id for worker in worker_group.workers if worker.global_rank == rank)
        who = f"rank {rank} (node {socket.gethostname()}, pid {pid})"
        code = broken.get(rank, Exit.FAILED)
        if rank in written:
            message, traceback = _read_error_file(files[rank])
            return Ending(code if code == Exit.WRONG_CONFIG else Exit.FAILED, f"{who} failed: {message}", rank, traceback)
        if code < 0:
            return Ending(Exit.FAILED, f"{who} was killed by signal {_signal_name(-code)}", rank)
        return Ending(code if code == Exit.WRONG_CONFIG else Exit.FAILED, f"{who} ended with exit code {code}", rank)


def _read_error_file(file: Path) -> tuple[str, str]:
    """(message, traceback) from the JSON that torch's error handler writes; a file cut off by a kill says so."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        message = json.loads(file.read_text(encoding="utf-8"))["message"]
        return message["message"], message["extraInfo"]["py_callstack"]
    return "it was killed while it wrote the reason", ""


def _signal_name(number: int) -> str:
    hints = {signal.SIGKILL: " (out of memory?)", signal.SIGSEGV: " (a crash in native code)", signal.SIGBUS: " (a full disk?)"}
    try:
        known = signal.Signals(number)
    except ValueError:
        return str(number)
    return known.name + hints.get(known, "")


def _ranks(ranks: list[int]) -> str:
    return ("ranks " if len(ranks) > 1 else "rank ") + ", ".join(map(str, ranks))
