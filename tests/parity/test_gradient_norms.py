"""Gradient norms by layer: the same under every plan as in one process, and together the norm that clipping sees."""

from __future__ import annotations

import math

import pytest
import torch
import torch.distributed as dist
from pool import Pool
from runs import ROOT

from titan import zoo
from titan.build import build
from titan.config import Config, degrees
from titan.optim import clip_gradients, gradient_norms
from titan.parallel.mesh import make_mesh
from titan.toml import load

SMALL = ("--model.n_layers=3", "--training.global_batch_size=8", "--data.tokenizer=bytes")
ODD = ("--model.vocab_size=259", "--model.dim=72", "--model.n_heads=6", "--model.n_kv_heads=3")
PLANS: dict[str, tuple[int, list[str]]] = {
    "shard2": (2, ["--parallel.dp_shard=2"]),
    "replicate2": (2, ["--parallel.dp_shard=1", "--parallel.dp_replicate=2"]),
    "hsdp2x2": (4, ["--parallel.dp_shard=2", "--parallel.dp_replicate=2"]),
}


@pytest.mark.parametrize("tied", ["true", "false"])
def test_norms_by_layer_do_not_depend_on_the_plan(pool: Pool, tied: str) -> None:
    words = [*SMALL, *ODD, f"--model.tied_embeddings={tied}"]
    reference, total = pool.run(1, norms, load(ROOT / "train_configs" / "debug.toml", words))[0]
    head = [] if tied == "true" else ["head"]
    assert list(reference) == ["embedding", "layers.0", "layers.1", "layers.2", "norm", *head]
    assert math.hypot(*reference.values()) == pytest.approx(total, rel=1e-5)
    assert len(set(reference.values())) == len(reference)
    for name, (world, plan) in PLANS.items():
        for got, _ in pool.run(world, norms, load(ROOT / "train_configs" / "debug.toml", [*words, *plan])):
            assert got == pytest.approx(reference, rel=1e-5), name


def norms(rank: int, config: Config) -> tuple[dict[str, float], float]:
    """On a worker: norms by layer of one step's gradients, and the norm of all."""
    mesh = make_mesh("cpu", degrees(config.parallel, dist.get_world_size()), 30)
    parts = build(config, torch.device("cpu"), mesh)
    tokens = torch.randint(257, (8, 33), generator=torch.Generator().manual_seed(1))
    mine = tokens.chunk(dist.get_world_size())[mesh.data_rank]
    parts.step.forward_backward({"tokens": mine[:, :-1], "labels": mine[:, 1:]}, tokens[:, 1:].numel())
    found = gradient_norms(parts.model, zoo.sharding(config.model.name, config.model.config).block)
    return {name: norm.item() for name, norm in found.items()}, clip_gradients(parts.model, 1.0).item()
