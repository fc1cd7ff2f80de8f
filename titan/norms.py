"""Norms of gradients that lie over ranks in any mixture of ways, and clipping by the norm of all together.

A parameter may be whole on every rank, sharded by FSDP, cut by tensor parallelism, shared by some of its ranks, on one
pipeline stage alone, or several of these. The rule that makes the norm exact is the same for all: each element is counted by
one rank. A rank counts its part of a gradient if it is the first along every axis of the mesh on which others hold
the same part. Then the squares are added over all ranks, in one small message.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from titan.layout import local
from titan.parallel.mesh import Mesh
from titan.sharding import matching


class GradientNorms:
    """Norms of one rank's model, over all ranks. Nothing here waits for the device, unless the gradients are
    with the host; every rank takes part."""

    def __init__(self, model: nn.Module, whole: nn.Module, block: str, mesh: Mesh, counts: Callable[[str], bool]):
        """whole: the model before it was cut. block: glob of its repeated blocks. counts: whether, of the ranks that have the
        same part of a parameter by tensor parallelism, this one counts it."""
        self.model = model
        self.mesh = mesh
        self.counts = counts
        blocks = set(matching(block, dict(whole.named_modules())))
        depth = block.count(".") + 1
        self.groups: dict[str, str] = {}
        for name, _ in whole.named_parameters():
            path = name.split(".")
            inside = ".".join(path[:depth])
            self.groups[name] = inside if inside in blocks else path[0]

    def clip(self, max_norm: float, share: Tensor) -> tuple[Tensor, Tensor]:
        """Scale all gradients so that their joint 2-norm is at most `max_norm` (0: leave them).

        Returns the norm before, and the sum over the ranks of their shares of the loss, both float32: one message for both.
        """
        squares = torch.stack([square for _, square in self._squares()]).sum()
        total, loss = self._over_ranks(torch.stack((squares, share.float().to(squares.device)))).unbind()
        norm = total.sqrt()
        if max_norm > 0:
            scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)
            torch._foreach_mul_([local(p.grad) for p in self.model.parameters() if p.grad is not None], scale)
        return norm.to(share.device), loss.to(share.device)  # offloaded gradients lie elsewhere

    def of_layers(self) -> dict[str, Tensor]:
        """The gradient's 2-norm of each repeated block, and of what else the model has: {"embedding": ..., "layers.0": ...}."""
        names = list(dict.fromkeys(self.groups.values()))
        found = self._squares()
        sums = found[0][1].new_zeros(len(names))
        for name, square in found:
            sums[names.index(self.groups[name])] += square
        return dict(zip(names, self._over_ranks(sums).sqrt(), strict=True))

    def _squares(self) -> list[tuple[str, Tensor]]:
        """Each parameter's name, and the sum of squares of what this rank counts of its gradient, a float32 scalar."""
        named = [(name, p.grad) for name, p in self.model.named_parameters() if p.grad is not None]
        norms = torch._foreach_norm([local(grad) for _, grad in named], dtype=torch.float32)
        return [(name, norm.square() * self._mine(name, grad)) for (name, grad), norm in zip(named, norms, strict=True)]

    def _mine(self, name: str, grad: Tensor) -> bool:
        cut: set[str] = set()
        if isinstance(grad, DTensor):
            names = grad.device_mesh.mesh_dim_names or ()
            sharded = {axis for axis, placement in zip(names, grad.placements, strict=True) if placement.is_shard()}
            cut = {"dp_shard", "cp"} if "dp_shard_cp" in sharded else sharded
        copies = {"dp_replicate", "dp_shard", "cp"} - cut
        return self.counts(name) and not any(self.mesh.coordinate(axis) for axis in copies)

    def _over_ranks(self, squares: Tensor) -> Tensor:
        if self.mesh.axes is not None:
            dist.all_reduce(squares)
        return squares
