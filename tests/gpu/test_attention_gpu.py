"""The fused ops of a GPU against those of the CPU in float64, tiles and all. Skipped without a GPU."""

from __future__ import annotations

import pytest
import torch

from titan import attention_ops as ops
from titan.attention import attend, attend_backward
from titan.documents import Documents, Tile

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
SEQ_LEN = 384


def tiles(kind: str) -> tuple[Tile, ...]:
    """Of 3 rows: whole sequences, documents (many of one token), what a rank of a ring meets, and gathered keys."""
    starts = torch.rand(3, SEQ_LEN, generator=torch.Generator().manual_seed(1)) < 0.05
    starts[1, 40:60] = True
    documents = Documents.of(starts.long().cumsum(1))
    head, tail = (0, SEQ_LEN // 2), (3 * SEQ_LEN // 2, 2 * SEQ_LEN)
    return {
        "whole": Documents.whole(3, SEQ_LEN).tiles(((0, SEQ_LEN),), ((0, SEQ_LEN),)),
        "documents": documents.tiles(((0, SEQ_LEN),), ((0, SEQ_LEN),)),
        "ring": Documents.whole(3, 2 * SEQ_LEN).tiles((head, tail), ((head[1], tail[0]),)),
        "gathered": documents.tiles(((48, 96), (288, 336)), ((0, SEQ_LEN),)),
    }[kind]


@pytest.mark.parametrize("kind", ["whole", "documents", "ring", "gathered"])
@pytest.mark.parametrize("width", [64, 20])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 2e-2), (torch.float16, 3e-3)])
def test_the_gpu_computes_what_the_cpu_computes(kind: str, width: int, dtype: torch.dtype, tolerance: float) -> None:
    some = tiles(kind)
    source = torch.Generator().manual_seed(2)
    seq_q, seq_k = max(tile.q[1] for tile in some), max(tile.k[1] for tile in some)
    shapes = [(3, seq_q, 8, width), (3, seq_k, 2, width), (3, seq_k, 2, width), (3, seq_q, 8, width)]
    q, k, v, grad_out = (torch.randn(*shape, generator=source).to(dtype) for shape in shapes)
    wanted, wanted_lse = attend(q.double(), k.double(), v.double(), some)
    gradients = attend_backward(grad_out.double(), q.double(), k.double(), v.double(), wanted, wanted_lse, some)
    q, k, v, grad_out = (x.cuda() for x in (q, k, v, grad_out))
    assert ops.packs(q) == (dtype != torch.float32)
    out, lse = attend(q, k, v, some)
    torch.testing.assert_close(lse.cpu().double(), wanted_lse, rtol=tolerance, atol=tolerance)
    for got, want in zip((out, *attend_backward(grad_out, q, k, v, out, lse, some)), (wanted, *gradients), strict=True):
        assert (got.cpu().double() - want).norm() / want.norm() < tolerance
