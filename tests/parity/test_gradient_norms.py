"""Gradient norms by layer: the same under every plan as in one process, and together the norm that clipping sees."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from plans import small

from titan.build import build
from titan.config import Config, degrees
from titan.parallel.mesh import make_mesh
from titan.pool import Pool

PLANS = (
    "dp_shard=2",
    "dp_replicate=2",
    "dp_replicate=2,dp_shard=2",
    "dp_replicate=2,tp=2",
    "dp_shard=2,tp=4",
    "cp=2,dp_shard=2",
    "dp_replicate=2,cp=2",
    "pp=2,tp=2",
    "dp_replicate=2,pp=2",
    "pp=2,dp_shard=2,pp_schedule=ZBVZeroBubble",
)


@pytest.mark.parametrize(("model", "tied"), [("llama3", "true"), ("gpt2", "false")])
def test_norms_by_layer_do_not_depend_on_the_plan(pool: Pool, short_documents: Path, tied: str, model: str) -> None:
    words = ["--model.n_layers=4", f"--model.tied_embeddings={tied}"]
    reference, total = pool.run(1, norms, small(short_documents, "tp=1", model, *words))[0]
    head = [] if tied == "true" else ["head"]
    positions = ["position_embedding"] if model == "gpt2" else []
    assert list(reference) == ["embedding", *positions, "layers.0", "layers.1", "layers.2", "layers.3", "norm", *head]
    assert math.hypot(*reference.values()) == pytest.approx(total, rel=1e-5)
    assert len(set(reference.values())) == len(reference)
    for plan in PLANS:
        config = small(short_documents, plan, model, *words)
        for got, norm in pool.run(degrees(config.parallel, 1).world, norms, config):
            assert got == pytest.approx(reference, rel=1e-5), plan
            assert norm == pytest.approx(total, rel=1e-5), plan


def norms(rank: int, config: Config) -> tuple[dict[str, float], float]:
    """On a worker: norms by layer of one step's gradients, and the norm of all."""
    mesh = make_mesh("cpu", degrees(config.parallel, dist.get_world_size()), 30)
    parts = build(config, torch.device("cpu"), mesh)
    tokens = torch.randint(257, (8, 33), generator=torch.Generator().manual_seed(1))
    mine = tokens.chunk(mesh.data_degree)[mesh.data_rank]
    loss = parts.step.forward_backward({"tokens": mine[:, :-1], "labels": mine[:, 1:]}, tokens[:, 1:].numel(), 1)
    return {name: norm.item() for name, norm in parts.norms.of_layers().items()}, parts.norms.clip(1.0, loss)[0].item()
