"""Attention in tiles: queries x keys is a list of rectangles, and no score outside them is ever computed.

A query q_i attends to a set of keys with weights p_ij = exp(s_ij - L_i), where s_ij = q_i k_j / sqrt(head_dim) and
L_i = log sum_j exp(s_ij), the log-sum-exp of its scores. Split the keys into two sets, A and B, and attend to each on its
own. From the two results (o_A, L_A) and (o_B, L_B) the whole one follows, without a look at any score:

    L = log(exp(L_A) + exp(L_B))
    o = exp(L_A - L) o_A + exp(L_B - L) o_B = o_A + sigmoid(L_B - L_A) (o_B - o_A)

So attention can be computed tile by tile, in any order, also over keys that arrive one block after the other. The last form
starts well from nothing (L_A = -inf gives B the weight 1), and its weights add up to one whatever is rounded.

The backward pass divides as well. With g_i the gradient of o_i:

    D_i  = sum_j p_ij (g_i v_j) = g_i o_i           ds_ij = p_ij (g_i v_j - D_i)
    dv_j = sum_i p_ij g_i        dq_i = sum_j ds_ij k_j / sqrt(head_dim)        dk_j = sum_i ds_ij q_i / sqrt(head_dim)

p_ij and ds_ij of one pair need L_i and o_i over all keys, and besides that nothing of the other keys. The fused backward op,
run on one tile with the *merged* o and L, therefore gives this tile's terms of the sums; with the tile's own o and L it would
give the gradients of another softmax. dk and dv of a head that several query heads share are sums over those, too.

On CPU each tile is a call of the fused op. On CUDA in 16 bit, tiles of one kind that have no query and no key in common are
packed into one variable-length call, so that a batch of documents costs one launch. Parts are merged, and gradients added,
in float32.

Sources: Milakov and Gimelshein, "Online normalizer calculation for softmax" (arXiv:1805.02867); Dao et al.,
"FlashAttention" (arXiv:2205.14135); Liu et al., "Ring Attention" (arXiv:2310.01889).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from titan import attention_ops as ops
from titan.documents import Documents, Tile

Grads = tuple[Tensor, Tensor, Tensor]
Index = tuple[slice, slice] | slice | Tensor


class TiledAttention(nn.Module):
    """Causal attention within documents, for a process that has whole sequences. A core like the models' own."""

    @torch.compiler.disable
    def forward(self, q: Tensor, k: Tensor, v: Tensor, *, document_ids: Documents | None = None) -> Tensor:
        """q: [batch, seq, heads, head_dim]; k, v: the same with fewer heads. Returns q's shape."""
        documents = Documents.given(document_ids, q.shape[0], q.shape[1])
        whole = ((0, q.shape[1]),)
        return attention(q, k, v, documents.tiles(whole, whole))


def attention(q: Tensor, k: Tensor, v: Tensor, tiles: Sequence[Tile]) -> Tensor:
    """Attention as the tiles say, with gradients. Shapes as for `attend`."""
    values: Tensor = _Attention.apply(q, k, v, tiles)
    return values


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, tiles: Sequence[Tile]) -> Tensor:
        out, lse = attend(q, k, v, tiles)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.tiles = tiles
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        q, k, v, out, lse = ctx.saved_tensors
        return *attend_backward(grad_out, q, k, v, out, lse, ctx.tiles), None


def attend(q: Tensor, k: Tensor, v: Tensor, tiles: Sequence[Tile]) -> tuple[Tensor, Tensor]:
    """Attention of q [batch, seq_q, heads, head_dim] to k, v [batch, seq_k, kv_heads, head_dim] as the tiles say. No autograd.

    Returns out like q, and lse float32 [batch, seq_q, heads]. A query in no tile has out 0 and lse -inf.
    """
    calls = _calls(tiles, q, k)
    if len(calls) == 1 and calls[0].is_everything(q, k):
        out, lse = calls[0].forward(q, k, v)
        return out.view(q.shape), lse.view(q.shape[:3])
    out, lse = nothing(q)
    for call in calls:
        call.merge(out, lse, q, k, v)
    return out.to(q.dtype), lse


def attend_backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, tiles: Sequence[Tile]
) -> Grads:
    """Gradients of q, k and v, in their shapes and dtypes. out, lse: what attend returned, or more parts merged."""
    calls = _calls(tiles, q, k)
    if len(calls) == 1 and calls[0].is_everything(q, k):
        dq, dk, dv = calls[0].backward(grad_out, q, k, v, out, lse)
        return dq.view(q.shape), dk.view(k.shape), dv.view(v.shape)
    dq, dk, dv = (torch.zeros(x.shape, dtype=lse.dtype, device=x.device) for x in (q, k, v))
    for call in calls:
        call.add_gradients((dq, dk, dv), grad_out, q, k, v, out, lse)
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)


def nothing(q: Tensor) -> tuple[Tensor, Tensor]:
    """out and lse of queries that attended to no key yet: zeros and -inf, in float32 (for float64, in float64)."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    out = torch.zeros(q.shape, dtype=dtype, device=q.device)
    return out, torch.full(q.shape[:3], -torch.inf, dtype=dtype, device=q.device)


def merge(out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, tiles: Sequence[Tile]) -> None:
    """Let the queries attend to these keys as well, in place. out, lse: from `nothing`, or merged with other keys before."""
    for call in _calls(tiles, q, k):
        call.merge(out, lse, q, k, v)


def add_gradients(
    into: Grads, grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, tiles: Sequence[Tile]
) -> None:
    """Add these tiles' terms to the gradients of q, k and v, in place; those are contiguous and of lse's dtype."""
    for call in _calls(tiles, q, k):
        call.add_gradients(into, grad_out, q, k, v, out, lse)


class _Packing(NamedTuple):
    """Sequences one after the other: where each begins and the last ends, int32, and the longest one's length."""

    starts_q: Tensor
    starts_k: Tensor
    longest: tuple[int, int]


class _Call:
    """One run of a fused op: on a tile, or on several packed one after the other."""

    def __init__(self, q: Index, k: Index, causal: bool, packing: _Packing | None = None) -> None:
        self.q, self.k, self.causal, self.packing = q, k, causal, packing

    def is_everything(self, q: Tensor, k: Tensor) -> bool:
        return _is_all(self.q, q) and _is_all(self.k, k)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """out and lse of its part of the whole q."""
        q, k, v = _take(q, self.q), _take(k, self.k), _take(v, self.k)
        if self.packing is None:
            return ops.forward(q, k, v, self.causal)
        return ops.packed_forward(q, k, v, *self.packing, self.causal)

    def backward(self, grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor) -> Grads:
        """Gradients of its part of the whole q, k and v."""
        grad_out, q, out, lse = (_take(x, self.q) for x in (grad_out, q, out, lse))
        k, v = _take(k, self.k), _take(v, self.k)
        if self.packing is None:
            return ops.backward(grad_out, q, k, v, out, lse, self.causal)
        return ops.packed_backward(grad_out, q, k, v, out, lse, *self.packing, self.causal)

    def merge(self, out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor) -> None:
        more, more_lse = self.forward(q, k, v)
        old, old_lse = _take(out, self.q), _take(lse, self.q)
        weight = torch.sigmoid(more_lse - old_lse)[..., None]
        _put(out, self.q, torch.lerp(old, more.to(old.dtype), weight))
        _put(lse, self.q, torch.logaddexp(old_lse, more_lse))

    def add_gradients(self, into: Grads, grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor) -> None:
        more = self.backward(grad_out, q, k, v, out, lse)
        for whole, index, part in zip(into, (self.q, self.k, self.k), more, strict=True):
            _put(whole, index, _take(whole, index) + part)


def _calls(tiles: Sequence[Tile], q: Tensor, k: Tensor) -> list[_Call]:
    """The calls that compute the tiles; no two of one packed call have a query or a key in common."""
    if not ops.packs(q):
        return [_single(tile) for tile in tiles]
    rounds: list[tuple[dict[int, tuple[int, int]], list[Tile]]] = []
    for tile in sorted(tiles, key=lambda tile: tile.causal):  # stable: within a kind as they came, which is ascending
        for reached, members in rounds:
            after = all(
                ends[0] <= tile.q[0] and ends[1] <= tile.k[0] for row in range(*tile.rows) if (ends := reached.get(row))
            )
            if after and members[0].causal == tile.causal:
                break
        else:
            reached, members = {}, []
            rounds.append((reached, members))
        members.append(tile)
        reached.update(dict.fromkeys(range(*tile.rows), (tile.q[1], tile.k[1])))
    return [_single(members[0]) if len(members) == 1 else _packed(members, q, k) for _, members in rounds]


def _single(tile: Tile) -> _Call:
    rows = slice(*tile.rows)
    return _Call((rows, slice(*tile.q)), (rows, slice(*tile.k)), tile.causal)


def _packed(tiles: Sequence[Tile], q: Tensor, k: Tensor) -> _Call:
    sequences = sorted((row, tile) for tile in tiles for row in range(*tile.rows))
    spans_q = [(row * q.shape[1] + tile.q[0], tile.q[1] - tile.q[0]) for row, tile in sequences]
    spans_k = [(row * k.shape[1] + tile.k[0], tile.k[1] - tile.k[0]) for row, tile in sequences]
    (index_q, starts_q), (index_k, starts_k) = _packed_side(spans_q, q.device), _packed_side(spans_k, q.device)
    longest = max(length for _, length in spans_q), max(length for _, length in spans_k)
    return _Call(index_q, index_k, tiles[0].causal, _Packing(starts_q, starts_k, longest))


def _packed_side(spans: list[tuple[int, int]], device: torch.device) -> tuple[Index, Tensor]:
    """Sequences of tokens [batch * seq], as (begin, length): which tokens those are, and where each starts once packed."""
    starts = [0, *accumulate(length for _, length in spans)]
    moves = [begin - start for (begin, _), start in zip(spans, starts, strict=False)]
    # The host does not wait for the copy. One number more than sequences, for both to be one tensor.
    starts_there, moves_there = torch.tensor([starts, [*moves, 0]], dtype=torch.int32).to(device, non_blocking=True)
    if len(set(moves)) == 1:  # packed as they lie
        return slice(moves[0], moves[0] + starts[-1]), starts_there
    shift = moves_there[:-1].repeat_interleave(starts_there.diff(), output_size=starts[-1])
    return torch.arange(starts[-1], device=device) + shift, starts_there


def _rows(x: Tensor, index: Index) -> Tensor:
    """[batch, seq, ...] for a tile's slices, else [batch * seq, ...]."""
    return x if isinstance(index, tuple) else x.flatten(0, 1)


def _take(x: Tensor, index: Index) -> Tensor:
    return _rows(x, index)[index]


def _put(x: Tensor, index: Index, value: Tensor) -> None:
    _rows(x, index)[index] = value  # x is contiguous: flattened, it is still x


def _is_all(index: Index, x: Tensor) -> bool:
    if isinstance(index, tuple):
        return index == (slice(0, x.shape[0]), slice(0, x.shape[1]))
    return index == slice(0, x.shape[0] * x.shape[1]) if isinstance(index, slice) else False
