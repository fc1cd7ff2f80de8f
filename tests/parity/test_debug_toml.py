"""train_configs/debug.toml as it is, 20 steps, under plans of every kind: what the README promises, at full size.

Many minutes on two cores, so only with --slow; test_plans.py holds the same on smaller models. Prints its figures.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from plans import CONFIG

from titan.commands.verify import planned
from titan.config import degrees
from titan.pool import Pool
from titan.verify import FLOAT32, compare, one_process, run

LOSS_TOLERANCE = 1e-4  # over 20 steps of AdamW with warm-up: rounding grows as the weights drift apart
PLANS = ("tp=1", "dp_shard=2", "dp_replicate=2", "dp_replicate=2,dp_shard=2", "tp=2", "cp=2", "pp=2", "tp=2,pp=2", "tp=2,cp=2")


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_twenty_steps_of_debug_toml(pool: Pool, topics: Path) -> None:
    words = [CONFIG, f"--data.path={topics}", "--data.tokenizer=bytes"]
    reference = one_process(planned("training.micro_batch_size=16", words))
    alone = run(pool, reference, 1, 20)
    print(f"\none process, one micro batch: loss {alone.losses[0]:.7f} to {alone.losses[-1]:.7f}")
    for plan in PLANS:
        for micro in (1, 4):
            config = planned(plan, [*words, f"--training.micro_batch_size={micro}"])
            found = compare(run(pool, config, degrees(config.parallel, 1).world, 20), alone)
            print(f"{plan:28} {micro:>2}  {found.gradient:9.1e}  {found.loss:9.1e}   worst gradient: {found.worst}", flush=True)
            assert found.starts_equal
            assert found.gradient < FLOAT32.gradient
            assert found.loss < LOSS_TOLERANCE
