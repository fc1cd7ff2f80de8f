"""The loss over logits that no rank has all of.

The output matrix is cut by tokens. Of a token's logits z only the largest, the sum of exponentials and the label's travel:

    loss = log sum_v exp(z_v - m) + m - z_label

(`titan.kernels.linear_cross_entropy`, which each rank runs over its own words.)

Where the matrix is whole (`[parallel.sharding]`), each rank takes the loss of its own part of the sequence instead.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from titan.kernels.linear_cross_entropy import Statistics
from titan.layout import Cut
from titan.parallel.collectives import all_gather
from titan.parallel.tensor_exchange import TensorParallel


class TensorParallelLoss(nn.Module):
    """Stands in for a model's loss: hidden states come cut along the sequence, the head's weight perhaps by tokens."""

    def __init__(self, tp: TensorParallel, cut: Cut | None, whole: nn.Module) -> None:
        """whole: takes hidden states, weight and labels; and, where the weight is some of the rows, `begin` and `join`."""
        super().__init__()
        self.tp, self.cut, self.whole = tp, cut, whole

    def forward(self, h: Tensor, weight: Tensor, labels: Tensor | None = None) -> Tensor:
        if labels is None:
            logits: Tensor = self.whole(self.tp.gather(h), weight)
            return logits if self.cut is None else _join(logits, self.cut.size, self.tp)
        if self.cut is None:
            return self.tp.sum(self.whole(h, weight, self.tp.part(labels)))
        loss: Tensor = self.whole(self.tp.gather(h), weight, labels, begin=self.cut.begin, join=self._over_ranks)
        return loss

    def _over_ranks(self, found: Statistics) -> Statistics:
        """Statistics of some words -> of all, on every rank the same."""
        largest = found.largest.clone()
        dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=self.tp.group)
        sums = torch.stack((found.total * (found.largest - largest).exp(), found.target))
        dist.all_reduce(sums, group=self.tp.group)
        return Statistics(largest, *sums)


def _join(logits: Tensor, size: int, tp: TensorParallel) -> Tensor:
    """Every rank's logits of its tokens, side by side."""
    widths = [(r + 1) * size // tp.degree - r * size // tp.degree for r in range(tp.degree)]
    padded = F.pad(logits, (0, max(widths) - logits.shape[-1])).contiguous()
    parts = all_gather(padded, tp.group)
    return torch.cat([part[..., :width] for part, width in zip(parts, widths, strict=True)], dim=-1)
