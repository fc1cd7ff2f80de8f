"""Faults on request: what a machine does to a job once in a month, at a step of one's choosing.

`job.fault = "kind@step"`, or "kind@step:rank" for another rank than 0:

    raise        the rank raises an exception
    kill         the rank dies as by SIGKILL
    hang         the rank sleeps and comes to no collective any more
    nan          the gradient gets a NaN, once: a fault of the machine
    nan-batch    the gradient gets a NaN each time the step is run: a fault of the data
    spike        the loss that is judged is multiplied by a hundred
    save         the rank cannot write its part of the step's checkpoint

For tests of what the others then do, and to show it. A resumed run has the fault again if it comes to the step again.
"""

from __future__ import annotations

import os
import signal
import time

import torch
from torch import Tensor, nn

from titan.layout import local


class FaultError(RuntimeError):
    """The fault that was asked for."""


class Fault:
    """One fault, or none."""

    def __init__(self, text: str, rank: int) -> None:
        """text: as above; empty for none."""
        self.kind, self.step = "", -1
        if text:
            kind, _, place = text.partition("@")
            step, _, on = place.partition(":")
            if rank == int(on or 0):
                self.kind, self.step = kind, int(step)

    def before(self, step: int) -> None:
        """As a step begins."""
        if self._is("raise", step):
            raise FaultError(f"job.fault: raised in step {step}")
        if self._is("kill", step):
            os.kill(os.getpid(), signal.SIGKILL)
        if self._is("hang", step):
            while True:
                time.sleep(1)

    def after_backward(self, step: int, model: nn.Module, loss: Tensor) -> Tensor:
        """Spoils gradients; returns the loss, perhaps another."""
        if self._is("nan", step) or self._is("nan-batch", step):
            grads = [local(p.grad) for p in model.parameters() if p.grad is not None]
            with torch.no_grad():
                next(grad for grad in grads if grad.numel()).view(-1)[0] = float("nan")
            if self.kind == "nan":
                self.kind = ""
        return loss * 100 if self._is("spike", step) else loss

    def while_saving(self, step: int) -> None:
        if self._is("save", step):
            raise OSError(f"job.fault: step {step} cannot be written")

    def _is(self, kind: str, step: int) -> bool:
        return (self.kind, self.step) == (kind, step)
