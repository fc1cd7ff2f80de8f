"""Context parallelism: ranks share a sequence. Each has the queries of its tokens, and meets the keys and values of all.

What a rank holds. Under causal attention token i attends to i + 1 keys: were the sequence cut straight, the last rank would
do (2 n - 1) times the first one's work. With n ranks it is cut into 2 n chunks, and rank r holds chunks r and 2 n - 1 - r,
head and tail: any such pair sees the same number of keys. `cut` does that to a batch, and nothing else needs to know: all
modules but attention work token by token, with the positions given.

How queries meet keys, three ways with one meaning; per layer, with s = S / n tokens, H query and G key heads of width d, a
rank sends in the forward pass

    ring        keys and values travel from rank to rank, the next block while this one computes, and what each block gives
                is merged by its log-sum-exp (titan/attention.py): 2 (n - 1) s G d, hidden behind the computation; two blocks
                in memory. The backward pass sends the blocks round again, and with each its gradients, summed under way; one
                more hop brings those home.
    allgather   everyone gathers all keys and values, then attends in one go: the same traffic, not hidden; all keys in memory
                while a layer runs. The backward pass gathers again, and reduce-scatters the gradients.
    ulysses     an all-to-all exchanges tokens for heads: each rank has all tokens of H / n heads, attends as one process
                would, and an all-to-all brings the values back: 2 (H + G) s d (n - 1) / n, the least for many ranks, but n
                has to divide H. Key heads that n does not divide are repeated until it does.

No rank ever has the scores of the whole sequence: the fused ops keep them in registers, a block at a time.

Sources: Liu et al., "Ring Attention with Blockwise Transformers" (arXiv:2310.01889); Llama Team, "The Llama 3 Herd of Models"
(arXiv:2407.21783, section 3.3.2) for the gathered keys and the chunks; Jacobs et al., "DeepSpeed Ulysses" (arXiv:2309.14509).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from titan.attention import add_gradients, attend, attention, merge, nothing
from titan.documents import Documents, Pieces
from titan.parallel.collectives import all_gather, reduce_scatter

CUT = ("tokens", "labels", "positions")


def cut(batch: Mapping[str, Tensor], rank: int, degree: int) -> dict[str, Tensor]:
    """This rank's part of a batch: tokens, labels and positions [batch, seq / degree]; anything else as it is.

    Raises ValueError where 2 x degree does not divide seq.
    """
    if degree == 1:
        return dict(batch)  # as it lies: a copy would no longer be pinned

    def part(value: Tensor) -> Tensor:
        return torch.cat([value[:, begin:end] for begin, end in pieces(value.shape[1], rank, degree)], dim=1)

    return {key: part(value) if key in CUT else value for key, value in batch.items()}


def offsets(seq_len: int, rank: int, degree: int) -> Tensor:
    """Which tokens of a sequence this rank has: int64 [seq_len / degree]."""
    return torch.cat([torch.arange(*piece) for piece in pieces(seq_len, rank, degree)])


def pieces(seq_len: int, rank: int, degree: int) -> Pieces:
    """The spans of a sequence that this rank has: one chunk from its head, one from its tail."""
    if degree == 1:
        return ((0, seq_len),)
    size, rest = divmod(seq_len, 2 * degree)
    if rest:
        raise ValueError(f"{degree} ranks cannot share sequences of {seq_len}: that is no multiple of 2 x {degree}")
    tail = 2 * degree - 1 - rank
    return (rank * size, (rank + 1) * size), (tail * size, (tail + 1) * size)


class ContextAttention(nn.Module):
    """An attention core for ranks that share sequences; each calls it with its own tokens, as `cut` deals them."""

    def __init__(self, group: dist.ProcessGroup, method: str) -> None:
        """method: ring, allgather or ulysses."""
        super().__init__()
        self.group = group
        self.method = {"ring": _Ring.apply, "allgather": _AllGather.apply, "ulysses": _ulysses}[method]

    @torch.compiler.disable
    def forward(self, q: Tensor, k: Tensor, v: Tensor, *, document_ids: Documents | None = None) -> Tensor:
        """q: [batch, seq / degree, heads, head_dim]; k, v: the same with fewer heads. Returns q's shape.

        document_ids: of the whole sequences; None: each is one document.
        """
        documents = Documents.given(document_ids, q.shape[0], q.shape[1] * self.group.size())
        values: Tensor = self.method(q, k, v, documents, self.group)
        return values


def _ulysses(q: Tensor, k: Tensor, v: Tensor, documents: Documents, group: dist.ProcessGroup) -> Tensor:
    degree = group.size()
    repeats = degree // math.gcd(degree, k.shape[2])
    k, v = (x.repeat_interleave(repeats, dim=2) for x in (k, v))
    parts = zip(*(x.chunk(degree, dim=2) for x in (q, k, v)), strict=True)  # for each rank its heads of all three: one message
    heads = [x.shape[2] // degree for x in (q, k, v)]
    q, k, v = _Exchange.apply(torch.cat([x for part in parts for x in part], dim=2), group, True).split(heads, dim=2)
    whole = ((0, documents.seq_len),)
    values = attention(q, k, v, documents.tiles(whole, whole))
    back: Tensor = _Exchange.apply(values, group, False)
    return back


class _Ring(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, documents: Documents, group: dist.ProcessGroup) -> Tensor:
        rank, degree = group.rank(), group.size()
        queries = pieces(documents.seq_len, rank, degree)
        out, lse = nothing(q)
        for owner, kv in _travelling(torch.stack((k, v)), group):
            merge(out, lse, q, kv[0], kv[1], documents.tiles(queries, pieces(documents.seq_len, owner, degree)))
        out = out.to(q.dtype)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.documents, ctx.group = documents, group
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        q, k, v, out, lse = ctx.saved_tensors
        documents, group = ctx.documents, ctx.group
        degree = group.size()
        queries = pieces(documents.seq_len, group.rank(), degree)
        dq = torch.zeros(q.shape, dtype=lse.dtype, device=q.device)
        on_the_way: _Hop | None = None
        for owner, kv in _travelling(torch.stack((k, v)), group):
            dkv = torch.zeros(kv.shape, dtype=lse.dtype, device=kv.device)
            tiles = documents.tiles(queries, pieces(documents.seq_len, owner, degree))
            add_gradients((dq, dkv[0], dkv[1]), grad_out, q, kv[0], kv[1], out, lse, tiles)
            if on_the_way is not None:
                dkv += on_the_way.arrived()  # what the ranks that had this block before have added
            on_the_way = _Hop(dkv, group)
        assert on_the_way is not None
        dk, dv = on_the_way.arrived().to(k.dtype)
        return dq.to(q.dtype), dk, dv, None, None


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, documents: Documents, group: dist.ProcessGroup) -> Tensor:
        kv = _gathered(k, v, group)
        tiles = documents.tiles(pieces(documents.seq_len, group.rank(), group.size()), ((0, documents.seq_len),))
        out, lse = attend(q, kv[0], kv[1], tiles)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.tiles, ctx.group = tiles, group
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        q, k, v, out, lse = ctx.saved_tensors
        kv = _gathered(k, v, ctx.group)
        dq = torch.zeros(q.shape, dtype=lse.dtype, device=q.device)
        dkv = torch.zeros(kv.shape, dtype=lse.dtype, device=kv.device)
        add_gradients((dq, dkv[0], dkv[1]), grad_out, q, kv[0], kv[1], out, lse, ctx.tiles)
        dk, dv = reduce_scatter(_by_rank(dkv, ctx.group.size(), 2), ctx.group).to(k.dtype)
        return dq.to(q.dtype), dk, dv, None, None


class _Exchange(torch.autograd.Function):
    """All-to-all between [batch, seq / n, heads, d] and [batch, seq, heads / n, d]; backwards, the other way."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup, to_heads: bool) -> Tensor:
        ctx.group, ctx.to_heads = group, to_heads
        return _exchanged(x, group, to_heads)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _exchanged(grad, ctx.group, not ctx.to_heads), None, None


def _exchanged(x: Tensor, group: dist.ProcessGroup, to_heads: bool) -> Tensor:
    degree = group.size()
    sent = torch.stack(x.chunk(degree, dim=2) if to_heads else _by_rank(x, degree, 1))
    received = torch.empty_like(sent)
    dist.all_to_all_single(received, sent, group=group)
    parts = list(received)
    return _in_order(parts, 1) if to_heads else torch.cat(parts, dim=2)


def _gathered(k: Tensor, v: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Keys and values of all ranks, [2, batch, seq, heads, head_dim]."""
    return _in_order(all_gather(torch.stack((k, v)), group), 2)


def _by_rank(x: Tensor, degree: int, dim: int) -> list[Tensor]:
    """What each rank has of x, whose dimension dim is the whole sequence."""
    held = [pieces(x.shape[dim], rank, degree) for rank in range(degree)]
    return [torch.cat([x.narrow(dim, begin, end - begin) for begin, end in spans], dim) for spans in held]


def _in_order(parts: list[Tensor], dim: int) -> Tensor:
    """The inverse: the ranks' parts as whole sequences."""
    heads, tails = zip(*(part.chunk(2, dim) for part in parts), strict=True)
    return torch.cat((*heads, *reversed(tails)), dim)


class _Hop:
    """A tensor on its way to the next rank, while the previous rank's comes here."""

    def __init__(self, tensor: Tensor, group: dist.ProcessGroup) -> None:
        self.sent, self.received = tensor, torch.empty_like(tensor)
        there, here = (group.rank() + 1) % group.size(), (group.rank() - 1) % group.size()
        self.work = dist.batch_isend_irecv(
            [
                dist.P2POp(dist.isend, self.sent, group=group, group_peer=there),
                dist.P2POp(dist.irecv, self.received, group=group, group_peer=here),
            ]
        )

    def arrived(self) -> Tensor:
        for work in self.work:
            work.wait()
        return self.received


def _travelling(block: Tensor, group: dist.ProcessGroup) -> Iterator[tuple[int, Tensor]]:
    """Every rank's block with its owner, this rank's first; while one is in use, the next is on its way."""
    degree = group.size()
    for step in range(degree):
        hop = _Hop(block, group) if step + 1 < degree else None
        yield (group.rank() - step) % degree, block
        if hop is not None:
            block = hop.arrived()
