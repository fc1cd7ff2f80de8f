"""One GPU against the CPU: the same weights but for the last bits, the same losses to fp32 rounding. Skipped without a GPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from titan.build import build
from titan.init import philox
from titan.parallel.mesh import Mesh
from titan.toml import load

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
CONFIG = Path(__file__).parents[2] / "train_configs" / "debug.toml"


def test_random_bits_are_equal_on_every_device() -> None:
    counters = torch.arange(1000)
    assert torch.equal(philox(counters, (3, 2**64 - 5)), philox(counters.cuda(), (3, 2**64 - 5)).cpu())


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_five_steps_are_the_cpus(precision: str) -> None:
    config = load(CONFIG, [f"--precision.param={precision}"])
    tokens = torch.randint(257, (16, 257), generator=torch.Generator().manual_seed(1))
    batch = {"tokens": tokens[:, :-1].contiguous(), "labels": tokens[:, 1:].contiguous()}
    losses: dict[str, list[float]] = {}
    weights = {}
    for device in ("cpu", "cuda"):
        parts = build(config, torch.device(device), Mesh())
        weights[device] = {name: p.detach().cpu().clone() for name, p in parts.model.named_parameters()}
        losses[device] = []
        for step in range(1, 6):
            loss = parts.step.forward_backward(batch, batch["labels"].numel(), step)
            losses[device].append(loss.item())
            parts.norms.clip(1.0, loss)
            parts.optimizer.step()
            parts.optimizer.zero_grad()
    torch.testing.assert_close(weights["cuda"], weights["cpu"], rtol=1e-6, atol=1e-9)
    assert losses["cuda"] == pytest.approx(losses["cpu"], rel=1e-5 if precision == "float32" else 5e-3)
