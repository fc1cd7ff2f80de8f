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
) -> Tensor:
    """The summed loss of all tokens whose label is not -100: a float32 scalar.

    h: [.., width]. weight: [words, width] of the same dtype. labels: int64 [..], h's leading dimensions. z_loss: zeta. most:
    logits to hold at once, tokens x words, but for at least 128 words; 0: all. begin: the word of weight's first row. join:
    joins statistics, where weight has some of the words; then h's gradient is that of these words alone, to be added up by the
    caller.
    Raises RuntimeError for a label that is no word, where weight has them all.
    """
    loss: Tensor = _LinearCrossEntropy.apply(h.flatten(0, -2), weight, labels.flatten(), z_loss, most, begin, join)
    return loss


def statistics(h: Tensor, weight: Tensor, labels: Tensor, words: int, begin: int = 0) -> tuple[Statistics, Tensor]:
    """Statistics over weight's words, so many at a time; and the logits where there is one block. h: [tokens, width]."""
    largest = torch.full((len(h),), -torch.inf, device=h.device)
    total, target = torch.zeros_like(largest), torch.zeros_like(largest)
    kept = h.new_empty(0)
    for first, rows in _blocks(weight, words):
        logits = F.linear(h, rows)
        if words == len(weight):
            kept = logits
        z = logits.float()
        here, at = _labels_here(labels, begin + first, len(rows))
        target += z.gather(1, at)[:, 0].where(here, 0)
        higher = torch.maximum(largest, z.amax(1))
        z = (z.clone() if z is kept else z).sub_(higher[:, None]).exp_()
        total = total * (largest - higher).exp() + z.sum(1)
        largest = higher
        del logits, z  # before the next block's
    return Statistics(largest, total, target), kept


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
        ctx: Any, h: Tensor, weight: Tensor, labels: Tensor, z_loss: float, most: int, begin: int, join: Join | None
    ) -> Tensor:
        words = min(len(weight), max(UNIT, most // max(1, len(h)) // UNIT * UNIT)) if most else len(weight)
        if join is None:
            known = (labels == IGNORED) | ((labels >= 0) & (labels < len(weight)))
            torch._assert_async(known.all(), "a label is no word of the vocabulary")
        found, kept = statistics(h, weight, labels, words, begin)
        largest, total, target = join(found) if join is not None else found
        lse, counted = largest + total.log(), labels != IGNORED
        ctx.save_for_backward(h, weight, labels, lse, kept)
        ctx.z_loss, ctx.words, ctx.begin = z_loss, words, begin
        return (lse - target + z_loss * lse.square()).where(counted, 0).sum()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        h, weight, labels, lse, kept = ctx.saved_tensors
        g = (labels != IGNORED) * gradient
        of_exp = g * (1 + 2 * ctx.z_loss * lse)
        one = ctx.words == len(weight)
        dh: Tensor | None = None
        dw = torch.empty_like(weight) if ctx.needs_input_grad[1] else None
        for first, rows in _blocks(weight, ctx.words):
            z = kept if one else F.linear(h, rows)
            dz = (z.clone() if z.dtype == torch.float32 else z.float()).sub_(lse[:, None]).exp_().mul_(of_exp[:, None])
            here, at = _labels_here(labels, ctx.begin + first, len(rows))
            dz = dz.scatter_add_(1, at, -(here * g)[:, None]).to(h.dtype)
            if ctx.needs_input_grad[0]:
                part = dz @ rows
                dh = part if one else part.float() if dh is None else dh.add_(part)
            if dw is not None:
                torch.mm(dz.T, h, out=dw[first : first + len(rows)])
        return None if dh is None else dh.to(h.dtype), dw, None, None, None, None, None
