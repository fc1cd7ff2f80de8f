"""The fused attention ops of each device behind one pair of functions, forward and backward, with the log-sum-exp in the open.

    CPU                      _scaled_dot_product_flash_attention_for_cpu       any dtype, any head_dim, grouped heads
    CUDA, 16 bit             _flash_attention_forward (FlashAttention-2)       head_dim <= 256, a multiple of 8, grouped heads;
                                                                               many sequences packed into one call
    CUDA, float32 and rest   _scaled_dot_product_efficient_attention           head_dim a multiple of 4, equal heads, an LSE
                                                                               padded to 32

`F.scaled_dot_product_attention` runs these same ops, but keeps their log-sum-exp to itself and feeds the backward pass that
of its own keys, where titan/attention.py has to feed it the one over all keys. Here every q, k, v and out is
[batch, seq, heads, head_dim] and every lse [batch, seq, heads], or without the batch where sequences are packed; heads may
be a multiple of the heads of k and v; the scale is 1 / sqrt(head_dim); causal needs queries and keys of equal length.

The ops read raw pointers: where one of them takes a layout for granted (out and lse in the CUDA ops), it is made here.

Sources: Dao, "FlashAttention-2" (arXiv:2307.08691); Rabe and Staats, "Self-attention Does Not Need O(n^2) Memory"
(arXiv:2112.05682).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

aten = torch.ops.aten
Grads = tuple[Tensor, Tensor, Tensor]


def packs(q: Tensor) -> bool:
    """Whether packed_forward and packed_backward work for this device, dtype and head_dim."""
    wide = q.dtype in (torch.bfloat16, torch.float16) and q.shape[-1] <= 256
    return wide and q.device.type == "cuda" and torch.cuda.get_device_capability(q.device) >= (8, 0)


def forward(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
    """Attention of q to k, v, and the log-sum-exp of the scores over the keys: float32, of float64 inputs float64."""
    scale = q.shape[-1] ** -0.5
    if q.device.type == "cpu":
        q, k, v = (_rows(x).transpose(1, 2) for x in (q, k, v))
        out, lse = aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, scale=scale)
        return out.transpose(1, 2), lse.transpose(1, 2)
    width = q.shape[-1]
    if packs(q):
        q, k, v = (_padded(x) for x in (q, k, v))
        sizes = q.shape[1], k.shape[1]
        out, lse, *_ = aten._flash_attention_forward(q, k, v, None, None, *sizes, 0.0, causal, False, scale=scale)
        return out[..., :width], lse.transpose(1, 2)
    k, v = _repeated(k, q), _repeated(v, q)
    length = q.shape[1]
    q, k, v = (_padded(x).transpose(1, 2) for x in (q, k, v))
    out, lse, *_ = aten._scaled_dot_product_efficient_attention(q, k, v, None, True, 0.0, causal, scale=scale)
    return out.transpose(1, 2)[..., :width], lse[..., :length].transpose(1, 2)


def backward(grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool) -> Grads:
    """Gradients of q, k, v from these keys, out and lse being those over all keys, of which these may be a part."""
    scale = q.shape[-1] ** -0.5
    if q.device.type == "cpu":
        grad_out, q, k, v, out = (_rows(x).transpose(1, 2) for x in (grad_out, q, k, v, out))
        lse = lse.transpose(1, 2)
        op = aten._scaled_dot_product_flash_attention_for_cpu_backward
        grads = op(grad_out, q, k, v, out, lse, 0.0, causal, scale=scale)
        return tuple(x.transpose(1, 2) for x in grads)  # type: ignore[return-value]
    width = q.shape[-1]
    lse = lse.transpose(1, 2)
    if packs(q):
        grad_out, q, k, v, out = (_padded(x) for x in (grad_out, q, k, v, out))
        sizes = q.shape[1], k.shape[1]
        grads = aten._flash_attention_backward(
            grad_out, q, k, v, out, lse.contiguous(), None, None, *sizes, 0.0, causal, *_no_dropout(q), scale=scale
        )
        return tuple(x[..., :width] for x in grads)  # type: ignore[return-value]
    heads = k.shape[2]
    k, v = _repeated(k, q), _repeated(v, q)
    grad_out, q, k, v, out = (_padded(x).contiguous().transpose(1, 2) for x in (grad_out, q, k, v, out))
    lse = F.pad(lse, (0, -lse.shape[-1] % 32), value=torch.inf).contiguous()  # exp(score - inf) = 0 where there is no query
    wanted = [True, True, True, False]
    dq, dk, dv, _ = aten._scaled_dot_product_efficient_attention_backward(
        grad_out, q, k, v, None, out, lse, *_no_dropout(q), 0.0, wanted, causal, scale=scale
    )
    dq, dk, dv = (x.transpose(1, 2)[..., :width] for x in (dq, dk, dv))
    return dq, dk.unflatten(2, (heads, -1)).sum(3), dv.unflatten(2, (heads, -1)).sum(3)


def packed_forward(
    q: Tensor, k: Tensor, v: Tensor, starts_q: Tensor, starts_k: Tensor, longest: tuple[int, int], causal: bool
) -> tuple[Tensor, Tensor]:
    """Many attentions in one call: sequence i is q[starts_q[i] : starts_q[i + 1]], and k and v likewise.

    q, k, v: [tokens, heads, head_dim]. starts: int32 [sequences + 1], on the device. longest: of the queries, of the keys.
    Returns out like q, lse float32 [tokens, heads].
    """
    width, scale = q.shape[-1], q.shape[-1] ** -0.5
    q, k, v = (_padded(x) for x in (q, k, v))
    out, lse, *_ = aten._flash_attention_forward(q, k, v, starts_q, starts_k, *longest, 0.0, causal, False, scale=scale)
    return out[..., :width], lse.transpose(0, 1)


def packed_backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    starts_q: Tensor,
    starts_k: Tensor,
    longest: tuple[int, int],
    causal: bool,
) -> Grads:
    """Gradients of q, k, v of packed_forward; out and lse as for backward."""
    width, scale = q.shape[-1], q.shape[-1] ** -0.5
    grad_out, q, k, v, out = (_padded(x) for x in (grad_out, q, k, v, out))
    lse = lse.transpose(0, 1).contiguous()
    grads = aten._flash_attention_backward(
        grad_out, q, k, v, out, lse, starts_q, starts_k, *longest, 0.0, causal, *_no_dropout(q), scale=scale
    )
    return tuple(x[..., :width] for x in grads)  # type: ignore[return-value]


def _rows(x: Tensor) -> Tensor:
    """x with head_dim contiguous in memory, which is all the CPU op asks for."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _padded(x: Tensor) -> Tensor:
    """x with zeros up to a head_dim that is a multiple of 8: they change no score, and the rest is cut off afterwards."""
    return _rows(x if x.shape[-1] % 8 == 0 else F.pad(x, (0, -x.shape[-1] % 8)))


def _repeated(x: Tensor, q: Tensor) -> Tensor:
    """Keys or values with one head for each head of q."""
    return x.repeat_interleave(q.shape[2] // x.shape[2], dim=2)


def _no_dropout(q: Tensor) -> tuple[Tensor, Tensor]:
    """Random state that the CUDA ops ask for and, without dropout, do not read."""
    return torch.empty(2, dtype=torch.uint64, device=q.device), torch.empty((), dtype=torch.uint64, device=q.device)
