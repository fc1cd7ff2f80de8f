"""The two halves of a backward pass, one at a time: gradients of inputs now, gradients of weights later.

For Y = X W^T the backward pass makes dX = dY W, for which the layer before waits, and dW = dY^T X, for which nobody does.
Autograd makes both at once. Here every F.linear of a forward pass is replaced by one whose backward makes dX and
keeps (X, dY); `run` makes the dW of all of them later and adds them to the weights' gradients. Everything else is made with the
first half: norms, biases and embeddings are little work, and the head's dY would be all logits (`at_once`).

The price is memory: X and dY of every matrix live until the second half.

F.linear is intercepted by a TorchFunctionMode, so that no module has to change. A function with products of its own can
take part: it is marked `puts_off` (`titan.linear`), offers itself to the mode, and leaves its weights' gradients where the mode
says.

Source: Qi et al., "Zero bubble pipeline parallelism" (arXiv:2401.10241).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

from titan.linear import PLAIN, Later, Multiply


class WeightGradients(TorchFunctionMode):
    """Of one micro batch in one stage. Active in its forward pass, and in the first half of its backward pass, where
    recomputation runs the forward again."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: Later = []

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if getattr(function, "puts_off", False) and torch.is_grad_enabled():
            return function(*args, later=self.kept)
        if function is F.linear and torch.is_grad_enabled():
            x, weight, *bias = args
            if weight.requires_grad:
                return Multiply.apply(x, weight, bias[0] if bias else (kwargs or {}).get("bias"), PLAIN, self.kept)
        return function(*args, **(kwargs or {}))

    @torch.no_grad()  # what is kept belongs to a graph, which a gradient made of it would keep alive
    def run(self) -> None:
        """Make the weights' gradients, and let go of what they needed."""
        for late in self.kept:
            weight = late.weight
            if not weight.is_leaf:  # a parameter cast to a narrower format: on to the parameter
                torch.autograd.backward(weight, late.make())
            elif weight.grad is None:
                weight.grad = late.make()
            elif late.products is PLAIN:
                weight.grad.addmm_(late.dy.flatten(0, -2).T, late.x.flatten(0, -2))
            else:
                weight.grad += late.make()
        self.kept.clear()


def at_once(module: nn.Module) -> None:
    """Have a module's matrix products make their weights' gradients in the first half, in place."""
    forward = module.forward

    def without_modes(*args: Any, **kwargs: Any) -> Any:
        with torch._C.DisableTorchFunction():
            return forward(*args, **kwargs)

    module.forward = without_modes
