"""RoPE on GPUs (`rope.py` is the lesson). A program has one token and some of its heads."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

HEADS = 8


@triton.jit
def _turn(
    x, cos, sin, y, of_batch, of_token, of_head, angles_of_batch, seq, heads, half,
    BACK: tl.constexpr, HEADS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    batch, token = row // seq, row % seq
    head = (tl.program_id(1) * HEADS + tl.arange(0, HEADS)).to(tl.int64)[:, None]
    at = tl.arange(0, BLOCK)[None, :]
    inside = (head < heads) & (at < half)
    angle = batch * angles_of_batch + token * half + at
    c = tl.load(cos + angle, mask=at < half, other=0)
    s = tl.load(sin + angle, mask=at < half, other=0)
    if BACK:
        s = -s
    here = x + batch * of_batch + token * of_token + head * of_head + at
    a = tl.load(here, mask=inside, other=0).to(tl.float32)
    b = tl.load(here + half, mask=inside, other=0).to(tl.float32)
    there = y + (row * heads + head) * (2 * half) + at
    tl.store(there, (a * c - b * s).to(y.dtype.element_ty), mask=inside)
    tl.store(there + half, (b * c + a * s).to(y.dtype.element_ty), mask=inside)


def turn(x: Tensor, cos: Tensor, sin: Tensor, back: bool) -> Tensor:
    """As titan::rope."""
    batch, seq, heads, width = x.shape
    if x.stride(-1) != 1:
        x = x.contiguous()
    cos, sin = cos.contiguous(), sin.contiguous()
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    if y.numel():
        half = width // 2
        block = triton.next_power_of_2(half)
        _turn[(batch * seq, triton.cdiv(heads, HEADS))](
            x, cos, sin, y, *x.stride()[:3], seq * half if cos.dim() == 4 and len(cos) > 1 else 0, seq, heads, half,
            BACK=back, HEADS=HEADS, BLOCK=block, num_warps=4 if block * HEADS >= 512 else 1,
        )  # fmt: skip
    return y
