"""Tensor and sequence parallelism: every matrix is shared by T ranks, and so is every sequence between the matrices.

Two matrices in a row need one exchange. The first is cut by columns, so that each rank has some of the hidden units; what
stands between works on units alone (an activation function, or the attention of whole heads); the second is cut by rows:

    Y = f(X A) B = sum over ranks r of f(X A_r) B_r                   A = [A_1 .. A_T],  B = [B_1; ..; B_T]

The sum is the only thing that has to travel. Norms, dropouts and additions between such pairs would be done T times over;
instead each rank keeps 1/T of the sequence there. So the sum becomes a reduce-scatter along the sequence, and before the next
pair an all-gather puts the sequence together: the same bytes as the all-reduce that they replace, and 1/T of the activations
between the pairs; only the two gathered inputs are kept whole. For a forward pass of a block with b sequences of s tokens of
width d each rank sends, twice (attention, feed-forward),

    all-gather  b s d (T-1)/T        reduce-scatter  b s d (T-1)/T        and the same backward, the two changing places

The embedding is cut by tokens: a rank looks up the tokens it has, gives zeros for the others, and the outputs are added. So is
the output matrix (`tensor_loss.py`).

Weights that stay whole but see only a part of the sequence (norms, biases after a row matrix) get a part of their gradient on
each rank; these parts are added once a step, in one message. So are, one by one, those of key and value heads that ranks share.

With `async_tp` these exchanges go piece by piece, beside the products (`tensor_async.py`).

A rank's parameters are ordinary tensors, and the model's own code runs on them: the model only ever sees smaller matrices.

Sources: Shoeybi et al., "Megatron-LM" (arXiv:1909.08053); Korthikanti et al., "Reducing activation recomputation"
(arXiv:2205.05198).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from titan.layout import Cut, local
from titan.linear import multiply, products_of
from titan.parallel.tensor_async import GatherAhead, linear_reduce
from titan.parallel.tensor_exchange import TensorParallel
from titan.parallel.tensor_loss import TensorParallelLoss
from titan.sharding import BY_OUTPUT, Sharding


def cut_model(model: nn.Module, table: Sharding, words: Mapping[str, str], tp: TensorParallel) -> None:
    """Cut a model, or a part of its layers, on the meta device, in place.

    words: module name -> style, from `titan.sharding.styles`. The cuts, and which parameters stay whole, are left in `tp`.
    """
    modules = dict(model.named_modules())
    for name, style in words.items():
        if name in modules:
            _STYLES[style](modules[name], name, table, tp)
            if style == "gather":
                _gather_before(modules, name, words, tp)
    for name, module in modules.items():
        for own, _ in module.named_parameters(recurse=False):
            full = f"{name}.{own}"
            assert full in tp.cuts or full in tp.whole, f"the sharding table says nothing of {name!r}"
    if any(name in modules for name in table.after):
        head = table.tied or next(name for name in table.after if isinstance(modules.get(name), nn.Linear))
        cut = tp.cuts.get(f"{head}.weight")
        setattr(model, table.loss, TensorParallelLoss(tp, cut, getattr(model, table.loss)))


def _col(module: nn.Module, name: str, table: Sharding, tp: TensorParallel) -> None:
    for own, parameter in module.named_parameters(recurse=False):
        _cut(module, name, own, 0, *_share(parameter.shape[0], tp), tp)


def _heads(module: nn.Module, name: str, table: Sharding, tp: TensorParallel) -> None:
    _cut_heads(module, name, table.heads, tp)


def _kv(module: nn.Module, name: str, table: Sharding, tp: TensorParallel) -> None:
    _cut_heads(module, name, table.kv_heads, tp)


def _cut_heads(module: nn.Module, name: str, heads: int, tp: TensorParallel) -> None:
    """Whole heads for each rank, or, with fewer heads than ranks, the one that its query heads use."""
    begin, count = tp.rank * heads // tp.degree, max(1, heads // tp.degree)
    for own, parameter in module.named_parameters(recurse=False):
        width = parameter.shape[0] // heads
        _cut(module, name, own, 0, begin * width, (begin + count) * width, tp)
        if tp.degree > heads:
            tp.shared.add(f"{name}.{own}")


def _row(module: nn.Module, name: str, table: Sharding, tp: TensorParallel) -> None:
    assert isinstance(module, nn.Linear)
    _cut(module, name, "weight", 1, *_share(module.weight.shape[1], tp), tp)
    if module.bias is not None:
        tp.whole.add(f"{name}.bias")

    def forward(x: Tensor) -> Tensor:
        products = products_of(module)
        if tp.overlap and tp.sequence:
            y = linear_reduce(x, module.weight, products, tp.group)
        else:
            y = tp.reduce(multiply(x, module.weight, products))
        return y if module.bias is None else y + module.bias

    _set_forward(module, forward)


def _whole(module: nn.Module, name: str, table: Sharding, tp: TensorParallel) -> None:
    tp.whole.update(f"{name}.{own}" for own, _ in module.named_parameters(recurse=False))


def _gather_before(modules: Mapping[str, nn.Module], name: str, words: Mapping[str, str], tp: TensorParallel) -> None:
    """Collect the whole sequence before a module runs; with overlap, together with the matrices inside that take it."""
    gather = tp.gather
    if tp.overlap:
        inside = [modules[other] for other, word in words.items() if word in BY_OUTPUT and other.startswith(f"{name}.")]
        ahead = GatherAhead([module for module in inside if isinstance(module, nn.Linear)], tp.group)
        gather = lambda x: ahead.gather(x) if tp.sequence else x  # noqa: E731
        for linear in ahead.linears:
            _set_forward(linear, partial(ahead.output, linear))
    modules[name].register_forward_pre_hook(lambda _, inputs: (gather(inputs[0]), *inputs[1:]))


def _scatter(module: nn.Module, name: str, table: Sharding, tp: TensorParallel) -> None:
    _whole(module, name, table, tp)
    module.register_forward_pre_hook(lambda _, inputs: (tp.part(inputs[0]), *inputs[1:]))


def _embed(module: nn.Module, name: str, table: Sharding, tp: TensorParallel) -> None:
    assert isinstance(module, nn.Embedding)
    begin, end = _share(module.weight.shape[0], tp)
    _cut(module, name, "weight", 0, begin, end, tp)

    def forward(tokens: Tensor) -> Tensor:
        here = (tokens >= begin) & (tokens < end)
        h = F.embedding((tokens - begin).where(here, 0), module.weight)
        return tp.reduce(h.where(here[..., None], 0))

    _set_forward(module, forward)


_STYLES = {
    "gather": _whole,
    "col": _col,
    "heads": _heads,
    "kv": _kv,
    "row": _row,
    "seq": _whole,
    "scatter": _scatter,
    "embed": _embed,
    "head": _col,
}


def _set_forward(module: nn.Module, forward: Callable[[Tensor], Tensor]) -> None:
    module.forward = forward  # type: ignore[method-assign, assignment]


def _share(size: int, tp: TensorParallel) -> tuple[int, int]:
    """Begin and end of this rank's part of a dimension: parts differ by one element at most."""
    return tp.rank * size // tp.degree, (tp.rank + 1) * size // tp.degree


def _cut(module: nn.Module, name: str, own: str, dim: int, begin: int, end: int, tp: TensorParallel) -> None:
    full = module._parameters[own]
    assert full is not None
    tp.cuts[f"{name}.{own}"] = Cut(dim, begin, full.shape[dim])
    module._parameters[own] = nn.Parameter(full.detach().narrow(dim, begin, end - begin).clone())


class PartialGradients:
    """Adds up, once a step, the gradients of which each tensor-parallel rank has only a part."""

    def __init__(self, named: Mapping[str, nn.Parameter], tp: TensorParallel) -> None:
        """named: this rank's parameters, as they are once they have memory."""
        self.tp = tp
        self.whole = [p for name, p in named.items() if name in tp.whole]
        self.shared = [p for name, p in named.items() if name in tp.shared]

    def finish(self) -> None:
        grads = [local(p.grad) for p in (*self.whole, *self.shared) if p.grad is not None]
        if not grads:
            return
        # A shared head's gradient goes into a row of its own, so that only the ranks of one head are added.
        heads = self.tp.kv_heads
        head = self.tp.rank * heads // self.tp.degree
        for grad in grads[len(self.whole) :]:
            rows = grad.new_zeros(heads, *grad.shape)
            rows[head] = grad
            dist.all_reduce(rows, group=self.tp.group)
            grad.copy_(rows[head])
        if self.whole:
            message = torch.cat([grad.flatten() for grad in grads[: len(self.whole)]])
            dist.all_reduce(message, group=self.tp.group)
            for grad, total in zip(grads, message.split([grad.numel() for grad in grads[: len(self.whole)]]), strict=False):
                grad.copy_(total.view_as(grad))
