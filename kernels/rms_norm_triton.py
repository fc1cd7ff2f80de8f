"""RMSNorm on GPUs (`rms_norm.py` is the lesson). Forward, a program has one token. Backward, a program has every n-th token
and adds up dw in registers; the programs' sums are added at the end, in an order that does not depend on timing."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

WIDEST = 16384
"""What fits into registers: 16 numbers a thread, of each tensor."""
PROGRAMS = 256
"""Of the backward pass: about two for each multiprocessor of a large GPU."""


@triton.jit
def _forward(x, branch, weight, h, y, r, width, eps, ADD: tl.constexpr, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < width
    value = tl.load(x + token * width + at, mask=inside, other=0).to(tl.float32)
    if ADD:
        value += tl.load(branch + token * width + at, mask=inside, other=0).to(tl.float32)
        rounded = value.to(h.dtype.element_ty)
        tl.store(h + token * width + at, rounded, mask=inside)
        value = rounded.to(tl.float32)
    inverse = 1 / tl.sqrt(tl.sum(value * value) / width + eps)
    w = tl.load(weight + at, mask=inside, other=0).to(tl.float32)
    tl.store(y + token * width + at, (value * inverse * w).to(y.dtype.element_ty), mask=inside)
    tl.store(r + token, inverse)


@triton.jit
def _backward(dy, dh, h, r, weight, dx, dw, tokens, width, ADD: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    inside = at < width
    w = tl.load(weight + at, mask=inside, other=0).to(tl.float32)
    sums = tl.zeros((BLOCK,), dtype=tl.float32)
    for token in range(tl.program_id(0), tokens, tl.num_programs(0)):
        begin = tl.cast(token, tl.int64) * width
        inverse = tl.load(r + token)
        normal = tl.load(h + begin + at, mask=inside, other=0).to(tl.float32) * inverse
        gradient = tl.load(dy + begin + at, mask=inside, other=0).to(tl.float32)
        sums += gradient * normal
        g = gradient * w
        out = inverse * (g - normal * (tl.sum(g * normal) / width))
        if ADD:
            out += tl.load(dh + begin + at, mask=inside, other=0).to(tl.float32)
        tl.store(dx + begin + at, out.to(dx.dtype.element_ty), mask=inside)
    tl.store(dw + tl.program_id(0) * width + at, sums, mask=inside)


def forward(x: Tensor, branch: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """As titan::rms_norm."""
    x, weight = x.contiguous(), weight.contiguous()
    branch = branch.contiguous() if branch is not None else None
    h = x.new_empty(0) if branch is None else torch.empty_like(x)
    y, r = torch.empty_like(x), x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)
    if x.numel():
        sizes = _sizes(x.shape[-1])
        _forward[(r.numel(),)](x, branch, weight, h, y, r, x.shape[-1], eps, ADD=branch is not None, **sizes)
    return h, y, r


def backward(dy: Tensor, dh: Tensor | None, h: Tensor, r: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """As titan::rms_norm_backward."""
    dy, h, weight = dy.contiguous(), h.contiguous(), weight.contiguous()
    dh = dh.contiguous() if dh is not None else None
    tokens, width = r.numel(), h.shape[-1]
    dx, dw = torch.empty_like(h), h.new_empty((min(PROGRAMS, tokens), width), dtype=torch.float32)
    if h.numel():
        _backward[(len(dw),)](dy, dh, h, r, weight, dx, dw, tokens, width, ADD=dh is not None, **_sizes(width))
    return dx, dw.sum(0)


def _sizes(width: int) -> dict[str, int]:
    """A token is in registers, so that it is read once."""
    if width > WIDEST:
        said = f"a token has {width:,} numbers, and {WIDEST:,} fit into a GPU's registers"
        raise ValueError(f'{said}; kernels.rms_norm = "torch" takes it')
    block = triton.next_power_of_2(width)
    return {"BLOCK": block, "num_warps": min(32, max(1, block // 512))}
