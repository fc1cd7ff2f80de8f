"""Asynchronous tensor parallelism: sequences travel in pieces, and each piece is multiplied while the next is on its way.

A matrix product needs not all of its input at once. With the sequence cut over T ranks, x = [x_0; ..; x_T-1], both exchanges
of a pair of matrices (`tensor.py`) fall into T pieces that stand alone:

    before     y_r = x_r A^T       for every rank's part x_r, as it arrives; the rank's own first, since it is here already
    after      z_r = y_r B^T       for every rank r, sent there as soon as it is made; the rank's own last; then z = sum

What travels is what travelled before, to the byte. But of the time it takes only that of the last piece (the first, where
products take less) is not hidden behind a product, if those are large enough:

    one piece on its way     b s d / (T bandwidth)
    one piece multiplied     2 b s d k / (T^2 flops)         k: the matrix's other side, of which a rank has k / T

The backward pass has the same two forms, the other way round, and a third thing to do while pieces travel: the gradients of the
weights, for which nobody waits. Products of T times fewer rows use a GPU less well, and where they are small, or the way is
short, this is slower: measure it.

The model's modules stay as they are: as a module begins that works on whole sequences, the outputs of those matrices inside
that take its input are made with the exchange, and each hands its own out when the model's code comes to it.

Source: Wang et al., "Overlap communication with dependent computation via decomposition" (ASPLOS 2023).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.overrides import handle_torch_function, has_torch_function_unary

from titan.linear import Later, Products, apply, products_of, puts_off, weight_gradient


@puts_off
@torch.compiler.disable
def gather_linears(
    x: Tensor, weights: list[Tensor], products: list[Products], group: dist.ProcessGroup, later: Later | None = None
) -> list[Tensor]:
    """Every rank's part x [batch, seq / T, inputs] -> the whole [batch, seq, inputs], and its product with each weight.

    weights: each [outputs, inputs]. products: how each is multiplied by. later: where to leave the weights' gradients undone.
    """
    if has_torch_function_unary(x):
        made: list[Tensor] = handle_torch_function(gather_linears, (x,), x, weights, products, group)
        return made
    return list(_GatherLinears.apply(x, group, later, products, *weights))


@puts_off
@torch.compiler.disable
def linear_reduce(
    x: Tensor, weight: Tensor, products: Products, group: dist.ProcessGroup, later: Later | None = None
) -> Tensor:
    """x [batch, seq, inputs / T] -> this rank's part [batch, seq / T, outputs] of the sum of all ranks' products with weight.

    weight: [outputs, inputs / T]. later: where to leave the weight's gradient undone.
    """
    if has_torch_function_unary(x):
        made: Tensor = handle_torch_function(linear_reduce, (x,), x, weight, products, group)
        return made
    reduced: Tensor = _LinearReduce.apply(x, weight, products, group, later)
    return reduced


class GatherAhead:
    """Makes the outputs of some matrices inside a module with the exchange that brings the module its input."""

    def __init__(self, linears: list[nn.Linear], group: dist.ProcessGroup) -> None:
        self.linears, self.group = linears, group
        self.whole: Tensor | None = None
        self.made: dict[nn.Linear, Tensor] = {}

    def gather(self, x: Tensor) -> Tensor:
        """[batch, seq / T, ...] of every rank -> [batch, seq, ...]."""
        weights, products = [m.weight for m in self.linears], [products_of(m) for m in self.linears]
        self.whole, *outputs = gather_linears(x, weights, products, self.group)
        self.made = dict(zip(self.linears, outputs, strict=True))
        return self.whole

    def output(self, linear: nn.Linear, x: Tensor) -> Tensor:
        """What a matrix makes of x: handed out where x is what was gathered, computed where it is something else."""
        if x is not self.whole or linear not in self.made:
            return apply(linear, x)
        y = self.made.pop(linear)
        if not self.made:
            self.whole = None
        return y if linear.bias is None else y + linear.bias


class _GatherLinears(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, group: dist.ProcessGroup, later: Later | None, products: list[Products], *weights: Tensor
    ) -> tuple[Tensor, ...]:
        made: list[list[Tensor]] = [[x] * group.size() for _ in range(1 + len(weights))]
        operands = [how.operand(weight, False) for how, weight in zip(products, weights, strict=True)]
        for owner, part in _arriving(x, group):
            outputs = [how.output(part, operand) for how, operand in zip(products, operands, strict=True)]
            for pieces, y in zip(made, (part, *outputs), strict=True):
                pieces[owner] = y
        whole, *outputs = (torch.cat(pieces, dim=1) for pieces in made)
        ctx.save_for_backward(whole, *weights)
        ctx.products, ctx.group, ctx.later = products, group, later
        ctx.weights = weights if later is not None else None  # the parameters themselves: what is saved may come back as copies
        ctx.set_materialize_grads(False)
        return whole, *outputs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_whole: Tensor | None, *grads: Tensor | None) -> Any:
        whole, *weights = ctx.saved_tensors
        parts = [None if dy is None else dy.chunk(ctx.group.size(), dim=1) for dy in (d_whole, *grads)]
        operands = [how.operand(weight, True) for how, weight in zip(ctx.products, weights, strict=True)]

        def term(rank: int) -> Tensor:
            found = [] if parts[0] is None else [parts[0][rank]]
            for part, operand, how in zip(parts[1:], operands, ctx.products, strict=True):
                if part is not None:
                    found.append(how.d_input(part[rank], operand))
            return sum(found[1:], found[0])

        leaving = _Leaving(term, ctx.group) if ctx.needs_input_grad[0] else None
        found = [
            weight_gradient((ctx.weights or weights)[i], whole, dy, ctx.products[i], ctx.later)
            if dy is not None and ctx.needs_input_grad[4 + i]
            else None
            for i, dy in enumerate(grads)
        ]
        return None if leaving is None else leaving.sum(), None, None, None, *found


class _LinearReduce(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, products: Products, group: dist.ProcessGroup, later: Later | None
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.products, ctx.group, ctx.later = products, group, later
        ctx.weight = weight if later is not None else None
        parts, operand = x.chunk(group.size(), dim=1), products.operand(weight, False)
        return _Leaving(lambda rank: products.output(parts[rank], operand), group).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_part: Tensor) -> Any:
        x, weight = ctx.saved_tensors
        dy, dx = [d_part] * ctx.group.size(), [d_part] * ctx.group.size()
        operand = ctx.products.operand(weight, True)
        for owner, part in _arriving(d_part, ctx.group):
            dy[owner], dx[owner] = part, ctx.products.d_input(part, operand)
        found = None
        if ctx.needs_input_grad[1]:
            owner = weight if ctx.weight is None else ctx.weight
            found = weight_gradient(owner, x, torch.cat(dy, dim=1), ctx.products, ctx.later)
        return torch.cat(dx, dim=1), found, None, None, None


def _arriving(part: Tensor, group: dist.ProcessGroup) -> Iterator[tuple[int, Tensor]]:
    """Every rank's part with its owner, this rank's first; the others are on their way meanwhile."""
    rank, degree = group.rank(), group.size()
    part = part.contiguous()
    owners = [(rank + step) % degree for step in range(1, degree)]
    received = [torch.empty_like(part) for _ in owners]
    works = [
        _swap(part, (rank - step) % degree, buffer, owner, group)
        for step, (owner, buffer) in enumerate(zip(owners, received, strict=True), 1)
    ]
    yield rank, part
    for owner, buffer, work in zip(owners, received, works, strict=True):
        for half in work:
            half.wait()
        yield owner, buffer


class _Leaving:
    """Terms of a sum for every rank, each sent as soon as it is made; this rank's own, made last, stays."""

    def __init__(self, term: Callable[[int], Tensor], group: dist.ProcessGroup) -> None:
        """term: makes this rank's term of a rank's sum, [batch, seq / T, ...]; called once for each rank."""
        rank, degree = group.rank(), group.size()
        self.sent, self.works = [], []
        self.terms: list[Tensor | None] = [None] * degree
        for step in range(1, degree):
            to, source = (rank + step) % degree, (rank - step) % degree
            sent = term(to).contiguous()
            received = torch.empty_like(sent)
            self.works += _swap(sent, to, received, source, group)
            self.sent.append(sent)  # until it has left
            self.terms[source] = received
        self.terms[rank] = term(rank)

    def sum(self) -> Tensor:
        """This rank's sum, terms added in the order of the ranks."""
        for work in self.works:
            work.wait()
        first, *others = (term for term in self.terms if term is not None)
        return sum(others, first)


def _swap(sent: Tensor, to: int, received: Tensor, source: int, group: dist.ProcessGroup) -> list[dist.Work]:
    """Start sending one tensor and receiving another. Ranks count within the group."""
    works: list[dist.Work] = dist.batch_isend_irecv(
        [
            dist.P2POp(dist.isend, sent, group=group, group_peer=to),
            dist.P2POp(dist.irecv, received, group=group, group_peer=source),
        ]
    )
    return works
