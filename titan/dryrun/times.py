"""How long a job's step takes: the paces of its ranks put together.

Without a pipeline ranks do the same at the same time, and a step is one rank's. Micro batches between the first and the last
repeat. With a pipeline each stage's passes take what they take on its rank, uneven stages their own, and the schedule's table
of actions is simulated with them; then each rank finishes on its own, and all wait for the last in the gradients' norm.

Not in it: reading data, which the loader's processes do meanwhile; logs and checkpoints; the bus to the host and the host's
cores with `[offload]`; and what ranks wait for each other because one happens to be slower, which grows with their number.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

from titan.config import Config
from titan.dryrun.pace import Pace, paces
from titan.dryrun.prices import Prices
from titan.dryrun.work import Message, Span, as_compiled
from titan.parallel import timeline
from titan.parallel.schedules import Table
from titan.parallel.timeline import Action, Times

FIRST, LAST = ("count", "weights", "batch"), ("gradients", "norm", "optimizer")
"""Parts of a step before and after the passes."""


@dataclass(frozen=True)
class StepTime:
    """Of a job."""

    seconds: float
    spent: Counter[str]
    """Seconds of the slowest rank, by what they go to; "bubble" is the time in which it idles."""
    bubble: float
    """Share of the passes' time in which a pipeline's ranks idle, on average."""
    times: Times
    """Of a pipeline's passes; else empty."""
    owners: Sequence[int]


class RankPace:
    """What a rank's dry step says of its time."""

    def __init__(self, config: Config, work: list[Span], prices: Prices) -> None:
        self.paces = paces(as_compiled(config, work), prices)
        handed = [item for span in work if span.where == "forward" for item in span.items if isinstance(item, Message)]
        sends = [message for message in handed if (message.dimension, message.op) == ("pp", "send")]
        self.travel = median([prices.message(message) for message in sends]) if sends else 0.0

    def part(self, *names: str) -> float:
        return sum(pace.seconds for pace in self.paces if pace.where in names)

    def spent(self, names: Sequence[str]) -> Counter[str]:
        total: Counter[str] = Counter()
        for pace in self.paces:
            if pace.where in names:
                total.update(pace.spent)
        return total

    def passes(self) -> dict[Action, Pace]:
        return {pace.where: pace for pace in self.paces if isinstance(pace.where, Action)}


def without_pipeline(rank: RankPace, micros: int) -> StepTime:
    """A step of so many micro batches, from one of some of them."""
    seen = [pace for pace in rank.paces if type(pace.where) is int]
    seconds, spent = rank.part(*FIRST, "forward", *LAST), rank.spent((*FIRST, "forward", *LAST))
    for place, pace in enumerate(seen):
        times = 1 + (micros - len(seen) if place == len(seen) - 2 else 0)
        seconds += times * pace.seconds
        spent.update({kind: times * amount for kind, amount in pace.spent.items()})
    return StepTime(seconds, spent, 0.0, {}, (0,))


def with_pipeline(ranks: Sequence[RankPace], schedule: Table) -> StepTime:
    """ranks: of each pipeline rank, in order."""
    orders, owners = schedule
    costs = [_costs(rank.passes()) for rank in ranks]
    stages = [[s for s, owner in enumerate(owners) if owner == rank] for rank in range(len(ranks))]

    def pace(action: Action) -> Pace:
        rank = owners[action.stage]
        return costs[rank](stages[rank].index(action.stage), action.kind, action.micro)

    travel = max(rank.travel for rank in ranks)
    times = timeline.timeline(orders, owners, lambda action: max(pace(action).seconds, 1e-9), travel)
    before = max(rank.part(*FIRST) for rank in ranks)
    ends = [max(end for action, (_, end) in times.items() if owners[action.stage] == r) for r in range(len(ranks))]
    after = [end + rank.part("gradients") for end, rank in zip(ends, ranks, strict=True)]
    seconds = before + max(after) + max(rank.part("norm", "optimizer") for rank in ranks)
    busy = [sum(end - start for action, (start, end) in times.items() if owners[action.stage] == r) for r in range(len(ranks))]
    slowest = busy.index(max(busy))
    spent = ranks[slowest].spent((*FIRST, *LAST))
    for action in orders[slowest]:
        spent.update(pace(action).spent)
    spent["bubble"] += seconds - sum(spent.values())  # type: ignore[assignment]
    return StepTime(seconds, spent, timeline.bubble(times, owners), times, owners)


def _costs(passes: dict[Action, Pace]) -> Callable[[int, str, int], Pace]:
    """Of a rank's stage (by its place on the rank), kind and micro batch: where it was not seen, as the nearest that was. Of
    ranks that are alike some do a full backward pass where others part it."""
    own = sorted({action.stage for action in passes})
    seen: dict[tuple[int, str], dict[int, Pace]] = {}
    for action, pace in passes.items():
        seen.setdefault((own.index(action.stage), action.kind), {})[action.micro] = pace

    def nearest(stage: int, kind: str, micro: int) -> Pace | None:
        found = seen.get((stage, kind), {})
        return found[min(found, key=lambda other: abs(other - micro))] if found else None

    def cost(stage: int, kind: str, micro: int) -> Pace:
        if pace := nearest(stage, kind, micro):
            return pace
        whole, halves = nearest(stage, "B", micro), [nearest(stage, half, micro) for half in "IW"]
        if whole is not None:
            return whole._replace(seconds=whole.seconds / 2, spent=Counter({k: v / 2 for k, v in whole.spent.items()}))
        assert all(half is not None for half in halves)
        return Pace(kind, sum(half.seconds for half in halves if half), sum((half.spent for half in halves if half), Counter()))

    return cost
