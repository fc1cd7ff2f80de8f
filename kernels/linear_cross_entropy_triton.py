"""What the loss does between its products, on GPUs (`linear_cross_entropy.py` is the lesson): the products themselves are the
vendor's, which nothing written here would beat. Single operations read and write a block of logits a dozen times, in float32;
these read it once, in its own format, and write once what becomes of it."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

WORDS = 2048


@triton.jit
def _add_block(
    z, labels, largest, total, target, new_largest, new_total, new_target, begin, words, BLOCK: tl.constexpr
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    row = z + token * words
    m, s = tl.load(largest + token), tl.load(total + token)
    for first in range(0, words, BLOCK):
        at = first + tl.arange(0, BLOCK)
        value = tl.load(row + at, mask=at < words, other=-float("inf")).to(tl.float32)
        higher = tl.maximum(m, tl.max(value))
        taken = tl.where(higher == -float("inf"), 0.0, higher)  # before there is any number
        s = s * tl.exp(m - taken) + tl.sum(tl.exp(value - taken))
        m = higher
    tl.store(new_largest + token, m)
    tl.store(new_total + token, s)
    word = tl.load(labels + token) - begin
    here = (word >= 0) & (word < words)
    found = tl.load(row + word, mask=here, other=0).to(tl.float32)
    tl.store(new_target + token, tl.load(target + token) + found)


@triton.jit
def _gradient(z, labels, lse, g, of_exp, dz, begin, words, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < words
    value = tl.load(z + token * words + at, mask=inside, other=0).to(tl.float32)
    value = tl.exp(value - tl.load(lse + token)) * tl.load(of_exp + token)
    value -= tl.where(at == tl.load(labels + token) - begin, tl.load(g + token), 0)
    tl.store(dz + token * words + at, value.to(dz.dtype.element_ty), mask=inside)


def add_block(
    largest: Tensor, total: Tensor, target: Tensor, z: Tensor, labels: Tensor, begin: int
) -> tuple[Tensor, Tensor, Tensor]:
    """As titan::cross_entropy_add_block."""
    tokens, words = z.shape
    new = largest.new_empty(tokens), total.new_empty(tokens), target.new_empty(tokens)
    if tokens:
        inputs = (t.contiguous() for t in (z, labels, largest, total, target))
        _add_block[(tokens,)](*inputs, *new, begin, words, **_sizes(words))
    return new


def gradient(z: Tensor, labels: Tensor, lse: Tensor, g: Tensor, of_exp: Tensor, begin: int) -> Tensor:
    """As titan::cross_entropy_gradient."""
    tokens, words = z.shape
    dz = torch.empty_like(z, memory_format=torch.contiguous_format)
    if tokens:
        sizes, inputs = _sizes(words), (t.contiguous() for t in (z, labels, lse, g, of_exp))
        _gradient[(tokens, triton.cdiv(words, sizes["BLOCK"]))](*inputs, dz, begin, words, **sizes)
    return dz


def _sizes(words: int) -> dict[str, int]:
    return {"BLOCK": min(WORDS, max(128, triton.next_power_of_2(words))), "num_warps": 8}
