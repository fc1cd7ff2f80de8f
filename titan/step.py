"""One step's forward and backward, behind one signature, whatever the plan.

Each micro batch's summed loss is divided by the number of valid tokens of the *global* batch, counted beforehand, so that
adding gradients over micro batches and ranks gives the gradient of the mean loss, however the batch is cut.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Protocol

import torch
from torch import Tensor, nn

from titan.batch import Batch, Batches, Micro
from titan.parallel.apply import Plan


class Passes(Protocol):
    """How micro batches go through the model: one after the other, or as a pipeline's schedule has it."""

    def train(self, micros: list[Micro], valid_tokens: int, step: int) -> Tensor:
        """Forward and backward of all, gradients not yet summed over ranks; this rank's summed loss over valid_tokens."""

    def evaluate(self, micros: list[Micro]) -> Tensor:
        """This rank's summed loss."""


class Accumulation:
    """One micro batch after the other, gradients adding up."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.around: Callable[[int], AbstractContextManager[object]] = lambda _: nullcontext()
        """Entered around each micro batch's passes, with its place in the step."""

    def train(self, micros: list[Micro], valid_tokens: int, step: int) -> Tensor:
        total = torch.zeros((), device=micros[0].tokens.device)
        for i, micro in enumerate(micros):
            with self.around(i):
                self.plan.sync.begin(last=i == len(micros) - 1)
                with self.plan.noise.at(step, micro.rows, micro.offsets):
                    loss = self._loss(micro) / valid_tokens
                loss.backward()
                total += loss.detach()
        return total

    def evaluate(self, micros: list[Micro]) -> Tensor:
        return torch.stack([self._loss(micro) for micro in micros]).sum()

    def _loss(self, micro: Micro) -> Tensor:
        loss: Tensor = self.plan.model(
            micro.tokens, labels=micro.labels, positions=micro.positions, document_ids=micro.documents
        )
        return loss


class Step:
    """Runs a rank's part of a global batch."""

    def __init__(self, plan: Plan, passes: Passes, batches: Batches) -> None:
        self.plan = plan
        self.passes = passes
        self.batches = batches
        self.device = batches.device

    def count(self, batch: Batch) -> int:
        """Labels to predict in this rank's part of a batch, to be added over all ranks."""
        return self.batches.count(batch)

    def forward_backward(self, batch: Batch, valid_tokens: int, number: int) -> Tensor:
        """Gradients of step `number`, complete over all ranks; returns this rank's share of the mean loss, not yet summed.

        batch: tokens and labels, int64 [this rank's sequences, seq_len]. valid_tokens: labels to predict in the global batch;
        where there are none, as in a batch of conversations' beginnings, loss and gradients are 0.
        """
        self.plan.refresh()
        loss = self.passes.train(self.batches.split(batch), max(1, valid_tokens), number)
        self.plan.finish()
        return loss * self.plan.share

    def loss(self, batch: Batch) -> Tensor:
        """This rank's share of a batch's summed loss. Inside `inference`."""
        return self.passes.evaluate(self.batches.split(batch)) * self.plan.share

    @contextmanager
    def inference(self) -> Iterator[nn.Module]:
        """The model for forward passes alone: without gradients, in eval mode, and afterwards as training left it."""
        self.plan.refresh()
        self.plan.model.eval()
        with torch.no_grad():
            yield self.plan.model
        self.plan.model.train()
        self.plan.sync.release()

    @contextmanager
    def generating(self) -> Iterator[nn.Module]:
        """The model for text: as `inference`, but it takes sequences of any length, and gives logits on every rank."""
        with self.inference() as model, self.plan.whole_sequences():
            yield model
