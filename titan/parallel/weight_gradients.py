"""The two halves of a backward pass, one at a time: gradients of inputs now, gradients of weights later.

For Y = X W^T the backward pass makes dX = dY W, for which the layer before waits, and dW = dY^T X, for which nobody does.
Autograd makes both at once. Here every F.linear of a forward pass is replaced by one whose backward makes dX and
keeps (X, dY); `run` makes the dW of all of them later and adds them to the weights' gradients. Everything else (norms, biases,
embeddings, and the head inside the loss) is made with the first half, as it is little work, or comes first anyway.

The price is memory: X and dY of every matrix live until the second half.

F.linear is intercepted by a TorchFunctionMode, so that no module has to change. A weight that is not a parameter itself (cast
by mixed precision without FSDP) keeps its ordinary backward.

Source: Qi et al., "Zero bubble pipeline parallelism" (arXiv:2401.10241).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode


class WeightGradients(TorchFunctionMode):
    """Of one micro batch in one stage. Active in its forward pass, and in the first half of its backward pass, where
    recomputation runs the forward again."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: list[tuple[Tensor, Tensor, Tensor]] = []
        """weight, its input X, its output's gradient dY"""

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if function is F.linear and torch.is_grad_enabled():
            x, weight, *bias = args
            if weight.is_leaf and weight.requires_grad:
                return _Linear.apply(x, weight, bias[0] if bias else (kwargs or {}).get("bias"), self.kept)
        return function(*args, **(kwargs or {}))

    def run(self) -> None:
        """Make the weights' gradients, and let go of what they needed."""
        for weight, x, dy in self.kept:
            gradient = dy.flatten(0, -2).T @ x.flatten(0, -2)
            weight.grad = gradient if weight.grad is None else weight.grad.add_(gradient)
        self.kept.clear()


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, kept: list[tuple[Tensor, Tensor, Tensor]]) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.weight, ctx.kept = weight, kept  # the parameter itself: what is saved may come back as a copy
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        x, weight = ctx.saved_tensors
        ctx.kept.append((ctx.weight, x, dy))
        bias = dy.flatten(0, -2).sum(0) if ctx.needs_input_grad[2] else None
        return dy @ weight if ctx.needs_input_grad[0] else None, None, bias, None
