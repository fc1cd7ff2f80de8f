"""Forward passes alone under every plan: validation gives the one-process loss, samples the one-process text, on every rank,
and both leave the parameters and the training as they were."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from plans import small
from torch import Tensor

from titan.build import Parts, build
from titan.config import Config, Precision, degrees
from titan.data.tokenizer import BytesTokenizer
from titan.generate import Draw, continuations
from titan.parallel.mesh import Mesh, make_mesh
from titan.pool import Pool

PLANS = (
    "dp_shard=2",
    "dp_replicate=2",
    "dp_replicate=2,dp_shard=2",
    "tp=2",
    "tp=4,pp=2",
    "cp=2",
    "dp_shard=2,cp=2",
    "pp=2",
    "pp=2,pp_schedule=Interleaved1F1B",
    "pp=2,pp_schedule=DualPipeV",
    "dp_shard=2,pp=2,pp_schedule=ZBVZeroBubble",
    "tp=2,cp=2,pp=2",
    "recompute.mode=full",
    "compile.enable=true,compile.backend=aot_eager",
    "cp=2,data.document_mask=true",
)


@pytest.mark.parametrize(
    ("plan", "model"),
    [
        pytest.param(plan, model, marks=() if i % 2 == j else pytest.mark.slow)
        for i, plan in enumerate(PLANS)
        for j, model in enumerate(("llama3", "gpt2"))
    ],
)
def test_validation_and_samples_are_those_of_one_process(pool: Pool, short_documents: Path, plan: str, model: str) -> None:
    words = ["--model.dropout=0.1"] if model == "gpt2" else []
    mask = "data.document_mask=true" if "document_mask" in plan else "tp=1"
    ((alone, texts, _),) = pool.run(1, infer, small(short_documents, mask, model, *words))
    config = small(short_documents, plan, model, *words)
    answers = pool.run(degrees(config.parallel, 1).world, infer, config)
    assert sum(loss for loss, _, _ in answers) == pytest.approx(alone, rel=1e-6)
    for _, written, as_it_was in answers:
        assert written == texts
        assert as_it_was
    assert len(set(texts)) == len(texts)


def test_bfloat16_samples_do_not_disturb_training(pool: Pool, short_documents: Path) -> None:
    for plan in ("tp=1", "dp_shard=2", "tp=2,pp=2"):
        config = replace(small(short_documents, plan, "llama3"), precision=Precision(param="bfloat16"))
        assert all(as_it_was for _, _, as_it_was in pool.run(degrees(config.parallel, 1).world, infer, config))


def infer(rank: int, config: Config) -> tuple[float, list[str], bool]:
    """On a worker: this rank's share of a summed loss; samples; whether parameters and the next step are what they were."""
    mesh = make_mesh("cpu", degrees(config.parallel, dist.get_world_size()), 30)
    parts = build(config, torch.device("cpu"), mesh)
    with torch.no_grad():
        for parameter in parts.model.parameters():
            parameter.mul_(3)  # away from the uniform distribution, where rounding would choose
    batch = random_batch(config, mesh)
    before, first = kinds(parts), parts.step.forward_backward(batch, 256, 1).item()
    with parts.step.inference():
        loss = parts.step.loss(batch).item()
    prompts, draw = ["The wi", "x = ", "longer"], Draw(0.8, 0.95, 5, 257)
    with parts.step.generating() as model:
        texts = continuations(model, parts.table.core, BytesTokenizer(), 256, prompts, 6, draw)
    as_it_was = kinds(parts) == before and parts.model.training
    return loss, texts, as_it_was and parts.step.forward_backward(batch, 256, 1).item() == first


def kinds(parts: Parts) -> dict[str, tuple[type, tuple[int, ...]]]:
    return {name: (type(p), tuple(p.shape)) for name, p in parts.model.named_parameters()}


def random_batch(config: Config, mesh: Mesh) -> dict[str, Tensor]:
    """This rank's part of 8 sequences, with documents where the config masks them."""
    tokens = torch.randint(257, (8, 33), generator=torch.Generator().manual_seed(1)).chunk(mesh.data_degree)[mesh.data_rank]
    batch = {"tokens": tokens[:, :-1], "labels": tokens[:, 1:]}
    if config.data.document_mask:
        ids = (torch.arange(32) // 7).expand(len(tokens), 32)
        batch |= {"document_ids": ids, "positions": torch.arange(32).expand(len(tokens), 32) % 7}
    return batch
