"""What a pipeline's ranks do when: orders of actions simulated in time, and the transfers between ranks put in.

An order says in which sequence a rank acts, not when. The simulation is the simplest there is: an action starts as soon as its
rank is free and what it needs is there; transfers take no time, or all the same.

    F of stage s                 needs F of stage s-1
    B (or I) of stage s          needs its own F, and B (or I) of stage s+1
    W of stage s                 needs its own I

The bubble is the share of the ranks' time, from the first action's start to the last one's end, in which they idle.

Transfers. NCCL carries out the transfers of two ranks in the order in which they were posted, and with one communicator for all
of them those of a rank with all its peers: if two ranks disagree about the order, both wait for ever. So there is one order for
all: by the time at which the simulation makes what is sent, then by stage, kind and micro batch. Each rank's program merges its
own part of it with its own actions, by time.

This cannot deadlock, whatever the real speeds are. Line up the actions (at their starts) and the transfers (at the ends of what
made them; first, where times are equal) of all ranks, and take the earliest that never completes. If it is a transfer, all that
its two ranks have before it is done, so both have posted it (posting does not block) and it is at the head of both queues: it
completes. If it is an action, what it waits for was received earlier in the line: it runs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

Kind = Literal["F", "B", "I", "W"]


class Action(NamedTuple):
    """One pass of one micro batch through one stage.

    F: forward; B: full backward; I: backward for the stage's input alone; W: for its weights alone.
    """

    stage: int
    kind: Kind
    micro: int

    def __str__(self) -> str:
        return f"{self.stage}{self.kind}{self.micro}"


@dataclass(frozen=True)
class Send:
    """What `action` made goes to rank `peer`: an F's activation to the next stage, a B's or I's gradient to the one before."""

    action: Action
    peer: int


@dataclass(frozen=True)
class Recv:
    """What `action` made comes from rank `peer`."""

    action: Action
    peer: int


Orders = list[list[Action]]
"""For each rank its actions, in the order in which it does them."""

Times = dict[Action, tuple[float, float]]
"""Start and end of each action."""


def unit_cost(action: Action) -> float:
    """Every pass takes as long as a forward pass; a full backward is two of them."""
    return 2 if action.kind == "B" else 1


def timeline(
    orders: Orders, owners: Sequence[int], cost: Callable[[Action], float] = unit_cost, travel: float = 0.0
) -> Times:
    """Start and end of every action, in the unit of `cost`, which must be positive. owners: rank of each stage. travel: how
    long a transfer to another rank takes, during which both go on.

    Raises ValueError, naming what each stuck rank waits at, where the orders deadlock.
    """
    times: Times = {}
    ends: dict[tuple[int, str, int], float] = {}
    place, clock = [0] * len(orders), [0.0] * len(orders)
    moved = True
    while moved:
        moved = False
        for rank, order in enumerate(orders):
            while place[rank] < len(order):
                action = order[place[rank]]
                needed = needs(action, len(owners))
                if any(result not in ends for result in needed):
                    break
                start = max([clock[rank], *(ends[it] + travel * (owners[it[0]] != rank) for it in needed)])
                clock[rank] = ends[result_of(action)] = start + cost(action)
                times[action] = (start, clock[rank])
                place[rank] += 1
                moved = True
    stuck = [f"rank {rank} at {order[i]}" for rank, (order, i) in enumerate(zip(orders, place, strict=True)) if i < len(order)]
    if stuck:
        raise ValueError(f"the orders deadlock: {', '.join(stuck)} wait for actions that never run")
    return times


def needs(action: Action, stages: int) -> list[tuple[int, str, int]]:
    """The results, as result_of names them, that an action needs."""
    stage, kind, micro = action
    if kind == "F":
        return [(stage - 1, "F", micro)] if stage else []
    if kind == "W":
        return [(stage, "I", micro)]
    return [(stage, "F", micro)] + ([(stage + 1, "I", micro)] if stage + 1 < stages else [])


def result_of(action: Action) -> tuple[int, str, int]:
    """Name of what an action makes. A full backward makes what I makes: the gradient of the stage's input."""
    return action.stage, "I" if action.kind == "B" else action.kind, action.micro


def bubble(times: Times, owners: Sequence[int]) -> float:
    """Share (0 .. 1) of the ranks' time in which they idle."""
    busy = sum(end - start for start, end in times.values())
    return 1 - busy / (len(set(owners)) * max(end for _, end in times.values()))


def in_flight(orders: Orders) -> list[int]:
    """For each rank the most stages' activations that it holds at once: from F on, to the end of B or W."""
    peaks = []
    for order in orders:
        held = peak = 0
        for action in order:
            held += {"F": 1, "B": -1, "I": 0, "W": -1}[action.kind]
            peak = max(peak, held)
        peaks.append(peak)
    return peaks


def program(orders: Orders, owners: Sequence[int], rank: int) -> list[Action | Send | Recv]:
    """All that a rank does, in order: its actions, and its sends and receives where they have to be posted.

    Post each without waiting; before an action, wait for the Recv that it needs, if it needs one, and for nothing else. Stages
    that are neighbours on one rank hand over there: nothing is listed for them.
    """
    return programs(orders, owners)[rank]


def programs(orders: Orders, owners: Sequence[int]) -> list[list[Action | Send | Recv]]:
    """The program of every rank."""
    lines: list[list[tuple[float, bool, Action, Action | Send | Recv]]] = [[] for _ in orders]
    for action, (start, end) in timeline(orders, owners).items():
        here, there = owners[action.stage], _destination(action, owners)
        lines[here].append((start, True, action, action))
        if there is not None and there != here:
            lines[here].append((end, False, action, Send(action, there)))
            lines[there].append((end, False, action, Recv(action, here)))
    return [_early([item for *_, item in sorted(own, key=lambda line: line[:3])]) for own in lines]


def _early(items: list[Action | Send | Recv]) -> list[Action | Send | Recv]:
    """Receives before the action during which they arrive: on a GPU a transfer starts after the work enqueued before it.

    The order of the transfers stays, so what is said above holds: what is sent during an action cannot depend on it unless the
    action's own result was sent in between.
    """
    for i in range(1, len(items)):
        if isinstance(items[i], Recv) and isinstance(items[i - 1], Action):
            items[i - 1], items[i] = items[i], items[i - 1]
    return items


def _destination(action: Action, owners: Sequence[int]) -> int | None:
    """The rank that needs what an action makes, or None."""
    if action.kind == "W":
        return None
    stage = action.stage + (1 if action.kind == "F" else -1)
    return owners[stage] if 0 <= stage < len(owners) else None
