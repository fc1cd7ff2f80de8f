"""What a job would take: of each rank that differs from the others its memory and its messages, and the pipeline's bubble.

Ranks of one pipeline stage do the same with tensors of the same size; where a dimension does not divide, one of those that have
most stands for all: the first of FSDP's shards, the last of the tensor-parallel ranks. So there is a step to take for each
pipeline rank, however many ranks there are; or for the first and the last of a row of them that are alike but for the number of
micro batches that they hold.

Memory repeats after a few micro batches: without a pipeline the second finds what every later one finds, and the third is the
last, in which gradients travel; with one, as many are enough as it takes until each rank holds the most that its schedule lets
it hold, with gradients there. Steps are taken with so many (`fewer_micro_batches`).

Messages are counted by the formulas of `titan.traffic`, which are equal to what ranks send (`titan trace`). A rank sends
(n - 1)/n of an all-gather, a reduce-scatter or an all-to-all among n ranks, twice as much of an all-reduce. Where k of them are
on its node, an all-to-all sends (n - k)/n to others. The rest goes round in a ring, in which one link of k leads to another
node, and the node's ports are shared: a k-th of what each sends.
"""

from __future__ import annotations

import multiprocessing
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.distributed as dist

from titan import zoo
from titan.config import Config, Degrees, accumulation, degrees
from titan.cores import cores
from titan.drawing.memory import KINDS, Story
from titan.dryrun.cluster import Cluster
from titan.dryrun.prices import Prices, leaving
from titan.dryrun.step import dry_step
from titan.dryrun.times import RankPace, StepTime, with_pipeline, without_pipeline
from titan.dryrun.work import Item
from titan.dryrun.world import build_without_memory, pretended, shapes_alone
from titan.holdings import in_words, parts_of, share
from titan.parallel import timeline
from titan.parallel.mesh import Mesh
from titan.parallel.schedules import table
from titan.rehearsal import FLAGS
from titan.traffic.step import expected

MANY_PASSES = 400
"""Passes of a block, of a second each hundred, from which on processes are worth their start."""
Show = Callable[[list[int]], Iterable[int]]
Moment = tuple[dict[str, int], str]
"""Kind of memory -> bytes, and the part of the step."""


class Sent(NamedTuple):
    """What a rank sends in a step over one dimension by one operation."""

    dimension: str
    op: str
    messages: int
    message_bytes: int
    """Of the messages as `titan trace` counts them."""
    ranks: int
    """Among how many."""
    near: int
    """Of them, those of its node, itself too."""
    inside: int
    """Bytes that leave the rank for others of its node."""
    between: int
    """And for other nodes."""


@dataclass(frozen=True)
class RankPlan:
    """Of one pipeline rank."""

    rank: int
    holds: str
    """Its modules, in words."""
    parameters: int
    """Elements that it holds."""
    peak: dict[str, int]
    """Kind -> bytes, at the fullest moment of a step."""
    where: str
    """The part of the step in which that is."""
    sent: list[Sent]
    story: Story | None
    """Its memory from change to change, in a step of few micro batches; None where it took none, and is like its neighbours."""

    @property
    def device_bytes(self) -> int:
        return on_device(self.peak)


@dataclass(frozen=True)
class JobPlan:
    """Of a job."""

    plan: Degrees
    ranks: list[RankPlan]
    """One of each pipeline rank, in order."""
    parameters: int
    """Of the whole model."""
    flops: int
    """Of a step, over all ranks."""
    bubble: float
    """Share of the ranks' time in which a pipeline idles, if all its stages are alike."""
    time: StepTime

    @property
    def fullest(self) -> RankPlan:
        return max(self.ranks, key=lambda rank: rank.device_bytes)


class Taken(NamedTuple):
    """What a rank's step says."""

    peak: Moment
    pace: RankPace
    story: Story


def on_device(peak: Mapping[str, int]) -> int:
    """Bytes of all kinds but what lies with the host."""
    return sum(size for kind, size in peak.items() if kind != "host")


def plan_job(
    config: Config, world: int, cluster: Cluster, show: Show = lambda ranks: ranks, processes: int | None = None
) -> JobPlan:
    """Take the steps. show: wraps the ranks of which one is taken, to show how far it is. processes: that take them; None: this
    one alone, or as many as there are cores where there is much to do.

    Raises ValueError where something cannot be built.
    """
    from titan.metrics.flops import flops_per_token

    plan = degrees(config.parallel, world)
    training, count = config.training, accumulation(config.training, plan.data_parallel)
    idle, held, schedule, near = 0.0, [1], None, cluster.links.gpus_per_node
    if plan.pp > 1:
        schedule = table(config.parallel.pp_schedule, plan.pp, config.parallel.pp_stages_per_rank, count)
        idle = timeline.bubble(timeline.timeline(*schedule), schedule.owners)
        held = timeline.in_flight(schedule.orders)
    looks = [look(config, rank, world, near) for rank in typical_ranks(plan)]
    places = ends([at.shapes for at in looks], held)
    stepping = steps([looks[place].rank for place in places], config, world, cluster, show, processes)
    taken = dict(zip(places, stepping, strict=True))
    peaks = {place: own.peak for place, own in taken.items()}
    like = [taken[max(p for p in places if p <= place)].pace for place in range(len(looks))]
    time = without_pipeline(like[0], count) if schedule is None else with_pipeline(like, schedule)
    ranks = []
    for place, at in enumerate(looks):
        peak, where = peaks[place] if place in peaks else between(place, peaks, held)
        story = taken[place].story if place in taken else None
        ranks.append(RankPlan(at.rank, at.holds, at.parameters, peak, where, at.sent, story))
    with torch.device("meta"):
        whole = zoo.make(config.model.name, config.model.config)
    tokens = training.global_batch_size * training.seq_len
    flops = flops_per_token(whole, training.seq_len).total * tokens
    return JobPlan(plan, ranks, sum(p.numel() for p in whole.parameters()), flops, idle, time)


def steps(
    ranks: list[int], config: Config, world: int, cluster: Cluster, show: Show, processes: int | None
) -> Iterator[Taken]:
    """Of each rank a step."""
    fewer = fewer_micro_batches(config, world)
    plan = degrees(config.parallel, world)
    passes = config.model.config.n_layers * accumulation(fewer.training, plan.data_parallel) * len(ranks) // plan.pp
    if processes is None:
        processes = min(len(ranks), cores()) if passes >= MANY_PASSES else 1
    given = fewer, world, cluster
    if processes == 1:
        yield from (step(rank, *given) for rank in show(ranks))
        return
    with ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn")) as pool:
        waiting = [pool.submit(step, rank, *given) for rank in ranks]
        yield from (future.result() for future, _ in zip(waiting, show(ranks), strict=True))


def step(rank: int, fewer: Config, world: int, cluster: Cluster) -> Taken:
    """Of one."""
    seen = dry_step(fewer, rank, world, cluster.links.gpus_per_node)
    pace = RankPace(fewer, seen.work, Prices(cluster, fewer.precision.tf32))
    return Taken(fullest_moment(seen.memory), pace, seen.memory.in_order())


def typical_ranks(plan: Degrees) -> list[int]:
    """Of each pipeline rank the one of those alike that has most. Ranks lie as `titan.parallel.mesh` has them."""
    return [place * (plan.world // plan.pp) + plan.tp - 1 for place in range(plan.pp)]


def ends(shapes: list[object], held: list[int]) -> list[int]:
    """The pipeline ranks of which a step has to be taken: of neighbours with the same weights, which hold fewer and fewer micro
    batches, the first and the last. What the others have lies between, in equal steps, but for a message that comes early."""
    found = []
    for place, own in enumerate(shapes):
        inside = 0 < place < len(shapes) - 1 and shapes[place - 1] == own == shapes[place + 1]
        if not (inside and held[place - 1] >= held[place] >= held[place + 1]):
            found.append(place)
    return found


def between(place: int, peaks: Mapping[int, Moment], held: list[int]) -> Moment:
    """A pipeline rank's fullest moment from those of the measured ranks before and after."""
    before, after = max(p for p in peaks if p < place), min(p for p in peaks if p > place)
    part = (held[before] - held[place]) / (held[before] - held[after]) if held[before] != held[after] else 0.0
    first, last = peaks[before][0], peaks[after][0]
    return {kind: round(first[kind] + part * (last[kind] - first[kind])) for kind in first}, peaks[before][1]


def work_of_ranks(config: Config, world: int) -> list[Item]:
    """What the ranks of a step do, all that differs, one rank after the other: of one node, as `--calibrate` measures it."""
    fewer = fewer_micro_batches(config, world)
    seen = [dry_step(fewer, rank, world, world) for rank in typical_ranks(degrees(config.parallel, world))]
    return [item for rank in seen for span in rank.work for item in span.items]


def fullest_moment(story: Story) -> Moment:
    """Of a rank's step."""
    when, sizes = story.peak
    where = next((name for at, name in reversed(story.phases) if at <= when), story.phases[0][1])
    return dict(zip(KINDS, sizes, strict=True)), where


class Look(NamedTuple):
    """What is known of a rank before it takes a step."""

    rank: int
    holds: str
    parameters: int
    shapes: object
    """Equal for ranks whose weights are alike."""
    sent: list[Sent]


def look(config: Config, rank: int, world: int, gpus_per_node: int) -> Look:
    """Build a rank's part, and count its messages."""
    with pretended(config, rank, world) as mesh:
        parts = build_without_memory(config, mesh, shapes_alone())
        held = parts_of(parts.model, parts.cuts)
        flows = expected(config, mesh, parts, len(FLAGS))
        groups = ranks_of_dimensions(mesh, world)
        words = in_words(held, parts.table)
        few = int(config.parallel.reshard_after_forward) if config.parallel.reshard_after_forward.isdecimal() else 0
        shards = "" if mesh.fsdp is None else (mesh.fsdp.mesh_dim_names or ("",))[-1]
    sums: dict[tuple[str, str, int], list[int]] = {}
    for flow in flows:
        again = (flow.phase, flow.dimension, flow.op) == ("backward", shards, "all_gather")  # within a copy that was kept
        total = sums.setdefault((flow.dimension, flow.op, few if again else 0), [0, 0])
        total[0], total[1] = total[0] + flow.count, total[1] + flow.bytes
    sent = []
    for (dimension, op, few), (count, size) in sums.items():
        group = groups[dimension]
        if few:
            begin = group.index(rank) // few * few
            group = group[begin : begin + few]
        near = sum(member // gpus_per_node == rank // gpus_per_node for member in group)
        sent.append(Sent(dimension, op, count, size, len(group), near, *leaving(op, size, len(group), near)))
    block = parts.table.block.count(".") + 1
    shapes = Counter((tuple(name.split(".")[block:]) or name, part.size) for name, part in held.items())
    return Look(rank, words, share(held)[0], shapes, sent)


def fewer_micro_batches(config: Config, world: int) -> Config:
    """The same plan with no more micro batches than it takes to meet the fullest moment; left out are the others' tokens and
    labels, which are on the device from a step's beginning, some bytes for each token."""
    plan = degrees(config.parallel, world)
    count = accumulation(config.training, plan.data_parallel)
    enough = min(count, 3)
    if plan.pp > 1:
        name, stages = config.parallel.pp_schedule, config.parallel.pp_stages_per_rank
        if name.endswith(".csv"):
            return config
        most = timeline.in_flight(table(name, plan.pp, stages, count).orders)
        # Gradients have to be there as well: after one more than a rank holds, or of rounds of micro batches after a second.
        few = {"1F1B": range(plan.pp + 2, count), "DualPipeV": range(3 * plan.pp, count, plan.pp)}
        worth = few.get(name, range(2 * plan.pp, count, plan.pp))
        held = {m: timeline.in_flight(table(name, plan.pp, stages, m).orders) for m in worth}
        enough = next((m for m in held if held[m] == most), count)
    if count == enough:
        return config
    size = enough * plan.data_parallel * config.training.micro_batch_size
    return replace(config, training=replace(config.training, global_batch_size=size))


def ranks_of_dimensions(mesh: Mesh, world: int) -> dict[str, list[int]]:
    """Dimension, as in `titan trace` -> the ranks that this one talks to over it, itself among them."""
    found = {"all": list(range(world))}
    for axes in (mesh.axes, mesh.fsdp):
        for name in axes.mesh_dim_names or () if axes is not None else ():
            assert axes is not None
            found[name] = dist.get_process_group_ranks(axes[name].get_group())
    return found
