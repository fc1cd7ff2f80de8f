"""SwiGLU: the feed-forward layer's activation, a gate that lets through a part of what comes up.

    y = silu(gate) up          silu(g) = g s(g),  s(g) = 1 / (1 + exp(-g))

    d gate = dy up s (1 + gate (1 - s))          d up = dy gate s

Gate and up are kept for the backward pass; s is made again, where single operations would keep silu(gate) as well: with y,
which the next product keeps, three wide tensors instead of four. Computed in float32 and rounded once.

On a GPU these are Triton kernels (`swiglu_triton.py`), elsewhere the lines below.

Source: Shazeer, "GLU variants improve Transformer" (arXiv:2002.05202).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .lazily import lazily


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """y. gate, up: of one shape and dtype, which y has, too."""
    y: Tensor = _forward(gate, up)
    return y


@torch.library.custom_op("titan::swiglu", mutates_args=())
def _forward(gate: Tensor, up: Tensor) -> Tensor:
    g = gate.float()
    return (g * g.sigmoid() * up).to(gate.dtype).contiguous()


@torch.library.custom_op("titan::swiglu_backward", mutates_args=())
def _backward(dy: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    g, d = gate.float(), dy.float()
    s = g.sigmoid()
    d_gate, d_up = d * up * s * (1 + g * (1 - s)), d * g * s
    return d_gate.to(gate.dtype).contiguous(), d_up.to(up.dtype).contiguous()


@_forward.register_fake
def _(gate: Tensor, up: Tensor) -> Tensor:
    return torch.empty_like(gate, memory_format=torch.contiguous_format)


@_backward.register_fake
def _(dy: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    contiguous = torch.contiguous_format
    return torch.empty_like(gate, memory_format=contiguous), torch.empty_like(up, memory_format=contiguous)


def _keep(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _gradients(ctx: Any, dy: Tensor) -> Any:
    return _backward(dy, *ctx.saved_tensors)


_forward.register_kernel("cuda", lazily("swiglu_triton.forward"))
_backward.register_kernel("cuda", lazily("swiglu_triton.backward"))
_forward.register_autograd(_gradients, setup_context=_keep)
