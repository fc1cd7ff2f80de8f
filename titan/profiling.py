"""A look inside chosen steps: PyTorch's profiler writes every operation with its beginning and end, and every GPU kernel.

What comes out lies in <job.output>/profile: step-00000010-rank-0.json.gz, which `titan profile` sums up and chrome://tracing or
ui.perfetto.dev show; and with `profiling.memory` on a GPU step-00000010-rank-0.pickle, every block of its memory and who asked
for it, for pytorch.org/memory_viz. Other steps cost nothing; the profiled ones are slower by what writing costs.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from titan.config import Profiling
from titan.metrics.profile import STEP
from titan.ranks import Ranks

SNAPSHOT_ENTRIES = 1_000_000


class Profiler:
    """Called around every step of a rank; does something for those that the config names."""

    def __init__(self, config: Profiling, output: Path, ranks: Ranks) -> None:
        self.config, self.output, self.ranks = config, output, ranks
        self.on = config.start > 0 and ranks.rank in config.ranks
        self.running: profile | None = None
        self.step: record_function | None = None

    def before(self, number: int) -> None:
        """A step begins."""
        if not self.on:
            return
        if number == self.config.start:
            gpu = self.ranks.device.type == "cuda"
            self.running = profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if gpu else [])])
            if self.config.memory:
                torch.cuda.memory._record_memory_history(max_entries=SNAPSHOT_ENTRIES)
            self.running.start()
        if self.running is not None:
            self.step = record_function(STEP)
            self.step.__enter__()

    def after(self, number: int) -> None:
        """A step's last operation has been asked for."""
        if self.running is None:
            return
        if self.ranks.device.type == "cuda":
            torch.cuda.synchronize()  # so that a step's kernels lie inside its range
        assert self.step is not None
        self.step.__exit__(None, None, None)
        if number >= self.config.start + self.config.steps - 1:
            self.close()

    def close(self) -> None:
        """No further step comes: what was asked for and is not complete is written as far as it goes."""
        if self.running is not None:
            self.running.stop()
            self._write(self.running)
            self.running = None

    def _write(self, done: profile) -> None:
        folder = self.output / "profile"
        folder.mkdir(parents=True, exist_ok=True)
        name = f"step-{self.config.start:08d}-rank-{self.ranks.rank}"
        half = folder / f".half-{name}.json.gz"
        done.export_chrome_trace(str(half))
        os.replace(half, folder / f"{name}.json.gz")
        if self.config.memory:
            half = folder / f".half-{name}.pickle"
            torch.cuda.memory._dump_snapshot(str(half))
            torch.cuda.memory._record_memory_history(enabled=None)
            os.replace(half, folder / f"{name}.pickle")
