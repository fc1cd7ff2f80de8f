"""RoPE: pairs of a head's numbers turned by angles that grow with the token's position.

    y[j]       = x[j] cos_j - x[j + d/2] sin_j
    y[j + d/2] = x[j + d/2] cos_j + x[j] sin_j            j < d/2, d the head's width

Turned by equal angles the product of two vectors is as before; by unequal ones it depends on their difference alone, so that
attention sees distances. A rotation's inverse is its transpose, so the gradient is turned back by the same angles: nothing
but these is kept for the backward pass.

x is read once and y written once, where single operations would convert to float32, multiply four times, and put halves
together. It may lie in memory in any order of tokens and heads, as gradients of attention do.

On a GPU this is a Triton kernel (`rope_triton.py`), elsewhere the lines below.

Source: Su et al., "RoFormer" (arXiv:2104.09864); halves instead of neighbours as pairs, as Hugging Face lays weights out.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .lazily import lazily


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """y. x: [batch, seq, heads, d], d even; cos, sin: float32 [(batch,) seq, 1, d / 2]. Returns x's shape and dtype."""
    y: Tensor = _turn(x, cos, sin, False)
    return y


@torch.library.custom_op("titan::rope", mutates_args=())
def _turn(x: Tensor, cos: Tensor, sin: Tensor, back: bool) -> Tensor:
    """back: by the angles' negatives."""
    a, b = x.float().chunk(2, dim=-1)
    sin = -sin if back else sin
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype).contiguous()


@_turn.register_fake
def _(x: Tensor, cos: Tensor, sin: Tensor, back: bool) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, cos, sin, ctx.back = inputs
    ctx.save_for_backward(cos, sin)


def _gradient(ctx: Any, dy: Tensor) -> Any:
    return _turn(dy, *ctx.saved_tensors, not ctx.back), None, None, None


_turn.register_kernel("cuda", lazily("rope_triton.turn"))
_turn.register_autograd(_gradient, setup_context=_keep)
