"""What a plan and one process could get wrong alike, or what the plans' suite does not look at: references made another way."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from plans import small
from torch import Tensor

from titan import verify
from titan.build import build
from titan.config import Config, degrees
from titan.layout import local
from titan.parallel import data
from titan.parallel.mesh import Mesh, make_mesh
from titan.pool import Pool


def part_of_a_batch(mesh: Mesh) -> tuple[dict[str, Tensor], int]:
    """This rank's part of 8 sequences, of which some labels do not count, one row's not at all; and how many count."""
    tokens = torch.randint(257, (8, 33), generator=torch.Generator().manual_seed(1))
    labels = tokens[:, 1:].clone()
    labels[:, 27:] = -100
    labels[7] = -100
    mine = {"tokens": tokens[:, :-1], "labels": labels}
    return {key: value.chunk(mesh.data_degree)[mesh.data_rank] for key, value in mine.items()}, int((labels != -100).sum())


@pytest.mark.parametrize("model", ["llama3", "gpt2"])
@pytest.mark.parametrize("plan", ["tp=2", "pp=2", "pp=2,pp_schedule=Interleaved1F1B", "dp_shard=2,cp=2"])
def test_validation_after_a_step_sees_the_new_weights(pool: Pool, short_documents: Path, plan: str, model: str) -> None:
    words = ["--model.tied_embeddings=true"]
    ((loss, validation),) = pool.run(1, stepped, small(short_documents, "tp=1", model, *words))
    config = small(short_documents, plan, model, *words)
    got = pool.run(degrees(config.parallel, 1).world, stepped, config)
    assert sum(share for share, _ in got) == pytest.approx(loss, rel=1e-6)
    assert sum(share for _, share in got) == pytest.approx(validation, rel=1e-5)


def stepped(rank: int, config: Config) -> tuple[float, float]:
    """On a worker: shares of a training step's loss, and of the summed loss under the new weights. Biases are not zero."""
    mesh = make_mesh("cpu", degrees(config.parallel, dist.get_world_size()), 30)
    parts = build(config, torch.device("cpu"), mesh)
    batch, valid = part_of_a_batch(mesh)
    with torch.no_grad():
        for name, parameter in parts.model.named_parameters():
            parameter.mul_(3)
            if name.endswith("bias"):
                parameter.fill_(0.1)
    loss = parts.step.forward_backward(dict(batch), valid, 1).item()
    for group in parts.optimizer.param_groups:
        group["lr"] = 0.01
    parts.optimizer.step()
    with parts.step.inference():
        return loss, parts.step.loss(dict(batch)).item()


@pytest.mark.parametrize("plan", ["tp=1", "tp=2,pp=2", "dp_shard=2,cp=2"])
def test_a_batch_of_which_nothing_counts_has_no_gradient(pool: Pool, short_documents: Path, plan: str) -> None:
    config = small(short_documents, plan, "llama3")
    world = degrees(config.parallel, 1).world
    assert pool.run(world, without_labels, config) == [(0.0, 0.0)] * world


def without_labels(rank: int, config: Config) -> tuple[float, float]:
    """On a worker: loss and largest gradient of a step without a label."""
    mesh = make_mesh("cpu", degrees(config.parallel, dist.get_world_size()), 30)
    parts = build(config, torch.device("cpu"), mesh)
    batch, _ = part_of_a_batch(mesh)
    loss = parts.step.forward_backward(batch | {"labels": torch.full_like(batch["labels"], -100)}, 0, 1)
    return loss.item(), max(local(p.grad).abs().max().item() for p in parts.model.parameters() if p.grad is not None)


@pytest.mark.parametrize("plan", ["tp=2", "pp=2", "dp_shard=2", "dp_replicate=2"])
def test_clipping_leaves_the_same_gradients_on_all_ranks(pool: Pool, short_documents: Path, plan: str) -> None:
    ((alone, whole),) = pool.run(1, clipped, small(short_documents, "tp=1", "llama3"), 0.1)
    assert math.hypot(*alone.values()) == pytest.approx(0.1, rel=1e-3)
    config = small(short_documents, plan, "llama3")
    for got, in_memory in pool.run(degrees(config.parallel, 1).world, clipped, config, 0.1):
        assert got == pytest.approx(alone, rel=1e-5)
        if plan == "dp_replicate=2":  # the norms count one replica only
            assert in_memory == pytest.approx(whole, rel=1e-5)


def clipped(rank: int, config: Config, limit: float) -> tuple[dict[str, float], float]:
    """On a worker: norms by layer after clipping, and the norm of what is in this rank's memory."""
    mesh = make_mesh("cpu", degrees(config.parallel, dist.get_world_size()), 30)
    parts = build(config, torch.device("cpu"), mesh)
    loss = parts.step.forward_backward(*part_of_a_batch(mesh), 1)
    parts.norms.clip(limit, loss)
    in_memory = math.hypot(*(local(p.grad).norm().item() for p in parts.model.parameters() if p.grad is not None))
    return {name: norm.item() for name, norm in parts.norms.of_layers().items()}, in_memory


@pytest.mark.parametrize("model", ["llama3", "gpt2"])
def test_documents_in_a_row_are_sequences_of_their_own(pool: Pool, short_documents: Path, model: str) -> None:
    ((together, apart),) = pool.run(1, documents_apart, small(short_documents, "data.document_mask=true", model))
    assert together == pytest.approx(apart, rel=1e-6)


def documents_apart(rank: int, config: Config) -> tuple[float, float]:
    """On a worker: the loss of rows of documents under the mask; the sum over the documents, each a sequence of its own."""
    parts = build(config, torch.device("cpu"), Mesh())
    with torch.no_grad():
        for parameter in parts.model.parameters():
            parameter.mul_(3)
    tokens = torch.randint(257, (8, 33), generator=torch.Generator().manual_seed(1))
    x, y, spans = tokens[:, :-1], tokens[:, 1:], [(0, 3), (3, 4), (4, 15), (15, 32)]
    ids = torch.cat([torch.full((end - begin,), i) for i, (begin, end) in enumerate(spans)]).expand(8, 32)
    positions = torch.cat([torch.arange(end - begin) for begin, end in spans]).expand(8, 32)
    with parts.step.inference() as model:
        together = parts.step.loss({"tokens": x, "labels": y, "document_ids": ids, "positions": positions}).item()
        apart = sum(model(x[:, begin:end], labels=y[:, begin:end]).item() for begin, end in spans)
    return together, apart


@pytest.mark.parametrize("plan", ["dp_replicate=2", "dp_replicate=2,pp=2"])
def test_gradients_in_many_buckets(pool: Pool, short_documents: Path, plan: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = small(short_documents, plan, "llama3")
    alone = verify.run(pool, verify.one_process(config), 1, 3)
    monkeypatch.setattr(verify, "train", in_small_buckets)
    found = verify.compare(verify.run(pool, config, degrees(config.parallel, 1).world, 3), alone)
    assert found.holds, (found.loss, found.norm, found.gradient, found.worst)


def in_small_buckets(*arguments: Any) -> Any:
    """On a worker: `verify.train` with buckets that hold a matrix or two."""
    before, data.BUCKET_BYTES = data.BUCKET_BYTES, 4096
    try:
        return ORIGINAL(*arguments)
    finally:
        data.BUCKET_BYTES = before


ORIGINAL = verify.train
