"""The three products of a linear layer, which may be computed in another way, and one of them later.

A layer Y = X W^T costs a product in the forward pass and two in the backward pass:

    output     Y  = X W^T        X [tokens, inputs], W [outputs, inputs]
    d_input    dX = dY W         the layer before waits for it
    d_weight   dW = dY^T X       nobody waits for it (`titan.parallel.weight_gradients`)

A module says how it computes them by an attribute `products`; without one it does so as PyTorch does. Who multiplies by a
module's weight outside of its forward (tensor parallelism does, beside its exchanges) asks for the same products.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import handle_torch_function, has_torch_function_unary


class Products:
    """As PyTorch computes them."""

    takes_master = False
    """Whether it wants the float32 master as weight, and not a copy in the format that activations have."""

    def operand(self, weight: Tensor, turned: bool) -> Any:
        """The weight as `output`, or turned, as `d_input` may take it in its place, for who needs several products by it."""
        return weight

    def output(self, x: Tensor, weight: Any, bias: Tensor | None = None) -> Tensor:
        """[.., inputs] -> [.., outputs]. weight: the tensor, or its `operand`."""
        return F.linear(x, weight, bias)

    def d_input(self, dy: Tensor, weight: Any) -> Tensor:
        """[.., outputs] -> [.., inputs]. weight: the tensor, or its `operand`, turned."""
        dx: Tensor = dy @ weight
        return dx

    def d_weight(self, dy: Tensor, x: Tensor) -> Tensor:
        """[.., outputs], [.., inputs] -> [outputs, inputs]."""
        return dy.flatten(0, -2).T @ x.flatten(0, -2)

    def d_both(self, dy: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        """`d_input` and `d_weight`, for who wants both now."""
        return self.d_input(dy, weight), self.d_weight(dy, x)


PLAIN = Products()


class Late(NamedTuple):
    """A weight's gradient that is put off."""

    weight: Tensor
    x: Tensor
    dy: Tensor
    products: Products

    def make(self) -> Tensor:
        return self.products.d_weight(self.dy, self.x).to(self.weight.dtype)


Later = list[Late]


def products_of(module: nn.Linear) -> Products:
    """How a module computes its products."""
    found: Products = getattr(module, "products", PLAIN)
    return found


def compute_by(module: nn.Linear, products: Products) -> None:
    """Have a module compute its products so, in place."""
    module.products = products  # type: ignore[assignment]

    def forward(x: Tensor) -> Tensor:
        return apply(module, x)

    module.forward = forward  # type: ignore[method-assign, assignment]


def apply(module: nn.Linear, x: Tensor) -> Tensor:
    """What a module makes of x [.., inputs]: [.., outputs], with its bias."""
    return multiply(x, module.weight, products_of(module), module.bias)


def puts_off(function: Callable[..., Any]) -> Callable[..., Any]:
    """Mark a function that takes a keyword `later`: Later | None, for `weight_gradient`."""
    function.puts_off = True  # type: ignore[attr-defined]
    return function


@puts_off
def multiply(
    x: Tensor, weight: Tensor, products: Products, bias: Tensor | None = None, later: Later | None = None
) -> Tensor:
    """x [.., inputs] -> [.., outputs], by a module's products. later: where to leave the weight's gradient undone."""
    if not torch.compiler.is_compiling() and has_torch_function_unary(x):
        made: Tensor = handle_torch_function(multiply, (x,), x, weight, products, bias)
        return made
    if products is PLAIN and later is None:
        return F.linear(x, weight, bias)
    y: Tensor = Multiply.apply(x, weight, bias, products, later)
    return y


def weight_gradient(weight: Tensor, x: Tensor, dy: Tensor, products: Products, later: Later | None) -> Tensor | None:
    """dW, or None where it is put off."""
    late = Late(weight, x, dy, products)
    if later is None:
        return late.make()
    later.append(late)
    return None


class Multiply(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, products: Products, later: Later | None
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.products, ctx.later = products, later
        if later is not None:
            ctx.weight = weight  # the parameter itself: what is saved may come back as a copy
        return products.output(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        x, weight = ctx.saved_tensors
        d_bias = dy.flatten(0, -2).sum(0) if ctx.needs_input_grad[2] else None
        if ctx.later is None and all(ctx.needs_input_grad[:2]):
            dx, d_weight = ctx.products.d_both(dy, x, weight)
            return dx, d_weight.to(weight.dtype), d_bias, None, None
        d_weight = None
        if ctx.needs_input_grad[1]:
            owner = weight if ctx.later is None else ctx.weight
            d_weight = weight_gradient(owner, x, dy, ctx.products, ctx.later)
        return ctx.products.d_input(dy, weight) if ctx.needs_input_grad[0] else None, d_weight, d_bias, None, None
