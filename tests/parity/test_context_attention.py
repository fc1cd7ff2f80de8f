"""Context parallel attention: ranks that share sequences compute, forward and backward, what one process computes."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.utils.checkpoint import checkpoint

from titan.attention import TiledAttention
from titan.documents import Documents
from titan.models.llama3.config import Config
from titan.models.llama3.model import Transformer
from titan.parallel.context import ContextAttention, cut, offsets
from titan.pool import Pool

METHODS = ("ring", "allgather", "ulysses")
CONFIG = Config(dim=48, n_layers=2, n_heads=12, n_kv_heads=4, ffn_dim=64, vocab_size=64)


class Case(NamedTuple):
    method: str
    heads: int
    kv_heads: int
    chunk: int
    """Tokens of one of the 2 x degree chunks."""
    document_starts: float
    """Chance that a token starts a document; 0: no documents are given."""
    dtype: torch.dtype = torch.float32


def cases(degree: int) -> list[Case]:
    found = [
        Case(method, degree * group, kv_heads, chunk, starts)
        for method in METHODS
        for group, kv_heads, chunk in ((1, degree, 1), (2, 1, 7), (4, 2 * degree, 4))
        for starts in (0, 0.1, 1)
    ]
    found += [Case(method, 7 * 12, 6, 3, 0.1) for method in METHODS]  # at degree 4, key heads that go neither way
    if degree > 2:
        found += [Case(method, 5, 5, 3, 0.1) for method in METHODS[:2]]  # heads that the ranks could not share
    return found


def tensors(case: Case, seed: int, degree: int) -> tuple[list[Tensor], Documents | None]:
    """q, k, v and the gradient of the values, for whole sequences, and their documents."""
    source = torch.Generator().manual_seed(seed)
    seq_len = 2 * degree * case.chunk
    shapes = [(2, seq_len, heads, 8) for heads in (case.heads, case.kv_heads, case.kv_heads, case.heads)]
    made = [torch.randn(*shape, generator=source).to(case.dtype) for shape in shapes]
    ids = (torch.rand(2, seq_len, generator=source) < case.document_starts).long().cumsum(1)
    return made, Documents.of(ids) if case.document_starts else None


def one_process(case: Case, seed: int, degree: int, dtype: torch.dtype) -> list[Tensor]:
    """Values and gradients of q, k, v, computed in this dtype."""
    made, documents = tensors(case, seed, degree)
    leaves = [x.to(dtype).requires_grad_() for x in made[:3]]
    values = TiledAttention()(*leaves, document_ids=documents)
    return [values.detach(), *torch.autograd.grad(values, leaves, made[3].to(dtype))]


def ranks(rank: int, some: list[Case], seed: int, degree: int) -> list[list[Tensor]]:
    """On a worker: this rank's part of the same, for each case."""
    groups = init_device_mesh("cpu", (dist.get_world_size() // degree, degree), mesh_dim_names=("others", "cp"))
    group = groups["cp"].get_group()
    found = []
    for case in some:
        made, documents = tensors(case, seed, degree)
        q, k, v, grad = (x[:, offsets(x.shape[1], group.rank(), degree)] for x in made)
        leaves = [x.requires_grad_() for x in (q, k, v)]
        values = ContextAttention(group, case.method)(*leaves, document_ids=documents)
        found.append([values.detach(), *torch.autograd.grad(values, leaves, grad)])
    return found


def joined(parts: list[list[Tensor]]) -> list[Tensor]:
    """Whole sequences from the ranks' parts."""
    whole = []
    for same in zip(*parts, strict=True):
        places = torch.cat([offsets(len(same) * same[0].shape[1], rank, len(same)) for rank in range(len(same))])
        whole.append(torch.cat(same, dim=1)[:, places.argsort()])
    return whole


def far(got: Tensor, wanted: Tensor) -> float:
    return ((got - wanted).double().norm() / wanted.double().norm()).item()


@pytest.mark.parametrize("degree", [2, 3, 4])
def test_ranks_compute_what_one_process_computes(pool: Pool, degree: int) -> None:
    some = cases(degree)
    parts = pool.run(degree, ranks, some, 1, degree)
    for number, case in enumerate(some):
        wanted = one_process(case, 1, degree, torch.float32)
        for name, got, want in zip(("values", "dq", "dk", "dv"), joined([part[number] for part in parts]), wanted, strict=True):
            if case.document_starts == 1 and name in ("dq", "dk"):  # a softmax over one key: no gradient but rounding
                assert max(got.abs().max(), want.abs().max()) < 1e-5
            else:
                assert far(got, want) < 1e-6, (name, case)


def test_two_groups_at_once(pool: Pool) -> None:
    """Ranks of a group are not the ranks of the world."""
    some = [Case(method, 4, 2, 5, 0.1) for method in METHODS]
    parts = pool.run(4, ranks, some, 2, 2)
    for number, case in enumerate(some):
        for pair in (parts[:2], parts[2:]):
            for got, want in zip(joined([part[number] for part in pair]), one_process(case, 2, 2, torch.float32), strict=True):
                assert far(got, want) < 1e-6, case


def test_bfloat16_is_no_worse_than_in_one_process(pool: Pool) -> None:
    some = [Case(method, 8, 4, 16, starts, torch.bfloat16) for method in METHODS for starts in (0, 0.05)]
    parts = pool.run(4, ranks, some, 3, 4)
    for number, case in enumerate(some):
        exact = one_process(case, 3, 4, torch.float64)
        alone = one_process(case, 3, 4, torch.bfloat16)
        for got, single, want in zip(joined([part[number] for part in parts]), alone, exact, strict=True):
            assert got.dtype == torch.bfloat16
            assert far(got, want) < 1.2 * far(single, want), case


def test_cut_gives_each_token_to_one_rank_with_its_label_and_position() -> None:
    tokens = torch.randint(1000, (3, 24), generator=torch.Generator().manual_seed(1))
    batch = {"tokens": tokens, "labels": tokens + 1, "positions": torch.arange(24).expand(3, 24), "document_ids": tokens // 500}
    for degree in (1, 2, 3, 4, 6):
        parts = [cut(batch, rank, degree) for rank in range(degree)]
        for rank, part in enumerate(parts):
            assert torch.equal(part["positions"], offsets(24, rank, degree).expand(3, -1))
            assert torch.equal(part["tokens"], tokens[:, offsets(24, rank, degree)])
            assert torch.equal(part["labels"], part["tokens"] + 1)
            assert torch.equal(part["document_ids"], batch["document_ids"])
        for name in ("tokens", "labels", "positions"):
            assert torch.equal(joined([[part[name]] for part in parts])[0], batch[name])
    with pytest.raises(ValueError, match=r"5 ranks.*24.*2 x 5"):
        cut(batch, 0, 5)


def test_causal_work_is_even() -> None:
    """The number of keys that a rank's queries see differs by no more than it must."""
    for degree in (2, 3, 8):
        seen = [int((offsets(16 * degree, rank, degree) + 1).sum()) for rank in range(degree)]
        assert len(set(seen)) == 1


def model_gradients(rank: int, degree: int, method: str, how: str, documents: bool) -> dict[str, Tensor]:
    """Summed loss and gradients of a Llama, the ranks of a group sharing its sequences; one rank: the model as it is."""
    torch.manual_seed(7)
    model = Transformer(CONFIG)
    model.init_weights()
    source = torch.Generator().manual_seed(8)
    tokens = torch.randint(64, (2, 25), generator=source)
    ids = (torch.rand(2, 24, generator=source) < 0.15).long().cumsum(1)
    first = torch.stack([torch.searchsorted(row, row) for row in ids]) if documents else 0
    batch = {"tokens": tokens[:, :-1], "labels": tokens[:, 1:], "positions": (torch.arange(24) - first).expand(2, 24)}
    document_ids: Any = ids if documents else None
    if degree > 1:
        group = init_device_mesh("cpu", (degree,), mesh_dim_names=("cp",)).get_group()
        batch = cut(batch, rank, degree)
        document_ids = Documents.of(ids) if documents else None
    blocks: Any = model.layers.values()
    for block in blocks:
        if degree > 1:
            block.attention.core = ContextAttention(group, method)
        if how == "recompute":
            block.forward = lambda *args, forward=block.forward, **more: checkpoint(forward, *args, use_reentrant=False, **more)
        if how == "compile":
            block.compile(backend="aot_eager")
    loss = model(**batch, document_ids=document_ids)
    loss.backward()
    found = {"loss": loss.detach()} | {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    if degree > 1:
        for tensor in found.values():
            dist.all_reduce(tensor, group=group)
    return found


@pytest.mark.parametrize(
    ("degree", "method", "how", "documents"),
    [
        (2, "ring", "recompute", True),
        (3, "ring", "plain", True),
        (4, "allgather", "recompute", True),
        (2, "ulysses", "compile", True),
        (4, "ulysses", "recompute", False),
    ],
)
def test_a_model_that_shares_its_sequences(pool: Pool, degree: int, method: str, how: str, documents: bool) -> None:
    wanted = model_gradients(0, 1, method, "plain", documents)
    for got in pool.run(degree, model_gradients, degree, method, how, documents):
        assert got.keys() == wanted.keys()
        for name, want in wanted.items():
            assert far(got[name], want) < 2e-6, name
