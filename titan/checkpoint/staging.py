"""A copy of a rank's tensors, from which a checkpoint is written while training goes on.

Only the copy keeps training waiting: memory is some hundred times faster than a shared disk. Its buffers are made at the first
save and used again for each later one, so that they are there if there is room at all. For a GPU's tensors they are pinned:
then the copy goes at the bus's full speed, all tensors in one go, and the host waits once, at the end.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from titan.layout import Block


class Staging:
    """The buffers of one rank: as large as what it saves (for AdamW in float32, 12 bytes for each parameter it holds)."""

    def __init__(self) -> None:
        self.buffers: dict[str, Tensor] = {}

    def copy(self, tensors: Mapping[str, Block]) -> dict[str, Block]:
        """The same in host memory, complete when this returns; valid until the next call."""
        if not self.buffers:
            self._make(tensors)
        for name, block in tensors.items():
            self.buffers[name].copy_(block.local, non_blocking=True)
        for device in {block.local.device for block in tensors.values() if block.local.device.type == "cuda"}:
            torch.cuda.synchronize(device)
        return {name: replace(block, local=self.buffers[name]) for name, block in tensors.items()}

    def _make(self, tensors: Mapping[str, Block]) -> None:
        """One piece of memory for each format: PyTorch makes every pinned one as large as the next power of two."""
        kinds = {(block.local.dtype, block.local.device.type == "cuda") for block in tensors.values()}
        for dtype, pinned in kinds:
            same = {n: b.local for n, b in tensors.items() if (b.local.dtype, b.local.device.type == "cuda") == (dtype, pinned)}
            whole = torch.empty(sum(tensor.numel() for tensor in same.values()), dtype=dtype, pin_memory=pinned)
            parts = whole.split([tensor.numel() for tensor in same.values()])
            self.buffers |= {n: part.view(t.shape) for (n, t), part in zip(same.items(), parts, strict=True)}
