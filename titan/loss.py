"""The loss of a job: projection and cross-entropy together, logits a block at a time (`titan.kernels.linear_cross_entropy`).

It takes the place of a model's own loss module, with the same meaning: hidden states, the head's weight and labels in, the
summed loss out; without labels the logits. In validation there is no z-loss.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from titan.config import Kernel, Loss
from titan.kernels.linear_cross_entropy import Join, linear_cross_entropy


class LinearCrossEntropy(nn.Module):
    """Stands in for a model's loss."""

    def __init__(self, config: Loss, kernel: Kernel) -> None:
        super().__init__()
        self.config, self.fused = config, kernel == "triton"

    def forward(
        self, h: Tensor, weight: Tensor, labels: Tensor | None = None, *, begin: int = 0, join: Join | None = None
    ) -> Tensor:
        """h: [batch, seq, width]; weight: [words, width], with `join` some of the words, from `begin` on."""
        if labels is None:
            return F.linear(h, weight)
        z_loss = self.config.z_loss if self.training else 0.0
        options: dict[str, Any] = {"z_loss": z_loss, "most": self.config.chunk, "fused": self.fused}
        return linear_cross_entropy(h, weight, labels, begin=begin, join=join, **options)
