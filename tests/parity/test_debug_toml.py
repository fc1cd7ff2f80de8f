"""train_configs/debug.toml as it is, 20 steps, under every way of sharing out the data: what the README promises, at full size.

Twelve minutes on two cores, so only with --slow; test_data_parallel.py holds the same on a smaller model. Prints its figures.
"""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
from pool import Pool
from runs import gradient_error, loss_error, run

GRADIENT_TOLERANCE = 3e-6
LOSS_TOLERANCE = 1e-4  # over 20 steps of AdamW with warm-up: rounding grows as the weights drift apart

PLANS: dict[str, tuple[int, list[str]]] = {
    "one process": (1, []),
    "dp_shard 2": (2, ["--parallel.dp_shard=2"]),
    "dp_replicate 2": (2, ["--parallel.dp_shard=1", "--parallel.dp_replicate=2"]),
    "dp_shard 4": (4, ["--parallel.dp_shard=4"]),
    "dp_replicate 4": (4, ["--parallel.dp_shard=1", "--parallel.dp_replicate=4"]),
    "dp_replicate 2 x dp_shard 2": (4, ["--parallel.dp_shard=2", "--parallel.dp_replicate=2"]),
}


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_twenty_steps_of_debug_toml(pool: Pool, topics: Path) -> None:
    reference = run(pool, 1, topics, 20, "--training.micro_batch_size=16", timeout=300)
    print(f"\none process, one micro batch: loss {reference.losses[0]:.7f} to {reference.losses[-1]:.7f}")
    print(f"{'plan':<28} {'micro batch':>11}  {'gradient':>9}  {'20 losses':>9}")
    for (plan, (world, words)), micro in itertools.product(PLANS.items(), (1, 2, 4)):
        got = run(pool, world, topics, 20, *words, f"--training.micro_batch_size={micro}", timeout=300)
        assert all(np.array_equal(got.initial[name], weight) for name, weight in reference.initial.items())
        gradient, name = gradient_error(got, reference)
        loss = loss_error(got, reference)
        print(f"{plan:<28} {micro:>11}  {gradient:9.1e}  {loss:9.1e}   worst gradient: {name}", flush=True)
        assert gradient < GRADIENT_TOLERANCE
        assert loss < LOSS_TOLERANCE
