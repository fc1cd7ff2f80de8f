"""Attention in tiles against scores written out in float64."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from titan import attention_ops as ops
from titan.attention import TiledAttention, attend, attend_backward
from titan.documents import Documents, Tile
from titan.models.llama3.model import AttentionCore


def dense(q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
    """out and lse in float64, scores and all. seen: bool [batch, seq_q, seq_k]."""
    q, k, v = (x.double() for x in (q, k, v))
    k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], dim=2) for x in (k, v))
    scores = torch.einsum("bihd,bjhd->bhij", q, k) / math.sqrt(q.shape[-1])
    scores = scores.masked_fill(~seen[:, None], -torch.inf)
    lse = scores.logsumexp(-1)
    weights = (scores - lse.masked_fill(lse == -torch.inf, 0)[..., None]).exp()
    return torch.einsum("bhij,bjhd->bihd", weights, v), lse.transpose(1, 2)


def mask(tiles: Sequence[Tile], batch: int, seq_q: int, seq_k: int) -> Tensor:
    seen = torch.zeros(batch, seq_q, seq_k, dtype=torch.int)
    for (r0, r1), (q0, q1), (k0, k1), causal in tiles:
        block = torch.ones(q1 - q0, k1 - k0, dtype=torch.int)
        seen[r0:r1, q0:q1, k0:k1] += block.tril() if causal else block
    assert seen.max() <= 1, "tiles overlap"
    return seen.bool()


def same_document(ids: Tensor) -> Tensor:
    return (ids[:, :, None] == ids[:, None, :]).tril()


def random_ids(seed: int, batch: int, seq_len: int, starts: float) -> Tensor:
    """Documents that start anywhere with this chance."""
    return (torch.rand(batch, seq_len, generator=torch.Generator().manual_seed(seed)) < starts).long().cumsum(1)


def inputs(
    seed: int, batch: int, seq_q: int, seq_k: int, heads: int, kv_heads: int, width: int, dtype: torch.dtype
) -> list[Tensor]:
    """q, k, v and the gradient of the values."""
    shapes = [(seq_q, heads), (seq_k, kv_heads), (seq_k, kv_heads), (seq_q, heads)]
    source = torch.Generator().manual_seed(seed)
    return [torch.randn(batch, *shape, width, generator=source).to(dtype) for shape in shapes]


def far(got: Tensor, wanted: Tensor) -> float:
    """Largest difference, relative to the largest value; values that cancel to nothing count as 1, the size of the inputs."""
    assert got.shape == wanted.shape
    return ((got.double() - wanted).abs().max() / wanted.abs().max().clamp(min=1)).item()


def check(tiles: Sequence[Tile], tensors: list[Tensor], tolerance: float) -> None:
    """attend and attend_backward against `dense` and its autograd."""
    q, k, v, grad_out = tensors
    leaves = [x.double().requires_grad_() for x in (q, k, v)]
    wanted, wanted_lse = dense(leaves[0], leaves[1], leaves[2], mask(tiles, q.shape[0], q.shape[1], k.shape[1]))
    gradients = torch.autograd.grad(wanted, leaves, grad_out.double())
    out, lse = attend(q, k, v, tiles)
    assert out.dtype == q.dtype
    empty = wanted_lse == -torch.inf
    assert torch.equal(lse == -torch.inf, empty)
    assert not out[empty].any()
    assert far(out, wanted) < tolerance
    assert far(lse.masked_fill(empty, 0), wanted_lse.masked_fill(empty, 0)) < tolerance
    for got, x, gradient in zip(attend_backward(grad_out, q, k, v, out, lse, tiles), (q, k, v), gradients, strict=True):
        assert got.dtype == x.dtype
        assert far(got, gradient) < tolerance


def random_tiles(source: random.Random, batch: int, seq_q: int, seq_k: int) -> list[Tile]:
    """Rectangles and causal squares that overlap in queries and in keys, but in no pair of the two."""
    tiles: list[Tile] = []
    taken = torch.zeros(batch, seq_q, seq_k, dtype=torch.bool)
    for _ in range(source.randint(1, 12)):
        rows, q, k = (tuple(sorted(source.sample(range(n + 1), 2))) for n in (batch, seq_q, seq_k))
        causal = source.random() < 0.5
        if causal:
            size = min(q[1] - q[0], k[1] - k[0])
            q, k = (q[0], q[0] + size), (k[0], k[0] + size)
        area = taken[slice(*rows), slice(*q), slice(*k)]
        if not area.any():
            area.fill_(True)
            tiles.append(Tile(rows, q, k, causal))  # type: ignore[arg-type]
    return tiles


@pytest.fixture
def packed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The variable-length ops of CUDA, written out, where their layout of sequences is made for CPU tensors. Counts calls."""
    calls: list[int] = []

    def each(starts_q: Tensor, starts_k: Tensor, longest: tuple[int, int]) -> list[tuple[slice, slice]]:
        assert starts_q.dtype == starts_k.dtype == torch.int32
        assert (starts_q.diff().max(), starts_k.diff().max()) == longest
        calls.append(len(starts_q) - 1)
        edges = [starts_q[:-1], starts_q[1:], starts_k[:-1], starts_k[1:]]
        return [(slice(a, b), slice(c, d)) for a, b, c, d in zip(*(x.tolist() for x in edges), strict=True)]

    def forward(q: Tensor, k: Tensor, v: Tensor, starts_q: Tensor, starts_k: Tensor, longest: Any, causal: bool) -> Any:
        parts = [ops.forward(q[None, i], k[None, j], v[None, j], causal) for i, j in each(starts_q, starts_k, longest)]
        return torch.cat([o[0] for o, _ in parts]), torch.cat([lse[0] for _, lse in parts])

    def backward(
        g: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
        starts_q: Tensor, starts_k: Tensor, longest: Any, causal: bool,
    ) -> Any:  # fmt: skip
        parts = [
            ops.backward(g[None, i], q[None, i], k[None, j], v[None, j], out[None, i], lse[None, i], causal)
            for i, j in each(starts_q, starts_k, longest)
        ]
        return tuple(torch.cat([part[n][0] for part in parts]) for n in range(3))

    monkeypatch.setattr(ops, "packs", lambda q: True)
    monkeypatch.setattr(ops, "packed_forward", forward)
    monkeypatch.setattr(ops, "packed_backward", backward)
    return calls


@pytest.mark.parametrize("seed", range(20))
def test_random_tiles(seed: int) -> None:
    source = random.Random(seed)
    batch, seq_q, seq_k = source.randint(1, 3), source.randint(1, 40), source.randint(1, 40)
    kv_heads, group = source.choice([(1, 4), (2, 2), (3, 1), (2, 3)])
    width = source.choice([1, 4, 5, 16])
    tiles = random_tiles(source, batch, seq_q, seq_k)
    check(tiles, inputs(seed, batch, seq_q, seq_k, kv_heads * group, kv_heads, width, torch.float32), 2e-6)


@pytest.mark.parametrize("seed", range(20))
def test_packed_tiles_are_the_tiles(seed: int, packed: list[int]) -> None:
    source = random.Random(seed)
    batch, seq_q, seq_k = source.randint(1, 3), source.randint(2, 40), source.randint(2, 40)
    check(random_tiles(source, batch, seq_q, seq_k), inputs(seed, batch, seq_q, seq_k, 4, 2, 8, torch.float32), 2e-6)


@pytest.mark.parametrize("starts", [0.02, 0.2, 1.0])
def test_a_batch_of_documents_is_one_packed_call(packed: list[int], starts: float) -> None:
    ids = random_ids(5, 3, 50, starts)
    documents = Documents.of(ids)
    tiles = documents.tiles(((0, 50),), ((0, 50),))
    check(tiles, inputs(0, 3, 50, 50, 4, 2, 8, torch.float32), 2e-6)
    assert packed == [sum(len(row) for row in documents.rows)] * 2


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 2e-2), (torch.float64, 1e-13)])
def test_documents_of_one_token_and_more(dtype: torch.dtype, tolerance: float) -> None:
    ids = torch.cat((torch.tensor([[0, 1, 2, 2], [7, 7, 7, 7]]).repeat_interleave(4, 1), torch.tensor([[3], [9]])), dim=1)
    ids = torch.cat((ids, random_ids(1, 2, 17, 0.4)), dim=0)
    tiles = Documents.of(ids).tiles(((0, 17),), ((0, 17),))
    assert torch.equal(mask(tiles, 4, 17, 17), same_document(ids))
    check(tiles, inputs(3, 4, 17, 17, 4, 2, 8, dtype), tolerance)


@pytest.mark.parametrize("seed", range(10))
def test_tiles_of_pieces_are_the_pieces_of_the_mask(seed: int) -> None:
    """Any way to give chunks of a sequence to holders: the tiles between two of them are their part of the document mask."""
    source = random.Random(seed)
    size, chunks = source.randint(1, 6), source.randint(2, 8)
    ids = random_ids(seed, 3, size * chunks, source.choice([0.02, 0.2, 0.7]))
    documents, seen = Documents.of(ids), same_document(ids)
    order = source.sample(range(chunks), chunks)
    half = source.randint(1, chunks - 1)
    holders = [tuple((c * size, (c + 1) * size) for c in sorted(part)) for part in (order[:half], order[half:])]
    for queries in holders:
        for keys in (*holders, ((0, size * chunks),)):
            places_q, places_k = (torch.cat([torch.arange(*span) for span in held]) for held in (queries, keys))
            got = mask(documents.tiles(queries, keys), 3, len(places_q), len(places_k))
            assert torch.equal(got, seen[:, places_q][:, :, places_k])


def test_equal_rows_and_neighbours_share_a_tile() -> None:
    whole = Documents.whole(4, 32)
    assert whole.tiles(((0, 32),), ((0, 32),)) == (Tile((0, 4), (0, 32), (0, 32), True),)
    assert whole.tiles(((4, 8), (16, 20)), ((4, 8), (16, 20))) == (Tile((0, 4), (0, 8), (0, 8), True),)
    assert whole.tiles(((4, 8), (16, 20)), ((0, 4), (20, 24))) == (Tile((0, 4), (0, 8), (0, 4), False),)
    assert whole.tiles(((0, 4), (20, 24)), ((4, 8), (16, 20))) == (Tile((0, 4), (4, 8), (0, 8), False),)


def test_inputs_in_any_memory_layout() -> None:
    tiles = Documents.of(random_ids(2, 2, 24, 0.2)).tiles(((0, 24),), ((0, 24),))
    strange = [x.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0) for x in inputs(4, 2, 24, 24, 4, 2, 8, torch.float32)]
    assert all(x.stride(-1) != 1 for x in strange)
    strange[3] = strange[3][:1, :1, :, :1].expand(2, 24, 4, 8)  # as the backward pass of a sum gives it
    check(tiles, strange, 2e-6)
    check((Tile((0, 2), (0, 24), (0, 24), True),), strange, 2e-6)


@pytest.mark.parametrize("masked", [False, True])
def test_the_module_is_the_models_own_core(masked: bool) -> None:
    ids = random_ids(6, 2, 33, 0.2) if masked else None
    q, k, v, grad_out = inputs(7, 2, 33, 33, 4, 2, 8, torch.float32)
    results = []
    for core, documents in ((AttentionCore(), ids), (TiledAttention(), None if ids is None else Documents.of(ids))):
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        values = core(*leaves, document_ids=documents)
        results.append([values, *torch.autograd.grad(values, leaves, grad_out)])
    for wanted, got in zip(*results, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6)


def test_documents_of_another_batch_are_refused() -> None:
    q, k, v, _ = inputs(0, 2, 8, 8, 2, 2, 4, torch.float32)
    with pytest.raises(ValueError, match=r"\[3, 8\].*\[2, 8\]"):
        TiledAttention()(q, k, v, document_ids=Documents.whole(3, 8))


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(16, 32)
        self.core = TiledAttention()

    def forward(self, h: Tensor, *, document_ids: Documents | None = None) -> Tensor:
        q, k, v = self.mix(h).unflatten(-1, (-1, 4)).split([4, 2, 2], dim=2)
        return h + self.core(q, k, v, document_ids=document_ids).flatten(2)


def test_under_recompute_and_compile() -> None:
    """Recompute with other calls of the same module in between; compile without a new graph for each batch's documents."""
    torch.manual_seed(0)
    batches = [(torch.randn(2, 12, 16), Documents.of(random_ids(seed, 2, 12, 0.3))) for seed in range(12)]
    layer = Layer()

    def gradients(recompute: bool) -> list[Tensor]:
        layer.zero_grad()
        outputs = []
        for h, documents in batches:
            for _ in range(2):
                run = lambda h, documents=documents: layer(h, document_ids=documents)  # noqa: E731
                h = checkpoint(run, h, use_reentrant=False) if recompute else run(h)
            outputs.append(h)
        torch.stack(outputs).square().sum().backward()
        return [p.grad.clone() for p in layer.parameters() if p.grad is not None]

    wanted = gradients(recompute=False)
    for got, want in zip(gradients(recompute=True), wanted, strict=True):
        assert torch.equal(got, want)
    layer.compile(backend="aot_eager")
    with torch._dynamo.config.patch(recompile_limit=3, fail_on_recompile_limit_hit=True):
        for recompute in (False, True):
            for got, want in zip(gradients(recompute), wanted, strict=True):
                torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("width", [8, 20])
def test_the_calls_to_the_cuda_ops_fit_their_schemas(monkeypatch: pytest.MonkeyPatch, width: int) -> None:
    """On the meta device, where the ops check arguments and give shapes: no proof of numbers, which tests/gpu has."""
    for wide in (True, False):
        monkeypatch.setattr(ops, "packs", lambda q, wide=wide: wide)
        q, k, v, grad_out = (x.to("meta") for x in inputs(0, 2, 12, 16, 4, 2, width, torch.bfloat16))
        out, lse = ops.forward(q, k, v, False)
        assert (out.shape, lse.shape) == (q.shape, q.shape[:3])
        assert [x.shape for x in ops.backward(grad_out, q, k, v, out, lse, False)] == [q.shape, k.shape, v.shape]
    q, k, v, grad_out = (x.flatten(0, 1) for x in (q, k, v, grad_out))
    starts = torch.empty(2, 3, dtype=torch.int32, device="meta")
    out, lse = ops.packed_forward(q, k, v, starts[0], starts[1], (21, 23), False)
    assert (out.shape, lse.shape) == (q.shape, q.shape[:2])
    grads = ops.packed_backward(grad_out, q, k, v, out, lse, starts[0], starts[1], (21, 23), False)
    assert [x.shape for x in grads] == [q.shape, k.shape, v.shape]
