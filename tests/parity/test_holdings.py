"""What `titan draw` says that ranks hold, in a world that is not there, is what real ranks hold."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch.distributed as dist
from plans import small

from titan.config import Config, degrees
from titan.drawing.tokens import when, work
from titan.holdings import holdings
from titan.layout import block
from titan.parallel.context import _travelling, pieces
from titan.pool import Pool
from titan.rehearsal import Rehearsal

PLANS = (
    "training.micro_batch_size=2",
    "dp_shard=4",
    "dp_replicate=2,dp_shard=2",
    "tp=4",
    "dp_shard=2,tp=2",
    "dp_shard=2,cp=2",
    "tp=2,pp=2,pp_schedule=ZBVZeroBubble",
    "dp_shard=2,tp=2,pp=2,offload.states=true",
    "pp=4,offload.states=true",
)


@pytest.mark.parametrize(("plan", "model"), [(plan, ("llama3", "gpt2")[i % 2]) for i, plan in enumerate(PLANS)])
def test_a_rank_that_is_not_there_holds_what_a_real_one_holds(pool: Pool, short_documents: Path, plan: str, model: str) -> None:
    config = small(short_documents, plan, model)
    world = degrees(config.parallel, 1).world
    real = pool.run(world, held, config, pool.group_seconds)
    order = sorted(range(world), key=lambda rank: -rank)  # the last first: nothing is left over from one to the next
    assert {rank: holdings(config, rank, world) for rank in order} == dict(enumerate(real))


def held(rank: int, config: Config, seconds: float) -> dict[str, tuple[tuple[int, ...], ...]]:
    """On a worker."""
    parts = Rehearsal(rank, config, seconds).parts
    blocks = {name: block(parameter, parts.cuts.get(name)) for name, parameter in parts.model.named_parameters()}
    return {name: (tuple(b.shape), tuple(b.offset), tuple(b.local.shape)) for name, b in blocks.items()}


def test_the_ring_meets_keys_in_the_turns_that_are_drawn(pool: Pool) -> None:
    for rank, owners in enumerate(pool.run(4, met)):
        assert [when("ring", rank, owner, 4) for owner in owners] == [0, 1, 2, 3]


def met(rank: int) -> list[int]:
    """On a worker: whose keys come by, in order."""
    import torch

    assert dist.group.WORLD is not None
    return [owner for owner, _ in _travelling(torch.ones(1), dist.group.WORLD)]


@pytest.mark.parametrize("degree", [2, 3, 4, 8])
def test_each_rank_of_a_context_has_the_same_work(degree: int) -> None:
    length = 2 * degree * 7
    shares = work([pieces(length, rank, degree) for rank in range(degree)])
    assert len(set(shares)) == 1
    assert sum(shares) == length * (length + 1) // 2
