"""The output matrix and cross-entropy in one, without ever holding all logits.

A model's last step makes logits z = h W^T, one for each token and word: 4,096 tokens and 128,000 words are half a billion
numbers, of which plain cross-entropy holds several copies. Its result is one number a token, and that can be had block by
block of words:

    loss = lse - z_label + zeta lse^2          lse = log sum_v exp(z_v)

The sum is carried from block to block with the largest logit so far taken out (m' = max(m, max z), s' = s exp(m - m') + sum
exp(z - m')). The last term keeps lse near zero, where zeta is not (z-loss). In the backward pass each block's logits are made
again, unless there is only one block, which is kept:

    dz_v = g (exp(z_v - lse) (1 + 2 zeta lse) - [v = label])          dh = dz W          dW = dz^T h

A block has all tokens and some words, so that the gradient of a word's row is made at once, and is added up by the product
itself, in float32. The price is a third product for logits: 4 where plain cross-entropy has 3.

W may be some of the rows (`begin`: the first one's word), as under tensor parallelism; then what `statistics` gives is joined
over the ranks before the loss is made of it.

`fused`: what is done with a block between the products is one pass over it, by Triton kernels on a GPU
(`linear_cross_entropy_triton.py`).

Logits are rounded to the format of h and summed in float32, as in the plain model.

Sources: Milakov and Gimelshein, "Online normalizer calculation for softmax" (arXiv:1805.02867); Wijmans et al., "Cut your
losses in large-vocabulary language models" (arXiv:2411.09009); z-loss: Chowdhery et al., "PaLM" (arXiv:2204.02311).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .lazily import lazily

IGNORED = -100
"""The label of a token that does not count."""
UNIT = 128
"""Blocks have a multiple of so many words, since a GPU multiplies rows fast that begin at whole addresses."""


class Statistics(NamedTuple):
    """Of each token's logits, float32 [tokens]."""

    largest: Tensor
    total: Tensor
    """Sum of exp(logit - largest)."""
    target: Tensor
    """The label's logit; 0 where the label is not among these words."""


Join = Callable[[Statistics], Statistics]
"""Statistics over some words -> over all of them."""


def linear_cross_entropy(
    h: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    z_loss: float = 0.0,
    most: int = 0,
    begin: int = 0,
    join: Join | None = None,
    fused: bool = False,
) -> Tensor:
    """The summed loss of all tokens whose label is not -100: a float32 scalar.

    h: [.., width]. weight: [words, width] of the same dtype. labels: int64 [..], h's leading dimensions. z_loss: zeta. most:
    logits to hold at once, tokens x words, but for at least 128 words; 0: all. begin: the word of weight's first row. join:
    joins statistics, where weight has some of the words; then h's gradient is that of these words alone, to be added up by the
    caller. fused: one pass over a block between the products, on a GPU.
    Raises RuntimeError for a label that is no word, where weight has them all.
    """
    loss: Tensor = _LinearCrossEntropy.apply(h.flatten(0, -2), weight, labels.flatten(), z_loss, most, begin, join, fused)
    return loss


def statistics(
    h: Tensor, weight: Tensor, labels: Tensor, words: int, begin: int = 0, fused: bool = False
) -> tuple[Statistics, Tensor]:
    """Statistics over weight's words, so many at a time; and the logits where there is one block. h: [tokens, width]."""
    largest = torch.full((len(h),), -torch.inf, device=h.device)
    found = Statistics(largest, torch.zeros_like(largest), torch.zeros_like(largest))
    kept = h.new_empty(0)
    for first, rows in _blocks(weight, words):
        z = F.linear(h, rows)
        if words == len(weight):
            kept = z
        if fused:
            found = Statistics(*_add_block_fused(*found, z, labels, begin + first))
        else:
            found = _add_block(found, z, labels, begin + first, z is kept)
        del z  # before the next block's
    return found, kept


def _add_block(found: Statistics, z: Tensor, labels: Tensor, begin: int, keep: bool) -> Statistics:
    """Statistics of the words before and of these. z: [tokens, words], overwritten unless `keep`; begin: the first word."""
    wide = z.float()
    here, at = _labels_here(labels, begin, z.shape[1])
    target = found.target + wide.gather(1, at)[:, 0].where(here, 0)
    largest = torch.maximum(found.largest, wide.amax(1))
    taken = largest.where(largest > -torch.inf, 0)  # before there is any number
    wide = (wide.clone() if keep and wide is z else wide).sub_(taken[:, None]).exp_()
    return Statistics(largest, found.total * (found.largest - taken).exp() + wide.sum(1), target)


def _gradient(z: Tensor, labels: Tensor, lse: Tensor, g: Tensor, of_exp: Tensor, begin: int, keep: bool) -> Tensor:
    """of_exp exp(z - lse) - [v = label] g, in z's format. lse, g, of_exp: float32 [tokens]; z, begin, keep: as above."""
    wide = z.float()
    wide = (wide.clone() if keep and wide is z else wide).sub_(lse[:, None]).exp_().mul_(of_exp[:, None])
    here, at = _labels_here(labels, begin, z.shape[1])
    return wide.scatter_add_(1, at, -(here * g)[:, None]).to(z.dtype)


@torch.library.custom_op("titan::cross_entropy_add_block", mutates_args=())
def _add_block_fused(
    largest: Tensor, total: Tensor, target: Tensor, z: Tensor, labels: Tensor, begin: int
) -> tuple[Tensor, Tensor, Tensor]:
    """_add_block in one pass over z, on a GPU."""
    return _add_block(Statistics(largest, total, target), z, labels, begin, True)


@torch.library.custom_op("titan::cross_entropy_gradient", mutates_args=())
def _gradient_fused(z: Tensor, labels: Tensor, lse: Tensor, g: Tensor, of_exp: Tensor, begin: int) -> Tensor:
    """_gradient in one pass over z, on a GPU."""
    return _gradient(z, labels, lse, g, of_exp, begin, True)


@_add_block_fused.register_fake
def _(
    largest: Tensor, total: Tensor, target: Tensor, z: Tensor, labels: Tensor, begin: int
) -> tuple[Tensor, Tensor, Tensor]:
    return largest.new_empty(len(z)), total.new_empty(len(z)), target.new_empty(len(z))


@_gradient_fused.register_fake
def _(z: Tensor, labels: Tensor, lse: Tensor, g: Tensor, of_exp: Tensor, begin: int) -> Tensor:
    return torch.empty_like(z, memory_format=torch.contiguous_format)


_add_block_fused.register_kernel("cuda", lazily("linear_cross_entropy_triton.add_block"))
_gradient_fused.register_kernel("cuda", lazily("linear_cross_entropy_triton.gradient"))


def _blocks(weight: Tensor, words: int) -> Iterator[tuple[int, Tensor]]:
    for first in range(0, len(weight), words):
        yield first, weight[first : first + words]


def _labels_here(labels: Tensor, begin: int, words: int) -> tuple[Tensor, Tensor]:
    """Whether a token's label is in a block, bool [tokens]; and its place there, int64 [tokens, 1], 0 where it is not."""
    here = (labels >= begin) & (labels < begin + words)
    return here, (labels - begin).where(here, 0)[:, None]


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        h: Tensor,
        weight: Tensor,
        labels: Tensor,
        z_loss: float,
        most: int,
        begin: int,
        join: Join | None,
        fused: bool,
    ) -> Tensor:
        words = min(len(weight), max(UNIT, most // max(1, len(h)) // UNIT * UNIT)) if most else len(weight)
        if join is None:
            known = (labels == IGNORED) | ((labels >= 0) & (labels < len(weight)))
            torch._assert_async(known.all(), "a label is no word of the vocabulary")
        found, kept = statistics(h, weight, labels, words, begin, fused)
        largest, total, target = join(found) if join is not None else found
        lse, counted = largest + total.log(), labels != IGNORED
        ctx.save_for_backward(h, weight, labels, lse, kept)
        ctx.z_loss, ctx.words, ctx.begin, ctx.fused = z_loss, words, begin, fused
        return (lse - target + z_loss * lse.square()).where(counted, 0).sum()

    @staticmethod
    def backward(ctx: Any, d_loss: Tensor) -> Any:
        h, weight, labels, lse, kept = ctx.saved_tensors
        g = (labels != IGNORED) * d_loss
        of_exp = g * (1 + 2 * ctx.z_loss * lse)
        one = ctx.words == len(weight)
        dh: Tensor | None = None
        dw = torch.empty_like(weight) if ctx.needs_input_grad[1] else None
        for first, rows in _blocks(weight, ctx.words):
            z = kept if one else F.linear(h, rows)
            known = z, labels, lse, g, of_exp, ctx.begin + first
            dz = _gradient_fused(*known) if ctx.fused else _gradient(*known, keep=one)
            del z, known
            if ctx.needs_input_grad[0]:
                part = dz @ rows
                dh = part if one else part.float() if dh is None else dh.add_(part)
            if dw is not None:
                torch.mm(dz.T, h, out=dw[first : first + len(rows)])
        return None if dh is None else dh.to(h.dtype), dw, None, None, None, None, None, None
