"""One step's forward and backward, behind one signature: accumulation here, and whatever a plan adds later.

Each micro batch's summed loss is divided by the number of valid tokens of the *global* batch, counted beforehand, so that
adding gradients over micro batches and ranks gives the gradient of the mean loss, however the batch is cut.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from titan.parallel.data import GradientSync

Batch = dict[str, Tensor]


class Step:
    """Runs a rank's part of a global batch, micro batch by micro batch."""

    def __init__(self, model: nn.Module, sync: GradientSync, micro_batch_size: int, device: torch.device) -> None:
        self.model = model
        self.sync = sync
        self.micro_batch_size = micro_batch_size
        self.device = device

    def forward_backward(self, batch: Batch, valid_tokens: int) -> Tensor:
        """Gradients of this step, complete over all ranks; returns this rank's share of the mean loss, not yet summed.

        batch: tokens and labels, int64 [this rank's sequences, seq_len]. valid_tokens: labels to predict in the global batch.
        """
        total = torch.zeros((), device=self.device)
        micro_batches = self._split(batch)
        for i, micro in enumerate(micro_batches):
            self.sync.begin(last=i == len(micro_batches) - 1)
            loss = self.model(micro["tokens"], labels=micro["labels"]) / valid_tokens
            loss.backward()
            total += loss.detach()
        self.sync.finish()
        return total

    def evaluate(self, batch: Batch) -> Tensor:
        """This rank's summed loss over a batch, without gradients."""
        with self.inference() as model:
            return torch.stack([model(micro["tokens"], labels=micro["labels"]) for micro in self._split(batch)]).sum()

    @contextmanager
    def inference(self) -> Iterator[nn.Module]:
        """The model for forward passes alone: without gradients, in eval mode, and afterwards as training left it."""
        self.model.eval()
        with torch.no_grad():
            yield self.model
        self.model.train()
        self.sync.release()

    def _split(self, batch: Batch) -> list[Batch]:
        moved = {key: value.to(self.device, non_blocking=True).split(self.micro_batch_size) for key, value in batch.items()}
        return [dict(zip(moved, parts, strict=True)) for parts in zip(*moved.values(), strict=True)]
