"""What tensor-parallel ranks exchange: sequences gathered before a pair of matrices, sums shared out after it.

Each exchange is the other's gradient: where the forward pass gathers parts, the backward pass adds terms and keeps a part, and
the other way round.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from titan.layout import Cut
from titan.parallel.collectives import all_gather, reduce_scatter


class TensorParallel:
    """One rank's side of the exchanges. `sequence`: whether the stream is cut along the sequence, as it is in training; text is
    generated token by token, and then every rank has all of the stream."""

    def __init__(self, group: dist.ProcessGroup, kv_heads: int, overlap: bool) -> None:
        """kv_heads: the model's key and value heads, which ranks share where there are fewer of them.
        overlap: whether exchanges go piece by piece, beside the matrix products (`tensor_async.py`)."""
        self.group = group
        self.overlap = overlap
        self.kv_heads = kv_heads
        self.rank = dist.get_rank(group)
        self.degree = dist.get_world_size(group)
        self.sequence = True
        self.cuts: dict[str, Cut] = {}
        self.whole: set[str] = set()
        """Parameters that every rank holds whole, whose gradients are sums over the ranks."""
        self.shared: set[str] = set()
        """Parameters of key and value heads that some ranks share, whose gradients are sums over those ranks."""

    def counts(self, name: str) -> bool:
        """Whether this rank is the first of those that hold the same part of a parameter."""
        if name in self.shared:
            return self.rank % (self.degree // self.kv_heads) == 0
        return name in self.cuts or self.rank == 0

    def gather(self, x: Tensor) -> Tensor:
        """[batch, seq / T, ...] of every rank -> [batch, seq, ...]."""
        gathered: Tensor = _Gather.apply(x, self.group) if self.sequence else x
        return gathered

    def reduce(self, x: Tensor) -> Tensor:
        """Terms [batch, seq, ...] -> this rank's part of their sum, [batch, seq / T, ...]."""
        reduced: Tensor = _Reduce.apply(x, self.group) if self.sequence else _Sum.apply(x, self.group)
        return reduced

    def sum(self, x: Tensor) -> Tensor:
        summed: Tensor = _Sum.apply(x, self.group)
        return summed

    def part(self, x: Tensor) -> Tensor:
        """[.., seq] -> this rank's part of the sequence, the last dimension."""
        return x.chunk(self.degree, dim=-1)[self.rank] if self.sequence else x


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return _all_gather(x, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return _reduce_scatter(grad, ctx.group), None


class _Reduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return _reduce_scatter(x, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return _all_gather(grad, ctx.group), None


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        x = x.clone()
        dist.all_reduce(x, group=group)
        return x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return grad, None


def _all_gather(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Parts of dimension 1 from all ranks, joined."""
    return torch.cat(all_gather(x, group), dim=1)


def _reduce_scatter(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The sum over the ranks, of which each gets its part of dimension 1."""
    return reduce_scatter(list(x.chunk(group.size(), dim=1)), group)
