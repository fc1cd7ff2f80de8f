"""One line a logged step: on the console, in metrics.jsonl, in TensorBoard.

Losses and norms stay on the device until a step is logged, and only then does the host wait for them.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from titan.files import write_atomically
from titan.ranks import Ranks, largest, total


class MetricsLog:
    """Measures the steps between two logged ones, and writes on rank 0."""

    def __init__(
        self,
        output: Path,
        ranks: Ranks,
        *,
        steps: int,
        start_step: int,
        tokens: int,
        flops: int,
        peak: float | None,
        tensorboard: bool,
    ) -> None:
        """tokens: trained on before start_step. flops: per token. peak: FLOP/s of one device, or None where unknown."""
        self.ranks = ranks
        self.steps = steps
        self.tokens = tokens
        self.flops = flops
        self.peak = peak
        self.file = output / "metrics.jsonl"
        self.writer: Any = None
        if ranks.first:
            forget_after(self.file, start_step)
            if tensorboard:
                from torch.utils.tensorboard import SummaryWriter  # 2 s of imports, on one rank

                self.writer = SummaryWriter(str(output / "tensorboard"), purge_step=start_step + 1)
        self._reset()

    def add(self, tokens: int, data_seconds: float) -> None:
        """A step is done: its tokens, and how long it waited for data. Costs nothing."""
        self.tokens += tokens
        self.since_tokens += tokens
        self.since_steps += 1
        self.data_seconds += data_seconds

    def skip(self, seconds: float) -> None:
        """Time since the last logged step that was not training."""
        self.started += seconds

    def log(self, step: int, loss: Tensor, grad_norm: Tensor, lr: float) -> None:
        """Wait for the device, agree over the ranks, write. `loss` is this rank's share of the mean."""
        (loss_sum,) = total(self.ranks, loss.item())
        norm = grad_norm.item()
        elapsed = time.perf_counter() - self.started
        memory, waited = largest(self.ranks, memory_gib(self.ranks.device), self.data_seconds)
        speed = self.since_tokens / elapsed
        record = {
            "step": step,
            "loss": loss_sum,
            "grad_norm": norm,
            "lr": lr,
            "tokens": self.tokens,
            "tokens_per_second": speed,
            "step_seconds": elapsed / self.since_steps,
            "data_seconds": waited / self.since_steps,
            "mfu": speed * self.flops / (self.peak * self.ranks.world) if self.peak else None,
            "memory_gib": memory,
            "time": time.time(),
        }
        self._reset()
        if self.ranks.first:
            self._write(record)
            print(console_line(record, self.steps), flush=True)

    def log_validation(self, step: int, loss: float, bits_per_byte: float) -> None:
        if self.ranks.first:
            self._write({"step": step, "validation_loss": loss, "validation_bits_per_byte": bits_per_byte, "time": time.time()})
            print(
                f"step {step:>{len(str(self.steps))}}  validation loss {loss:.4f}  {bits_per_byte:.4f} bits per byte",
                flush=True,
            )

    def close(self) -> None:
        if self.writer is not None:
            self.writer.close()

    def _write(self, record: dict[str, Any]) -> None:
        with self.file.open("a") as file:
            file.write(json.dumps(record) + "\n")
        if self.writer is not None:
            for key, value in record.items():
                if value is not None and key not in ("step", "time"):
                    self.writer.add_scalar(key.replace("validation_", "validation/"), value, record["step"])

    def _reset(self) -> None:
        self.started = time.perf_counter()
        self.since_tokens = self.since_steps = 0
        self.data_seconds = 0.0


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
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 2**30
