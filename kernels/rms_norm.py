"""RMSNorm, alone or with the addition before it, in one pass over memory.

    h = x + branch                                 the residual stream; without a branch h = x
    r = (mean_i h_i^2 + eps)^(-1/2)                one number a token
    y_i = w_i h_i r

A norm does next to no arithmetic: what it costs is reading and writing its tokens. Written as single operations it reads and
writes them a dozen times; here h is read once, y (and the sum) written once. For the backward pass h and r are kept, and
nothing in between. With g = dy w and the mean over a token's width:

    dx_i = r (g_i - h_i r mean_j(g_j h_j r)) + dh_i          dw = sum over tokens of dy h r

The sum and all that follows is in float32, and is rounded once, where it is stored; h is rounded before it is normalised, as
the model's own addition rounds it.

On a GPU these are Triton kernels (`rms_norm_triton.py`), elsewhere the lines below.

Source: Zhang and Sennrich, "Root mean square layer normalization" (arXiv:1910.07467).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .lazily import lazily


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """y. x: [.., width]; weight: [width]. Returns x's shape and dtype."""
    y: Tensor = _forward(x, None, weight, eps)[1]
    return y


def add_rms_norm(x: Tensor, branch: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """h = x + branch, and its norm y. x, branch: [.., width] of one dtype; weight: [width]. Both are of x's shape and dtype."""
    h, y, _ = _forward(x, branch, weight, eps)
    return h, y


@torch.library.custom_op("titan::rms_norm", mutates_args=())
def _forward(x: Tensor, branch: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """h (without a branch: empty), y, and r: float32 [.., 1]."""
    h = x.contiguous() if branch is None else (x + branch).contiguous()
    wide = h.float()
    r = (wide.square().mean(-1, keepdim=True) + eps).rsqrt()
    return x.new_empty(0) if branch is None else h, (wide * r * weight).to(x.dtype), r


@torch.library.custom_op("titan::rms_norm_backward", mutates_args=())
def _backward(dy: Tensor, dh: Tensor | None, h: Tensor, r: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """dx, which is the branch's gradient, too; and dw, float32."""
    normal = h.float() * r
    scaled = dy.float() * normal
    g = dy.float() * weight
    dx = r * (g - normal * (g * normal).mean(-1, keepdim=True))
    return (dx if dh is None else dx + dh).to(h.dtype).contiguous(), scaled.view(-1, h.shape[-1]).sum(0)


@_forward.register_fake
def _(x: Tensor, branch: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    h = x.new_empty(0) if branch is None else torch.empty_like(x, memory_format=torch.contiguous_format)
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    return h, y, x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)


@_backward.register_fake
def _(dy: Tensor, dh: Tensor | None, h: Tensor, r: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(h, memory_format=torch.contiguous_format), weight.new_empty(weight.shape, dtype=torch.float32)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, branch, weight, _ = inputs
    h, _, r = output
    ctx.with_branch = branch is not None
    ctx.set_materialize_grads(False)  # of what nobody uses
    ctx.save_for_backward(h if ctx.with_branch else x, r, weight)


def _gradients(ctx: Any, dh: Tensor | None, dy: Tensor | None, dr: None) -> Any:
    h, r, weight = ctx.saved_tensors
    dy = torch.zeros_like(h) if dy is None else dy
    dx, dw = _backward(dy, dh if ctx.with_branch else None, h, r, weight)
    return dx, dx if ctx.with_branch else None, dw.to(weight.dtype), None


_forward.register_kernel("cuda", lazily("rms_norm_triton.forward"))
_backward.register_kernel("cuda", lazily("rms_norm_triton.backward"))
_forward.register_autograd(_gradients, setup_context=_keep)
