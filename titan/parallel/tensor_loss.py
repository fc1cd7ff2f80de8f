"""The loss over logits that no rank has all of.

The output matrix is cut by tokens. Of a token's logits z only the largest, the sum of exponentials and the label's travel:

    loss = log sum_v exp(z_v - m) + m - z_label        d loss / d z_v = exp(z_v - m) / sum - [v = label]

Where the matrix is whole (`[parallel.sharding]`), each rank takes the loss of its own part of the sequence instead.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from titan.layout import Cut
from titan.parallel.collectives import all_gather
from titan.parallel.tensor_exchange import TensorParallel


class TensorParallelLoss(nn.Module):
    """Stands in for a model's loss: hidden states come cut along the sequence, the head's weight perhaps by tokens."""

    def __init__(self, tp: TensorParallel, cut: Cut | None, whole: nn.Module) -> None:
        super().__init__()
        self.tp, self.cut, self.whole = tp, cut, whole

    def forward(self, h: Tensor, weight: Tensor, labels: Tensor | None = None) -> Tensor:
        if self.cut is None:
            if labels is None:
                logits: Tensor = self.whole(self.tp.gather(h), weight)
                return logits
            return self.tp.sum(self.whole(h, weight, self.tp.part(labels)))
        logits = F.linear(self.tp.gather(h), weight)
        if labels is None:
            return _join(logits, self.cut.size, self.tp)
        loss: Tensor = _CrossEntropy.apply(logits.float(), labels, self.cut.begin, self.tp.group)
        return loss


class _CrossEntropy(torch.autograd.Function):
    """Summed cross-entropy of logits that are cut by tokens; the same scalar on every rank. One copy of them is kept."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, begin: int, group: dist.ProcessGroup) -> Tensor:
        largest = logits.amax(-1)
        dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
        below = logits - largest[..., None]
        here = (labels >= begin) & (labels < begin + logits.shape[-1])
        at = (labels - begin).where(here, 0)[..., None]
        sums = torch.stack((below.gather(-1, at)[..., 0].where(here, 0), below.exp_().sum(-1)))  # below is now exp(below)
        dist.all_reduce(sums, group=group)
        target, total = sums
        counted = labels != -100
        ctx.save_for_backward(below.div_(total[..., None]), at, here, counted)
        return (total.log() - target).where(counted, 0).sum()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        shares, at, here, counted = ctx.saved_tensors
        d_logits = shares.scatter_add(-1, at, -here[..., None].to(shares.dtype))
        return d_logits.mul_((counted * grad)[..., None]), None, None, None


def _join(logits: Tensor, size: int, tp: TensorParallel) -> Tensor:
    """Every rank's logits of its tokens, side by side."""
    widths = [(r + 1) * size // tp.degree - r * size // tp.degree for r in range(tp.degree)]
    padded = F.pad(logits, (0, max(widths) - logits.shape[-1])).contiguous()
    parts = all_gather(padded, tp.group)
    return torch.cat([part[..., :width] for part, width in zip(parts, widths, strict=True)], dim=-1)


