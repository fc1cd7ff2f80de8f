"""The loss without all logits: against float64, in blocks of every size; and what it holds."""

from __future__ import annotations

import random
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from titan.kernels.linear_cross_entropy import Statistics, linear_cross_entropy, statistics
from titan.models.llama3.model import SummedCrossEntropy

SHAPES = [(1, 1, 3, 2), (1, 7, 5, 1013), (3, 31, 17, 397), (2, 16, 64, 256), (2, 0, 8, 300)]
"""Sequences, tokens, width, words."""


def made(shape: tuple[int, ...], seed: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, some of them large; a matrix, its columns no neighbours in memory; labels, some of which do not count."""
    batch, seq, width, words = shape
    source = torch.Generator().manual_seed(seed)
    h = torch.randn(batch, seq, width, generator=source) * torch.randint(1, 10, (batch, seq, 1), generator=source)
    weight = torch.randn(width, words, generator=source).t()
    labels = torch.randint(0, words, (batch, seq), generator=source)
    labels[torch.rand(batch, seq, generator=source) < 0.3] = -100
    return h.to(dtype), weight.to(dtype), labels


def exact(h: Tensor, weight: Tensor, labels: Tensor, z_loss: float) -> list[Tensor]:
    """In float64: the loss, and the gradients of h and weight."""
    h, weight = h.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    logits = (h @ weight.t()).flatten(0, -2)
    loss = F.cross_entropy(logits, labels.flatten(), ignore_index=-100, reduction="sum")
    loss = loss + z_loss * (logits.logsumexp(-1).square() * (labels.flatten() != -100)).sum()
    (loss * 0.37).backward()
    assert h.grad is not None
    assert weight.grad is not None
    return [loss.detach(), h.grad, weight.grad]


def ours(h: Tensor, weight: Tensor, labels: Tensor, **options: Any) -> list[Tensor]:
    h, weight = h.detach().clone().requires_grad_(), weight.detach().clone().requires_grad_()
    loss = linear_cross_entropy(h, weight, labels, **options)
    (loss * 0.37).backward()
    assert h.grad is not None
    assert weight.grad is not None
    return [loss.detach(), h.grad, weight.grad]


def hold(found: list[Tensor], expected: list[Tensor], h: Tensor, weight: Tensor) -> None:
    """Loss and gradients are within 1e-5, and besides by what a rounded logit of size z is off, z x 2^-23 for each token, where
    a token's loss is next to nothing."""
    rounding = 2 * 2.0**-23 * (h @ weight.t()).abs().max().item() if h.numel() else 0.0
    sizes = h[..., 0].numel(), weight.norm().item(), h.norm().item()
    for got, right, size in zip(found, expected, sizes, strict=True):
        assert (got - right).norm() <= 1e-5 * right.norm() + rounding * size


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("z_loss", [0.0, 1e-2])
@pytest.mark.parametrize("seed", range(3))
def test_loss_and_gradients_against_float64(shape: tuple[int, ...], z_loss: float, seed: int) -> None:
    h, weight, labels = made(shape, seed)
    expected = exact(h, weight, labels, z_loss)
    tokens, words = labels.numel(), len(weight)
    for most in (0, 1, tokens * random.Random(seed).randint(1, words), tokens * words):
        found = ours(h, weight, labels, z_loss=z_loss, most=most)
        assert {t.dtype for t in found} == {torch.float32}
        hold(found, expected, h, weight)


def test_blocks_are_as_exact_as_the_plain_loss_in_bfloat16() -> None:
    h, weight, labels = made((4, 64, 96, 500), 1, torch.bfloat16)
    right = exact(h, weight, labels, 0.0)
    plain_h, plain_w = h.clone().requires_grad_(), weight.clone().requires_grad_()
    plain = SummedCrossEntropy()(plain_h, plain_w, labels)
    (plain * 0.37).backward()
    for got, expected, exactly in zip(
        ours(h, weight, labels, most=256 * 128), [plain.detach(), plain_h.grad, plain_w.grad], right, strict=True
    ):
        assert expected is not None
        assert got.dtype == expected.dtype
        assert (got - exactly).norm() <= 1.1 * (expected - exactly).norm() + 1e-6 * exactly.norm()


@pytest.mark.parametrize("seed", range(4))
def test_words_in_parts_give_what_all_words_give(seed: int) -> None:
    """As ranks do that have some rows each: statistics joined, gradients of h added, those of the rows side by side."""
    h, weight, labels = made((2, 13, 24, 701), seed)
    expected = exact(h, weight, labels, 1e-3)
    cuts = [0, *sorted(random.Random(seed).sample(range(1, 701), 2)), 701]
    parts = [(begin, weight[begin:end]) for begin, end in pairwise(cuts)]

    def join(_: Statistics) -> Statistics:
        found = [statistics(h.flatten(0, 1), rows, labels.flatten(), 9, begin)[0] for begin, rows in parts]
        largest = torch.stack([part.largest for part in found]).amax(0)
        total = sum((part.total * (part.largest - largest).exp() for part in found), torch.zeros_like(largest))
        return Statistics(largest, total, sum((part.target for part in found), torch.zeros_like(largest)))

    got = [ours(h, rows, labels, z_loss=1e-3, most=26 * 128, begin=begin, join=join) for begin, rows in parts]
    d_h, d_weight = sum((part[1] for part in got), torch.zeros_like(h)), torch.cat([part[2] for part in got])
    for loss, *_ in got:
        hold([loss, d_h, d_weight], expected, h, weight)


class Largest(TorchDispatchMode):
    """The most elements that a new tensor has."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor):
            self.elements = max(self.elements, out.numel())
        return out


def test_no_more_logits_than_asked_for_are_ever_held() -> None:
    h, weight, labels = made((2, 128, 16, 1000), 0)
    with Largest() as seen:
        ours(h, weight, labels, most=256 * 300)
    assert seen.elements == 256 * 256 > weight.numel()
    with Largest() as seen:
        ours(h, weight, labels)
    assert seen.elements == 256 * 1000


def test_blocks_are_not_kept_and_one_block_is() -> None:
    h, weight, labels = made((2, 64, 16, 1000), 0)
    for most, kept in ((128 * 256, 0), (0, 128 * 1000)):
        loss = linear_cross_entropy(h.requires_grad_(), weight.requires_grad_(), labels, most=most)
        saved = [t.untyped_storage().nbytes() for t in loss.grad_fn.saved_tensors]  # type: ignore[union-attr]
        inputs = sorted([h.nbytes, weight.nbytes, labels.nbytes, 128 * 4])
        assert sorted(saved) == sorted([*inputs, 4 * kept])


def test_a_label_that_is_no_word_is_refused() -> None:
    h, weight, labels = made((1, 8, 4, 20), 0)
    for wrong in (20, 5000, -1):
        labels[0, 3] = wrong
        with pytest.raises(RuntimeError, match="no word of the vocabulary"):
            linear_cross_entropy(h, weight, labels)
