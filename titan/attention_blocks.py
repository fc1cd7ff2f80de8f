"""Causal attention as batched products of blocks: for bfloat16 on CPUs whose fused operation multiplies slowly.

PyTorch's fused attention for CPUs leaves bfloat16 products to MKL, unless the CPU has AMX. On one that has AVX512_BF16 alone
(AMD's Zen 4 and 5, say) they run at a seventh of the speed of oneDNN's, which `bmm` uses. So queries and keys are cut into
blocks, and block i of the queries meets blocks 0 .. i of the keys, all pairs of one distance d in one product:

    s_ij = q_i k_j / sqrt(width)       p = exp(s - largest)       o_i = sum_j p_ij v_j / sum_j p_ij           j = i - d

    dv = p^T do       dp = do v^T       ds = p (dp - sum(do o))       dq = ds k / sqrt(width)       dk = ds^T q / sqrt(width)

What lies between the products the compiler makes into one kernel each; without it this is slower than the fused operation.
`bmm` rounds scores to bfloat16, as the fused operation does not: a second product gives what was rounded off. The backward
pass makes scores anew, turned (keys x queries), so that nothing of their size is kept.

Source: as FlashAttention's, Dao et al. (arXiv:2205.14135), but that blocks are of a size for products and not for a cache.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

BLOCK = 128
BLOCKS = 8
"""At most: of long sequences blocks are larger."""
MOST_SCORES = 2**26
"""Of a micro batch in a layer. Where there are more, the fused operation, which holds none of them, computes."""


def fused_is_slow(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether PyTorch's fused attention lacks fast products on this machine."""
    if device.type != "cpu" or dtype != torch.bfloat16:
        return False
    return torch.cpu._is_avx512_bf16_supported() and not torch.cpu._is_amx_tile_supported()


class BlockAttention(nn.Module):
    """Stands in for a model's attention core while it trains; `plain`, the model's own, does what this does not: validation,
    documents, lengths that are no whole blocks."""

    def __init__(self, plain: nn.Module) -> None:
        super().__init__()
        self.plain = plain

    def forward(self, q: Tensor, k: Tensor, v: Tensor, *, document_ids: Tensor | None = None) -> Tensor:
        """q: [batch, seq, heads, width]; k, v: the same with fewer heads. Returns q's shape."""
        batch, seq, heads, _ = q.shape
        block = max(BLOCK, seq // BLOCKS)
        fits = seq % block == 0 and batch * heads * seq * seq <= MOST_SCORES
        if not self.training or not fits or document_ids is not None or k.shape[1] != seq:
            out: Tensor = self.plain(q, k, v, document_ids=document_ids)
            return out
        if (share := heads // k.shape[2]) > 1:
            k, v = k.repeat_interleave(share, dim=2), v.repeat_interleave(share, dim=2)
        values: Tensor = _Attention.apply(q, k, v, block)
        return values


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, block: int) -> Tensor:
        ctx.batch = len(q)
        q, k, v = (_cut(x, block) for x in (q, k, v))
        n = len(q)
        scores = [_scores(q[d:], k[: n - d]) for d in range(n)]
        at = torch.arange(block, device=q.device)
        scores[0] = scores[0].masked_fill(at > at[:, None], -torch.inf)
        largest = scores[0].amax(-1, keepdim=True)
        for d in range(1, n):
            largest = torch.cat((largest[:d], torch.maximum(largest[d:], scores[d].amax(-1, keepdim=True))))
        out = torch.zeros_like(q, dtype=torch.float32)
        total = torch.zeros_like(largest)
        for d in range(n):
            p = (scores[d] - largest[d:]).exp()
            total = _add(total, d, p.sum(-1, keepdim=True))
            out = _add(out, d, _product(p.to(q.dtype), v[: n - d]).float())
        out = (out / total).to(q.dtype)
        ctx.save_for_backward(q, k, v, out, largest + total.log())
        return _joined(out, ctx.batch)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> Any:
        q, k, v, out, lse = ctx.saved_tensors
        n, block, scale = len(q), q.shape[2], q.shape[-1] ** -0.5
        do, lse = _cut(d_out, block), lse.transpose(2, 3)
        delta = (do.float() * out.float()).sum(-1)[:, :, None]
        at = torch.arange(block, device=q.device)
        dq, dk, dv = (torch.zeros_like(x, dtype=torch.float32) for x in (q, k, v))
        for d in range(n):
            near = n - d
            p = (_scores(k[:near], q[d:]) - lse[d:]).exp()  # keys x queries
            if d == 0:
                p = p.masked_fill(at < at[:, None], 0)
            dp = _product(v[:near], do[d:].transpose(2, 3)).float()
            ds, p = (p * (dp - delta[d:]) * scale).to(q.dtype), p.to(q.dtype)
            dq = _add(dq, d, _product(ds.transpose(2, 3), k[:near]).float())
            dk = _add(dk, -d, _product(ds, q[d:]).float())
            dv = _add(dv, -d, _product(p, do[d:]).float())
        return *(_joined(x.to(q.dtype), ctx.batch) for x in (dq, dk, dv)), None


def _cut(x: Tensor, block: int) -> Tensor:
    """[batch, seq, heads, width] -> [blocks, batch x heads, block, width], so that any run of blocks is one piece of memory."""
    batch, seq, heads, width = x.shape
    x = x.view(batch, seq // block, block, heads, width)
    return x.permute(1, 0, 3, 2, 4).reshape(-1, batch * heads, block, width)


def _joined(x: Tensor, batch: int) -> Tensor:
    """`_cut` undone."""
    n, rows, block, width = x.shape
    return x.view(n, batch, rows // batch, block, width).permute(1, 0, 3, 2, 4).reshape(batch, n * block, -1, width)


def _product(a: Tensor, b: Tensor) -> Tensor:
    return torch.bmm(a.flatten(0, 1), b.flatten(0, 1)).unflatten(0, a.shape[:2])


def _scores(a: Tensor, b: Tensor) -> Tensor:
    """a b^T / sqrt(width), float32, as if it had not been rounded."""
    x, y = a.flatten(0, 1), b.flatten(0, 1).transpose(1, 2)
    rounded = torch.bmm(x, y)
    exact = rounded.float() + torch.baddbmm(rounded, x, y, beta=-1).float()
    return (exact * a.shape[-1] ** -0.5).unflatten(0, a.shape[:2])


def _add(to: Tensor, d: int, part: Tensor) -> Tensor:
    """to + part, where part lacks the first d blocks, or the last -d."""
    if d == 0:
        return to + part
    return torch.cat((to[:d], to[d:] + part)) if d > 0 else torch.cat((to[:d] + part, to[d:]))
