"""Pipeline schedules: in which order each rank works on the micro batches, as tables of actions.

A pipeline cuts the layers into stages, and each rank holds one stage or several. A micro batch's forward pass F goes up through
the stages, its backward pass B comes down again. A rank idles until the first micro batch has come up to it, and again where
the last ones come down: these gaps are the bubble. Let P be the ranks, M the micro batches, F the time that a rank needs for
all its layers' forward pass of a micro batch, and B = 2F that of their backward pass. Each rank works for M (F+B), and

    schedule                 stages a rank   idles for         holds at most (micro batches' activations of its layers)
    GPipe                    1               (P-1) (F+B)       M
    1F1B                     1               (P-1) (F+B)       P-r on rank r
    Interleaved1F1B          v               (P-1) (F+B)/v     P + (P-1)/v on rank 0
    InterleavedZeroBubble    v               (P-1) F/v         P
    ZBVZeroBubble            2, in a V       (P-1) F/2         P
    DualPipeV                2, in a V       (P-1) F/2         P + 1/2

for M that P divides (in a V: M of at least 2P). For other M above P the times hold, and the loops hold a little more. With
fewer micro batches the pipeline never fills.

GPipe does all forwards, then all backwards: simple, but what it holds grows with M. 1F1B alternates as soon as it can: the same
bubble, but activations go as soon as their backward has passed.

Interleaving gives each rank v stages, v times as thin: rank r holds stages r, r+P, r+2P, ... (a loop). The pipeline then fills
in a v-th of the time. The price is v times as many transfers; that they have time to travel costs the (P-1)/v in what it holds.

Zero bubble splits the backward pass in two: I, the gradient of the stage's input, for which the previous stage waits, and W,
the gradients of its weights, for which nobody waits. I comes as early as it can; W fills the gaps. What is left is the way up
of the first micro batch, P-1 thin forwards, which nothing can fill. The price is that activations, and gradients beside them,
live until W. The figures above take F, I and W as equally long; as far as they are not, some of the bubble is back.

In a V, rank r holds stages r and 2P-1-r: rank 0 has both the first and the last stage, the turn needs no transfer, and all
ranks hold alike. ZBVZeroBubble splits every backward. DualPipeV mostly pairs whole backwards with forwards of other micro
batches, which may hide each other's communication (expert parallelism), and splits only where it fills and drains.

Sources: Huang et al. 2018 (arXiv:1811.06965, GPipe); Narayanan et al. 2021 (arXiv:2104.04473, 1F1B and interleaving); Qi et al.
2023 and 2024 (arXiv:2401.10241 and 2405.15362, zero bubble and the V); DeepSeek-AI 2024 (arXiv:2412.19437, DualPipe) and its
later DualPipeV. The names are PyTorch's.
"""

from __future__ import annotations

from collections import Counter, deque
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple, cast

from titan.parallel.schedule_file import read_csv
from titan.parallel.timeline import Action, Kind, Orders, in_flight, needs, result_of

STAGES = {"GPipe": 1, "1F1B": 1, "Interleaved1F1B": 2, "InterleavedZeroBubble": 2, "ZBVZeroBubble": 2, "DualPipeV": 2}
LOOPS = ("Interleaved1F1B", "InterleavedZeroBubble")
VS = ("ZBVZeroBubble", "DualPipeV")


class Table(NamedTuple):
    """orders: each rank's actions, in order. owners: the rank of each stage."""

    orders: Orders
    owners: list[int]


def stages_per_rank(name: str) -> int:
    """Stages that a rank holds unless told otherwise; 0 for a file, which says it. Raises ValueError for an unknown name."""
    if name.endswith(".csv"):
        return 0
    if name not in STAGES:
        raise ValueError(f"{name!r} is no schedule: write one of {', '.join(STAGES)}, or the path of a .csv file")
    return STAGES[name]


def owner(name: str, ranks: int, stage: int) -> int:
    """The rank of a stage under a schedule that is not a file: there and back again in a V, else in a loop."""
    return min(stage, 2 * ranks - 1 - stage) if name in VS else stage % ranks


def table(name: str, ranks: int, stages_per_rank: int, micro_batches: int) -> Table:
    """A schedule by its name, or from a .csv file. stages_per_rank: 0 for as many as the schedule has by itself.

    Interleaved schedules take any number of stages a rank, the others only their own. Any number of micro batches works, but
    for DualPipeV, which needs twice as many as ranks. Raises ValueError where there is no such table.
    """
    if ranks < 1 or micro_batches < 1:
        raise ValueError(f"a pipeline has at least 1 rank and 1 micro batch, not {ranks} and {micro_batches}")
    if name.endswith(".csv"):
        return Table(*read_csv(Path(name), ranks, stages_per_rank, micro_batches))
    count = _stages(name, stages_per_rank)
    if name == "GPipe":
        micros = range(micro_batches)
        orders = [[Action(r, "F", m) for m in micros] + [Action(r, "B", m) for m in micros] for r in range(ranks)]
    elif name in ("1F1B", "Interleaved1F1B"):
        # Each rank leads the next by two forwards: with one, the bubble is the same while transfers take no time, but
        # each transfer is waited for. 1F1B leads by one and waits: it is there to hold little.
        orders = _loop("B", ranks, count, micro_batches, lead=1 if count == 1 else 2)
    elif name == "InterleavedZeroBubble":
        orders = _fill(_loop("I", ranks, count, micro_batches, lead=1), ranks * count)
    elif name == "ZBVZeroBubble":
        orders = [_zbv(rank, ranks, micro_batches) for rank in range(ranks)]
    elif micro_batches < 2 * ranks:
        raise ValueError(f"DualPipeV needs {2 * ranks} micro batches or more, 2 for each of {ranks} ranks, not {micro_batches}")
    else:
        orders = [_dual_pipe_v(rank, ranks, micro_batches) for rank in range(ranks)]
    return Table(orders, [owner(name, ranks, stage) for stage in range(ranks * count)])


def forward_only(owners: list[int], micro_batches: int) -> Orders:
    """Orders without backward passes, for validation, whatever the placement.

    One wave: on all ranks an action comes after those of a lower stage + micro batch, so nothing deadlocks.
    """
    wave = [Action(stage, "F", m) for stage in range(len(owners)) for m in range(micro_batches)]
    wave.sort(key=lambda action: action.stage + action.micro)
    return [[action for action in wave if owners[action.stage] == rank] for rank in sorted(set(owners))]


def _stages(name: str, wanted: int) -> int:
    usual = stages_per_rank(name)
    if wanted < 0 or (wanted not in (0, usual) and name not in LOOPS):
        instead = "; Interleaved1F1B takes any number" if wanted > 0 else ""
        raise ValueError(f"{name} has {usual} {'stages' if usual > 1 else 'stage'} a rank, not {wanted}{instead}")
    return wanted or usual


def _loop(backward: Kind, ranks: int, count: int, micro_batches: int, lead: int) -> Orders:
    """Forwards alone at first, then one forward and one backward in turn, then backwards alone.

    Micro batches go in rounds of about as many as ranks: a round passes through the first stage of every rank, then through
    each one's second, and so on; its backwards in the opposite order. Rounds of at least as many as ranks, the largest first,
    keep this free of deadlocks for every number of micro batches.
    """
    rounds = max(1, micro_batches // ranks)
    bounds = [-(-micro_batches * i // rounds) for i in range(rounds + 1)]
    orders = []
    for rank in range(ranks):
        stages = range(rank, ranks * count, ranks)
        forwards = [Action(s, "F", m) for a, b in pairwise(bounds) for s in stages for m in range(a, b)]
        backwards = [Action(s, backward, m) for a, b in pairwise(bounds) for s in reversed(stages) for m in range(a, b)]
        alone = min(len(forwards), lead * (ranks - rank - 1) + (count - 1) * bounds[1])
        pairs = zip(forwards[alone:], backwards, strict=False)
        turns = [action for pair in pairs for action in pair]
        orders.append(forwards[:alone] + turns + backwards[len(backwards) - alone :])
    return orders


def _fill(orders: Orders, stages: int) -> Orders:
    """Put a W for every I into the gaps of orders of F and I, all three taken as equally long.

    At each tick, a rank takes its next F or I if it can run, else the oldest W. It may hold as many activations as the fullest
    rank would if every W came right after its I; at this limit W comes before F.
    """
    limit = max(in_flight([[a._replace(kind="B") if a.kind == "I" else a for a in order] for order in orders]))
    todo = [deque(order) for order in orders]
    weights: list[deque[Action]] = [deque() for _ in orders]
    filled: Orders = [[] for _ in orders]
    held = [0] * len(orders)
    results: set[tuple[int, str, int]] = set()
    while any(todo) or any(weights):
        tick = []
        for rank, order in enumerate(filled):
            following = todo[rank][0] if todo[rank] else None
            full = following is not None and following.kind == "F" and held[rank] == limit
            if following and not full and results.issuperset(needs(following, stages)):
                action = todo[rank].popleft()
            elif weights[rank]:
                action = weights[rank].popleft()
            else:
                continue
            held[rank] += {"F": 1, "I": 0, "W": -1}[action.kind]
            if action.kind == "I":
                weights[rank].append(action._replace(kind="W"))
            order.append(action)
            tick.append(action)
        assert tick, "no rank can act"
        results.update(map(result_of, tick))
    return filled


def _zbv(rank: int, ranks: int, micro_batches: int) -> list[Action]:
    # Fewer micro batches than fill the V: the table of just enough, without those that are not there.
    full = max(micro_batches, 2 * ranks - 1)
    below, above = rank, ranks - rank - 1
    order = _phases(
        (rank, 2 * ranks - 1 - rank),
        (2 * above + 1, "F0"),
        (below, "F1 F0"),
        (above + 1, "F1 I1 W"),
        (full - 2 * ranks + below + 1, "F0 I0 W F1 I1 W"),
        (above, "I0 W F1 I1 W"),
        (below, "I0 I1"),
        (above + 1, "I0 W"),
        (2 * below, "W"),
    )
    return [action for action in order if action.micro < micro_batches]


def _dual_pipe_v(rank: int, ranks: int, micro_batches: int) -> list[Action]:
    below, above = rank, ranks - rank - 1
    return _phases(
        (rank, 2 * ranks - 1 - rank),
        (2 * above, "F0"),
        (below + 1, "F0 F1"),
        (above, "I1 W F1"),
        (micro_batches - 2 * ranks + below + 1, "F0 B1 F1 B0"),
        (above, "B1 F1 B0"),
        # Draining: 2 (below+1) backwards in turn, the second half of them split.
        (1, " ".join((["B1", "B0"] * (below + 1))[: below + 1])),
        (1, " ".join((["I1", "I0"] * (below + 1))[below + 1 :])),
        (above, "W I0"),
        (below + 1, "W"),
    )


def _phases(stages: tuple[int, int], *phases: tuple[int, str]) -> list[Action]:
    """Actions written as words: (2, "F0 I1 W") is twice a forward of the rank's first stage, the input's backward of its second
    and the oldest W that is still due. Each stage takes the micro batches in order."""
    counts: Counter[tuple[str, int]] = Counter()
    due: deque[Action] = deque()
    order = []
    for times, words in phases:
        for word in words.split() * times:
            if word == "W":
                order.append(due.popleft())
                continue
            kind, chunk = cast(Kind, word[0]), int(word[1])
            way = ("up" if kind == "F" else "down", chunk)
            order.append(Action(stages[chunk], kind, counts[way]))
            counts[way] += 1
            if kind == "I":
                due.append(order[-1]._replace(kind="W"))
    assert not due, "weight gradients are left over"
    return order
