"""One line a logged step: on the console, in metrics.jsonl, in TensorBoard.

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

from titan.config import Config
from titan.files import write_atomically
from titan.metrics.flops import peak_flops
from titan.ranks import Ranks, largest, say, total


class MetricsLog:
    """Measures the steps between two logged ones, and writes on rank 0."""

    def __init__(self, output: Path, ranks: Ranks, config: Config, *, step: int, tokens: int, flops: int) -> None:
        """step, tokens: how far the run is; what was written of later steps is dropped. flops: per token."""
        self.ranks = ranks
        self.steps = config.training.steps
        self.tokens = tokens
        self.flops = flops
        self.peak = peak_flops(ranks.device)
        self.file = output / "metrics.jsonl"
        self.writer: Any = None
        if ranks.first:
            forget_after(self.file, step)
            if "tensorboard" in config.metrics.trackers:
                from torch.utils.tensorboard import SummaryWriter  # 2 s of imports, on one rank

                self.writer = SummaryWriter(str(output / "tensorboard"), purge_step=step + 1)
        self.start()

    def start(self) -> None:
        """Training starts, or goes on after something that was not training."""
        self.started = time.perf_counter()
        self.since_tokens = self.since_steps = 0
        self.data_seconds = 0.0

    def add(self, tokens: int, data_seconds: float) -> None:
        """A step is done: its tokens, and how long it waited for data. Costs nothing."""
        self.tokens += tokens
        self.since_tokens += tokens
        self.since_steps += 1
        self.data_seconds += data_seconds

    def measure(self, step: int, loss: Tensor, grad_norm: Tensor, lr: float) -> dict[str, Any]:
        """Wait for the device, agree over the ranks, print the console's line; the step's record, to be written.

        loss: this rank's share of the mean. What follows is not training until `start` is called again.
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
            "mfu": speed * self.flops / (self.peak * self.ranks.world) if self.peak else None,
            "memory_gib": memory,
            "time": time.time(),
        }
        say(self.ranks, console_line(record, self.steps))
        return record

    def write(self, record: dict[str, Any]) -> None:
        """Append a step's record, with what a validation added to it."""
        if self.ranks.first:
            finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
            with self.file.open("a") as file:
                file.write(json.dumps(finite, allow_nan=False) + "\n")
            if self.writer is not None:
                for key, value in finite.items():
                    if value is not None and key not in ("step", "time"):
                        self.writer.add_scalar(key.replace("validation_", "validation/"), value, record["step"])
        if "validation_loss" in record:
            loss, bits = record["validation_loss"], record["validation_bits_per_byte"]
            say(
                self.ranks,
                f"step {record['step']:>{len(str(self.steps))}}  validation loss {loss:.4f}  {bits:.4f} bits per byte",
            )

    def close(self) -> None:
        if self.writer is not None:
            self.writer.close()


def console_line(record: dict[str, Any], steps: int) -> str:
    """A step for people, within 100 columns."""
    speed, memory = record["tokens_per_second"], record["memory_gib"]
    line = (
        f"step {record['step']:>{len(str(steps))}}/{steps}  loss {record['loss']:.4f}  grad {record['grad_norm']:.2f}  "
        f"lr {record['lr']:.1e}  {f'{speed / 1e6:.1f}M' if speed >= 1e6 else f'{speed:,.0f}'} tok/s  "
        f"{record['step_seconds']:.2f} s  {memory:.{0 if memory >= 100 else 2}f} GiB"
    )
    return line if record["mfu"] is None else f"{line}  {record['mfu']:.0%} mfu"


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
