"""One record a logged step: on the console, in metrics.jsonl, at the trackers.

Losses and norms stay on the device until a step is logged, and only then does the host wait for them.
"""

from __future__ import annotations

import json
import math
import resource
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from titan import toml
from titan.config import Config
from titan.files import write_atomically
from titan.metrics.console import Console
from titan.metrics.flops import Flops
from titan.metrics.peaks import Peak
from titan.metrics.trackers import Tracker, open_trackers
from titan.ranks import Ranks, largest, total

# What a record's figures are called at the trackers, which sort by name and make a group of what stands before the "/".
NAMES = {
    "loss": "loss/train",
    "validation_loss": "loss/validation",
    "validation_bits_per_byte": "loss/validation_bits_per_byte",
    "grad_norm": "optimizer/grad_norm",
    "lr": "optimizer/lr",
    "tokens": "progress/tokens",
    "tokens_per_second": "speed/tokens_per_second",
    "step_seconds": "speed/step_seconds",
    "data_seconds": "speed/data_seconds",
    "save_stall_seconds": "speed/save_stall_seconds",
    "mfu": "speed/mfu",
    "memory_gib": "speed/memory_gib",
}


class MetricsLog:
    """Measures the steps between two logged ones, and writes on rank 0."""

    def __init__(self, output: Path, ranks: Ranks, config: Config, *, step: int, tokens: int, flops: Flops, peak: Peak) -> None:
        """step, tokens: how far the run is; what was written of later steps is dropped. flops: of a token."""
        self.ranks = ranks
        self.tokens = tokens
        self.flops = flops
        self.peak = peak
        self.file = output / "metrics.jsonl"
        self.console = Console(config.training.steps) if ranks.first else None
        self.trackers: list[Tracker] = []
        self.step = step
        if ranks.first:
            forget_after(self.file, step)
            text = toml.dump(config, describe=False)
            self.trackers = open_trackers(config.metrics.trackers, config.metrics.project, output, text, step)
        self.start()

    def start(self) -> None:
        """Training starts, or goes on after something that was not training."""
        self.started = time.perf_counter()
        self.since_tokens = self.since_steps = 0
        self.data_seconds = 0.0

    def add(self, tokens: int, data_seconds: float) -> None:
        """A step is done: its tokens, and how long it waited for data. Costs nothing."""
        self.step += 1
        self.tokens += tokens
        self.since_tokens += tokens
        self.since_steps += 1
        self.data_seconds += data_seconds
        if self.console is not None:
            self.console.progress(self.step)

    def go_back(self, step: int, tokens: int) -> None:
        """The run is to do steps again."""
        self.step, self.tokens = step, tokens
        self.pause()
        self.start()

    def measure(self, step: int, loss: Tensor, grad_norm: Tensor, lr: float, stalled: float = 0.0) -> dict[str, Any]:
        """Wait for the device, agree over the ranks, print the console's line; the step's record, to be written.

        loss: this rank's share of the mean. stalled: seconds that saves have kept training waiting since. What follows is not
        training until `start` is called again.
        """
        (loss_sum,) = total(self.ranks, loss.item())
        elapsed = time.perf_counter() - self.started
        memory, waited = largest(self.ranks, memory_gib(self.ranks.device), self.data_seconds)
        speed = self.since_tokens / elapsed
        record = {
            "step": step,
            "loss": loss_sum,
            "grad_norm": grad_norm.item(),
            "lr": lr,
            "tokens": self.tokens,
            "tokens_per_second": speed,
            "step_seconds": elapsed / self.since_steps,
            "data_seconds": waited / self.since_steps,
            "save_stall_seconds": stalled,
            "mfu": speed * self.flops.total / self.peak.flops,
            "memory_gib": memory,
            "time": time.time(),
        }
        self.pause()
        if self.console is not None:
            self.console.step(record)
        return record

    def pause(self) -> None:
        """Training rests, and others may print: the bar goes away until the next step."""
        if self.console is not None:
            self.console.clear()

    def write(self, record: dict[str, Any]) -> None:
        """Append a step's record, with what a validation added to it."""
        if self.console is None:
            return
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
        with self.file.open("a") as file:
            file.write(json.dumps(finite, allow_nan=False) + "\n")
        own = {key: key for key in finite if key.startswith(("data_tokens/", "data_epochs/"))}
        self._tell(record["step"], {name: finite[key] for key, name in (NAMES | own).items() if key in finite})
        if "validation_loss" in record:
            self.console.validation(record)

    def gradient_norms(self, step: int, norms: dict[str, Tensor]) -> None:
        """Norms by layer, for the trackers. Waits for the device, on rank 0 alone."""
        if norms and self.trackers:
            values = torch.stack(list(norms.values())).tolist()
            told = dict(zip((f"per_layer_grad_norm/{name}" for name in norms), values, strict=True))
            self._tell(step, {k: v if math.isfinite(v) else None for k, v in told.items()})

    def samples(self, step: int, samples: list[tuple[str, str]]) -> None:
        """What the model made of each prompt: prompt, and the text that goes on where it ends."""
        if self.console is None:
            return
        self.pause()
        self.console.samples(step, [prompt + text for prompt, text in samples])
        for place, (prompt, text) in enumerate(samples, 1):
            for tracker in self.trackers:
                tracker.text(f"sample/{place}", prompt + text, step)

    def close(self) -> None:
        self.pause()
        for tracker in self.trackers:
            tracker.close()

    def _tell(self, step: int, values: dict[str, float | None]) -> None:
        finite = {name: value for name, value in values.items() if value is not None}
        for tracker in self.trackers:
            tracker.scalars(step, finite)


def forget_after(file: Path, step: int) -> None:
    """Drop the lines of steps that a resumed run does again, and a last line that a crash cut short."""
    if not file.exists():
        return
    kept = []
    for line in file.read_text().splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except (json.JSONDecodeError, KeyError, TypeError):
            continue
    write_atomically(file, "".join(kept))


def memory_gib(device: torch.device) -> float:
    """Peak memory of this rank in GiB: what the GPU has reserved, or the process's resident set."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device) / 2**30
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**30 if sys.platform == "darwin" else peak / 2**20
