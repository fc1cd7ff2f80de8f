"""A persistent pool of gloo workers: importing torch takes seconds, a process group of eight takes a third of one.

`Pool.run(world, function, *arguments)` calls `function(rank, *arguments)` on `world` processes inside a fresh process group and
returns the results by rank. Every wait is bounded; after an error or a timeout the workers are killed, and made again by the
next call.
"""

from __future__ import annotations

import gc
import multiprocessing
import multiprocessing.connection
import os
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

START_SECONDS = 120


class WorkerFailed(RuntimeError):
    """A function raised on a rank, a rank died, or time ran out. The message has every failed rank's traceback."""


class Pool:
    """Worker processes on this machine's CPU. They are ended by `close`, and with this process."""

    def __init__(self, group_seconds: float = 30.0, workers: int = 0) -> None:
        """group_seconds: how long a collective waits for the other ranks before it fails. workers: as many begin to start at
        once, and import torch while the caller does; else the first call starts what it needs."""
        self.group_seconds = group_seconds
        self.context = multiprocessing.get_context("spawn")
        self.workers: list[tuple[Any, multiprocessing.connection.Connection]] = []
        self.ready = 0
        """How many of them, from the first, have said that they are."""
        # One folder for all calls: a worker may still touch a group's store after it has answered.
        self.folder = tempfile.TemporaryDirectory(prefix="titan-pool-", ignore_cleanup_errors=True)
        self.calls = 0
        self._start(workers)

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def run(self, world: int, function: Callable[..., Any], *arguments: Any, timeout: float = 120.0) -> list[Any]:
        """Results of function(rank, *arguments), by rank. The function must be importable by name."""
        self._start(world)
        self._wait(world)
        self.calls += 1
        store = str(Path(self.folder.name) / f"store-{self.calls}")
        for rank in range(world):
            self.workers[rank][1].send((rank, world, self.group_seconds, store, function, arguments))
        return self._collect(world, timeout)

    def _start(self, world: int) -> None:
        """Have so many workers, which need a while."""
        for _ in range(len(self.workers), world):
            here, there = self.context.Pipe()
            process = self.context.Process(target=_work, args=(there,), daemon=True)
            process.start()
            there.close()
            self.workers.append((process, here))

    def _wait(self, world: int) -> None:
        """Until so many are ready: one that still imports would keep the others waiting for its group."""
        while self.ready < world:
            rank, (_, pipe) = self.ready, self.workers[self.ready]
            try:
                wrong = "" if pipe.poll(START_SECONDS) and pipe.recv() else f"did not start within {START_SECONDS} s"
            except (EOFError, OSError):
                wrong = "the process died while it started"
            if wrong:
                self.close()
                raise WorkerFailed(f"rank {rank}: {wrong}")
            self.ready += 1

    def close(self) -> None:
        for process, pipe in self.workers:
            process.kill()
            process.join(10)
            pipe.close()
        self.workers, self.ready = [], 0

    def _collect(self, world: int, timeout: float) -> list[Any]:
        results: dict[int, Any] = {}
        failures: dict[int, str] = {}
        deadline = time.monotonic() + timeout
        while len(results) + len(failures) < world:
            waiting = {self.workers[r][1]: r for r in range(world) if r not in results and r not in failures}
            ends = [self.workers[r][0].sentinel for r in waiting.values()]  # a process that died has perhaps said nothing
            ready = multiprocessing.connection.wait([*waiting, *ends], max(0, deadline - time.monotonic()))
            if not ready:
                failures.update(dict.fromkeys(waiting.values(), f"no answer within {timeout} s"))
            for pipe, rank in waiting.items():
                if pipe not in ready and self.workers[rank][0].sentinel not in ready:
                    continue
                try:
                    good, value = pipe.recv() if pipe.poll() else (False, "the process died")
                except (EOFError, OSError):
                    good, value = False, "the process died"
                (results if good else failures)[rank] = value
            if failures:  # the others may hang for their peer: give them a moment to fail too, then stop
                deadline = min(deadline, time.monotonic() + 5)
        if failures:
            self.close()
            raise WorkerFailed("\n".join(f"rank {rank}: {said}" for rank, said in sorted(failures.items())))
        return [results[rank] for rank in range(world)]


def _work(pipe: multiprocessing.connection.Connection) -> None:
    """Serve calls until the pipe closes."""
    os.environ["OMP_NUM_THREADS"] = "1"
    import torch
    import torch.distributed as dist
    from torch.distributed.tensor.debug import _clear_sharding_prop_cache

    torch.set_num_threads(1)
    gc.freeze()
    pipe.send("ready")
    while True:
        try:
            rank, world, seconds, store, function, arguments = pipe.recv()
        except EOFError:
            return
        answer: tuple[bool, Any]
        try:
            limit = timedelta(seconds=seconds)
            dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world, timeout=limit)
            try:
                answer = (True, function(rank, *arguments))
            finally:
                dist.destroy_process_group()
        except BaseException:
            answer = (False, traceback.format_exc())
        pipe.send(answer)
        del function, arguments, answer
        # Caches and cycles would hold on to groups that are gone, and each has threads that wake a hundred times a second.
        _clear_sharding_prop_cache()
        gc.collect()
