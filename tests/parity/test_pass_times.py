"""Passes as they are timed on real ranks: each one there, and none before what it needs."""

from __future__ import annotations

from pathlib import Path

import pytest
from plans import small

from titan.commands.schedule import in_flight
from titan.parallel.schedules import table
from titan.parallel.timeline import needs, result_of
from titan.pass_times import measure
from titan.pool import Pool


@pytest.mark.parametrize("plan", ["pp=2", "pp=4,pp_schedule=ZBVZeroBubble", "pp=2,dp_shard=2,pp_schedule=Interleaved1F1B"])
def test_passes_follow_one_another(pool: Pool, short_documents: Path, plan: str) -> None:
    config = small(short_documents, plan, "llama3")
    parallel = config.parallel
    world = parallel.pp * max(1, parallel.dp_shard)
    found = pool.run(world, measure, config, 2, pool.group_seconds)
    micros = 4 if world == parallel.pp else 2
    orders, owners = table(parallel.pp_schedule, parallel.pp, 0, micros)
    ranks = found[:: world // parallel.pp]
    for step in range(2):
        times = {action: at for own in ranks for action, at in own.clocks[step].items()}
        assert sorted(times) == sorted(action for order in orders for action in order)
        ends = {result_of(action): end for action, (_, end) in times.items()}
        for action, (start, end) in times.items():
            assert start < end
            assert all(ends[result] <= start for result in needs(action, len(owners))), action
        ran = [sorted(own.clocks[step], key=lambda a: times[a]) for own in ranks]
        assert ran == orders
        assert in_flight(ran) == in_flight(orders)
    for own in found:
        assert all(0 < seconds < 10 for seconds in own.processor.values())
