"""How long a pipeline's passes take, measured on real ranks.

Two clocks. The machine's: when a pass began and ended, once what it waits for from other ranks was there. And the processor
time that the rank's thread spent in it: where there are fewer cores than ranks, which take turns on them, the first says more
about the machine than about the schedule, while the second gives the passes' lengths as if each rank had a core of its own.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

from titan.config import Config
from titan.parallel.pipeline import Pipeline
from titan.parallel.timeline import Action
from titan.rehearsal import Rehearsal


class Measured(NamedTuple):
    """A rank's passes."""

    clocks: list[dict[Action, tuple[float, float]]]
    """Start and end in each step, in seconds of a clock that a machine's processes share."""
    processor: dict[Action, float]
    """Seconds of the processor that a pass takes: the median over the steps."""


class Watch:
    """Notes a step's passes."""

    def __init__(self) -> None:
        self.clock: dict[Action, tuple[float, float]] = {}
        self.processor: dict[Action, float] = {}

    @contextmanager
    def around(self, action: Action) -> Iterator[None]:
        began, used = time.perf_counter(), time.thread_time()
        yield
        self.processor[action] = time.thread_time() - used
        self.clock[action] = (began, time.perf_counter())


def measure(rank: int, config: Config, steps: int, seconds: float) -> Measured:
    """On a rank: its passes in each of so many steps, after two that warm up. config: from `with_data`, with a pipeline."""
    job = Rehearsal(rank, config, seconds)
    pipeline = job.parts.step.passes
    assert isinstance(pipeline, Pipeline)
    for _ in range(2):
        job.step()
    watches = []
    for _ in range(steps):
        watches.append(Watch())
        pipeline.around = watches[-1].around
        job.step()
    job.close()
    usual = {action: statistics.median(watch.processor[action] for watch in watches) for action in watches[0].processor}
    return Measured([watch.clock for watch in watches], usual)
