"""Run a config under a plan on pool workers, and compare what came out with one process.

A run goes through the same build, loader and step as training, and gives the losses of every step, and by name and in full:
initial weights, first-step gradients, final weights.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from pool import Pool
from torch import Tensor
from torch.distributed.tensor import DTensor

from titan import ranks as between
from titan.build import build
from titan.check import problems
from titan.config import Config, degrees
from titan.data.loader import loader
from titan.data.shards import TokenDataset
from titan.optim import set_lr
from titan.parallel.mesh import data_rank, make_mesh
from titan.schedule import lr_share
from titan.toml import load

ROOT = Path(__file__).parents[2]


@dataclass
class Run:
    """What a run gave, the same on all ranks."""

    losses: list[float]
    norms: list[float]
    initial: dict[str, np.ndarray]
    gradients: dict[str, np.ndarray]
    final: dict[str, np.ndarray]


def run(pool: Pool, world: int, data: Path, steps: int, *overrides: str, config: str = "debug", timeout: float = 120) -> Run:
    """Train `steps` steps of train_configs/<config>.toml with overrides on `world` ranks, on the token shards in `data`."""
    words = [f"--data.path={data}", "--data.tokenizer=bytes", *overrides]
    checked = load(ROOT / "train_configs" / f"{config}.toml", words)
    assert not problems(checked, world), problems(checked, world)
    results = pool.run(world, train, checked, steps, timeout=timeout)
    for other in results[1:]:
        assert other == results[0][-1:], "the ranks end with different weights"
    return Run(*results[0][:-1])


def train(rank: int, config: Config, steps: int) -> tuple[object, ...]:
    """On a worker: the training loop without its logs and checkpoints."""
    ranks = between.Ranks(rank, torch.distributed.get_world_size(), torch.device("cpu"))
    plan = degrees(config.parallel, ranks.world)
    mesh = make_mesh("cpu", plan, 30)
    parts = build(config, ranks.device, mesh)
    batches = loader(
        TokenDataset(config.data.path, "train"),
        seed=config.training.seed,
        seq_len=config.training.seq_len,
        global_batch_size=config.training.global_batch_size,
        dp_rank=data_rank(mesh),
        dp_degree=plan.data_parallel,
        start_sample=0,
        workers=0,
    )
    initial, gradients = whole(dict(parts.model.named_parameters())), {}
    losses, norms = [], []
    for step in range(1, steps + 1):
        batch = next(batches)
        valid, _ = between.agree(ranks, int((batch["labels"] != -100).sum()), False)
        loss = parts.step.forward_backward(batch, valid)
        if step == 1:
            gradients = whole({name: p.grad for name, p in parts.model.named_parameters() if p.grad is not None})
        norms.append(parts.norms.clip(config.training.clip_norm).item())
        losses.append(between.total(ranks, loss.item())[0])
        set_lr(parts.optimizer, config.optimizer.lr * lr_share(config.schedule, step, config.training.steps))
        parts.optimizer.step()
        parts.optimizer.zero_grad()
    final = whole(dict(parts.model.named_parameters()))
    batches.close()
    digest = hashlib.sha256(b"".join(final[name].tobytes() for name in sorted(final))).hexdigest()
    return (losses, norms, initial, gradients, final, digest) if rank == 0 else (digest,)


def whole(tensors: dict[str, Tensor]) -> dict[str, np.ndarray]:
    """Gather by name; every rank takes part."""
    full = {name: t.full_tensor() if isinstance(t, DTensor) else t for name, t in tensors.items()}
    return {name: t.detach().float().numpy().copy() for name, t in full.items()}


def gradient_error(got: Run, reference: Run) -> tuple[float, str]:
    """The largest error of a parameter's gradient, relative to the norm of that gradient, and whose it is."""
    assert got.gradients.keys() == reference.gradients.keys()
    errors = {
        name: float(np.linalg.norm((got.gradients[name] - g).astype(np.float64)) / np.linalg.norm(g.astype(np.float64)))
        for name, g in reference.gradients.items()
    }
    worst = max(errors, key=errors.__getitem__)
    return errors[worst], worst


def loss_error(got: Run, reference: Run) -> float:
    """The largest relative difference of a step's loss."""
    assert len(got.losses) == len(reference.losses)
    return max(abs(a - b) / abs(b) for a, b in zip(got.losses, reference.losses, strict=True))
