"""Tensor and sequence parallelism: every matrix is shared by T ranks, and so is every sequence between the matrices.

Two matrices in a row need one exchange. The first is cut by columns, so that each rank has some of the hidden units; what
stands between works on units alone (an activation function, or the attention of whole heads); the second is cut by rows:

    Y = f(X A) B = sum over ranks r of f(X A_r) B_r                   A = [A_1 .. A_T],  B = [B_1; ..; B_T]

The sum is the only thing that has to travel. Norms, dropouts and additions between such pairs would be done T times over; instead each
rank keeps 1/T of the sequence there. So the sum becomes a reduce-scatter along the sequence, and before the next pair
an all-gather puts the sequence together: the same bytes as the all-reduce that they replace, and 1/T of the activations. For a
forward pass of a block with b sequences of s tokens of width d each rank sends, twice (attention, feed-forward),

    all-gather  b s d (T-1)/T        reduce-scatter  b s d (T-1)/T        and the same backward, the two changing places

The embedding is cut by tokens: a rank looks up the tokens it has, gives zeros for the others, and the outputs are added. The
output matrix is cut by tokens, too, and the loss never puts the logits together: of a token's logits z only the largest, the sum of
exponentials and the label's are exchanged,

    loss = log sum_v exp(z_v - m) + m - z_label        d loss / d z_v = exp(z_v - m) / sum - [v = label]

Weights that stay whole but see only a part of the sequence (norms, biases after a row matrix) get a part of their gradient on each
rank; these parts are added once a step, in one message. So are those of key and value heads that ranks share.

A rank's parameters are ordinary tensors, and the model's own code runs on them: the model only ever sees smaller matrices.

Sources: Shoeybi et al., "Megatron-LM" (arXiv:1909.08053); Korthikanti et al., "Reducing activation recomputation" (arXiv:2205.05198).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from titan.layout import Cut, local
from titan.sharding import Sharding


class TensorParallel:
    """One rank's side of the exchanges. `sequence`: whether the stream is cut along the sequence, as it is in training; text is
    generated token by token, and then every rank has all of the stream."""

    def __init__(self, group: dist.ProcessGroup, kv_heads: int) -> None:
        """kv_heads: the model's key and value heads, which ranks share where there are fewer of them."""
        self.group = group
        self.kv_heads = kv_heads
        self.rank = dist.get_rank(group)
        self.degree = dist.get_world_size(group)
        self.sequence = True
        self.cuts: dict[str, Cut] = {}
        self.whole: set[str] = set()
        """Parameters that every rank holds whole, whose gradients are sums over the ranks."""
        self.shared: set[str] = set()
        """Parameters of key and value heads that some ranks share, whose gradients are sums over those ranks."""

    def counts(self, name: str) -> bool:
        """Whether this rank is the first of those that hold the same part of a parameter."""
        if name in self.shared:
            return self.rank % (self.degree // self.kv_heads) == 0
        return name in self.cuts or self.rank == 0

    def gather(self, x: Tensor) -> Tensor:
        """[batch, seq / T, ...] of every rank -> [batch, seq, ...]."""
        gathered: Tensor = _Gather.apply(x, self.group) if self.sequence else x
        return gathered

    def reduce(self, x: Tensor) -> Tensor:
        """Terms [batch, seq, ...] -> this rank's part of their sum, [batch, seq / T, ...]."""
        reduced: Tensor = _Reduce.apply(x, self.group) if self.sequence else _Sum.apply(x, self.group)
        return reduced

    def sum(self, x: Tensor) -> Tensor:
        summed: Tensor = _Sum.apply(x, self.group)
        return summed

    def part(self, x: Tensor) -> Tensor:
        """[.., seq] -> this rank's part of the sequence, the last dimension."""
        return x.chunk(self.degree, dim=-1)[self.rank] if self.sequence else x


def cut_model(model: nn.Module, table: Sharding, words: Mapping[str, str], tp: TensorParallel) -> None:
    """Cut a model, or a part of its layers, on the meta device, in place.

    words: module name -> style, from `titan.sharding.styles`. The cuts, and which parameters stay whole, are left in `tp`.
    """
    modules = dict(model.named_modules())
    for name, style in words.items():
        if name in modules:
            _STYLES[style](modules[name], name, table, tp)
    for name, module in modules.items():
        for own, _ in module.named_parameters(recurse=False):
            full = f"{name}.{own}"
            assert full in tp.cuts or full in tp.whole, f"the sharding table says nothing of {name!r}"
    if any(name in modules for name in table.after):
        head = words.get("head") or words[table.tied]
        cut = tp.cuts.get("head.weight" if "head" in words else f"{table.tied}.weight")
        assert (cut is None) == (head in ("seq", "scatter"))
        setattr(model, table.loss, _Loss(tp, cut, getattr(model, table.loss)))


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
        y = tp.reduce(F.linear(x, module.weight))
        return y if module.bias is None else y + module.bias

    module.forward = forward


def _whole(module: nn.Module, name: str, table: Sharding, tp: TensorParallel) -> None:
    tp.whole.update(f"{name}.{own}" for own, _ in module.named_parameters(recurse=False))


def _gather(module: nn.Module, name: str, table: Sharding, tp: TensorParallel) -> None:
    _whole(module, name, table, tp)
    module.register_forward_pre_hook(lambda _, inputs: (tp.gather(inputs[0]), *inputs[1:]))


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

    module.forward = forward


_STYLES = {
    "gather": _gather,
    "col": _col,
    "heads": _heads,
    "kv": _kv,
    "row": _row,
    "seq": _whole,
    "scatter": _scatter,
    "embed": _embed,
    "head": _col,
}


def _share(size: int, tp: TensorParallel) -> tuple[int, int]:
    """Begin and end of this rank's part of a dimension: parts differ by one element at most."""
    return tp.rank * size // tp.degree, (tp.rank + 1) * size // tp.degree


def _cut(module: nn.Module, name: str, own: str, dim: int, begin: int, end: int, tp: TensorParallel) -> None:
    full = module._parameters[own]
    assert full is not None
    tp.cuts[f"{name}.{own}"] = Cut(dim, begin, full.shape[dim])
    module._parameters[own] = nn.Parameter(full.detach().narrow(dim, begin, end - begin).clone())


class _Loss(nn.Module):
    """Stands in for a model's loss: hidden states come cut along the sequence, the head's weight perhaps by tokens."""

    def __init__(self, tp: TensorParallel, cut: Cut | None, whole: nn.Module) -> None:
        super().__init__()
        self.tp, self.cut, self.whole = tp, cut, whole

    def forward(self, h: Tensor, weight: Tensor, labels: Tensor | None = None) -> Tensor:
        if self.cut is None:
            if labels is None:
                logits: Tensor = self.whole(self.tp.gather(h), weight)
                return logits
            return self.tp.sum(self.whole(h, weight, self.tp.part(labels)))
        logits = F.linear(self.tp.gather(h), weight)
        if labels is None:
            return _join(logits, self.cut.size, self.tp)
        loss: Tensor = _CrossEntropy.apply(logits.float(), labels, self.cut.begin, self.tp.group)
        return loss


class _CrossEntropy(torch.autograd.Function):
    """Summed cross-entropy of logits that are cut by tokens; the same scalar on every rank. Holds one copy of the rank's logits."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, begin: int, group: dist.ProcessGroup) -> Tensor:
        largest = logits.amax(-1)
        dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
        below = logits - largest[..., None]
        here = (labels >= begin) & (labels < begin + logits.shape[-1])
        at = (labels - begin).where(here, 0)[..., None]
        sums = torch.stack((below.gather(-1, at)[..., 0].where(here, 0), below.exp_().sum(-1)))  # below is now exp(below)
        dist.all_reduce(sums, group=group)
        target, total = sums
        counted = labels != -100
        ctx.save_for_backward(below.div_(total[..., None]), at, here, counted)
        return (total.log() - target).where(counted, 0).sum()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        shares, at, here, counted = ctx.saved_tensors
        d_logits = shares.scatter_add(-1, at, -here[..., None].to(shares.dtype))
        return d_logits.mul_((counted * grad)[..., None]), None, None, None


def _join(logits: Tensor, size: int, tp: TensorParallel) -> Tensor:
    """Every rank's logits of its tokens, side by side."""
    widths = [(r + 1) * size // tp.degree - r * size // tp.degree for r in range(tp.degree)]
    padded = F.pad(logits, (0, max(widths) - logits.shape[-1])).contiguous()
    parts = [torch.empty_like(padded) for _ in widths]
    dist.all_gather(parts, padded, group=tp.group)
    return torch.cat([part[..., :width] for part, width in zip(parts, widths, strict=True)], dim=-1)


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
        rows = [1] * len(self.whole) + [heads] * len(self.shared)
        parts = [grad.new_zeros(count, grad.numel()) for grad, count in zip(grads, rows, strict=True)]
        for part, grad in zip(parts, grads, strict=True):
            part[head if len(part) > 1 else 0] = grad.flatten()
        message = torch.cat([part.flatten() for part in parts])
        dist.all_reduce(message, group=self.tp.group)
        for grad, part, sums in zip(grads, parts, message.split([part.numel() for part in parts]), strict=True):
            grad.copy_(sums.view_as(part)[head if len(part) > 1 else 0].view_as(grad))


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return _all_gather(x, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return _reduce_scatter(grad, ctx.group), None


class _Reduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return _reduce_scatter(x, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return _all_gather(grad, ctx.group), None


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        x = x.clone()
        dist.all_reduce(x, group=group)
        return x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return grad, None


def _all_gather(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Parts of dimension 1 from all ranks, joined."""
    parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, x.contiguous(), group=group)
    return torch.cat(parts, dim=1)


def _reduce_scatter(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The sum over the ranks, of which each gets its part of dimension 1."""
    parts = [part.contiguous() for part in x.chunk(dist.get_world_size(group), dim=1)]
    out = torch.empty_like(parts[0])
    dist.reduce_scatter(out, parts, group=group)
    return out
