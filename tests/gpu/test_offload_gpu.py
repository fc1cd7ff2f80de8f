"""Offload on one GPU: the same losses, less memory at the peak. Skipped without a GPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from titan import ranks as between
from titan.build import build
from titan.config import Degrees
from titan.parallel.mesh import Mesh, make_mesh
from titan.toml import load

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
CONFIG = Path(__file__).parents[2] / "train_configs" / "debug.toml"
WIDE = ("--model.dim=512", "--model.ffn_dim=1536", "--training.micro_batch_size=8")


def trained(mesh: Mesh, *words: str) -> tuple[list[float], int]:
    """Losses of four steps, and the most bytes that were taken on the GPU in the last."""
    config = load(CONFIG, [*WIDE, *words])
    tokens = torch.randint(257, (16, 257), generator=torch.Generator().manual_seed(1))
    batch = {"tokens": tokens[:, :-1].contiguous(), "labels": tokens[:, 1:].contiguous()}
    parts = build(config, torch.device("cuda"), mesh)
    losses = []
    for step in range(1, 5):
        torch.cuda.reset_peak_memory_stats()
        loss = parts.step.forward_backward(batch, batch["labels"].numel(), step)
        norm, _ = parts.norms.clip(1.0, loss)
        assert norm.device == loss.device
        parts.optimizer.step()
        parts.optimizer.zero_grad()
        losses.append(loss.item())
    return losses, torch.cuda.max_memory_allocated()


@pytest.mark.parametrize("mode", ["none", "full"])
def test_activations_go_and_come_back(mode: str) -> None:
    losses, usual = trained(Mesh(), f"--recompute.mode={mode}")
    found, less = trained(Mesh(), f"--recompute.mode={mode}", "--offload.activations=true")
    assert found == losses
    assert less < usual


def test_states_stay_with_the_host() -> None:
    losses, usual = trained(Mesh())
    between.start(60)
    try:
        mesh = make_mesh("cuda", Degrees(), 60, always_fsdp=True)
        found, less = trained(mesh, "--offload.states=true")
    finally:
        dist.destroy_process_group()
    assert found == pytest.approx(losses, rel=1e-5)
    assert less < usual
