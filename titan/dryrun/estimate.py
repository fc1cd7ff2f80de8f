"""What a plan would take, in a millisecond: composed of blocks, not of a step. `titan plan --search` ranks plans by it.

A dry step of a whole plan takes seconds to minutes, too long to try thousands. But blocks are alike, and a block does not know
how many there are, nor who else holds its weights. So models of one and of two blocks take dry steps with one and with two
sequences, for each way to cut a block (tp, cp and its method, recompute, Float8), and what they take is

    a + b sequences + c blocks + d sequences x blocks        seconds forward and backward, bytes kept for the backward pass

The first two, embedding and loss, know of tp, cp and Float8 alone: of other ways with the same a model of one block is enough.
Who else holds the weights a block knows only where they travel in Float8; else the models' are sharded.
From that a plan is put together by formulas:

    FSDP        a block's gather and its compute, or its sum and its compute: the longer of both, if the device is asynchronous
    pipeline    the slowest rank's passes over 1 - bubble, the schedule's with equal stages; the last stage has the head
    memory      what a rank holds; what micro batches in flight keep; what the loss, or a block's backward, takes on top

It is another model of what the dry run does, so it only ranks: the plans that it puts first take a dry step each.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from functools import cache
from typing import Any, NamedTuple, cast

import torch

from titan import zoo
from titan.config import Config, Degrees, accumulation
from titan.drawing.memory import KINDS, Story
from titan.dryrun.cluster import Cluster
from titan.dryrun.pace import FSDP
from titan.dryrun.prices import Prices
from titan.dryrun.step import dry_step
from titan.dryrun.work import Message, Operation, Span, Wait, as_compiled
from titan.parallel import timeline
from titan.parallel.schedules import owner, stages_per_rank, table
from titan.parallel.stages import block_costs, shares
from titan.precision.float8_layers import float8_layers

ADAMW_BYTES = 28
"""Moved for an element by the optimizer: weight, gradient and two states read, all but the gradient written."""
CLIP_BYTES = 12
"""And by the gradients' norm, read once, and their scaling."""
MADE = [KINDS.index(kind) for kind in ("activations", "backward", "buffers")]


class Cut(NamedTuple):
    """What a block's costs depend on, but for how many sequences there are."""

    tp: int
    cp: int
    cp_method: str
    recompute: str
    float8: str
    sharded: bool = True
    """Whether FSDP has the weights. It matters where they travel in Float8: else each pass casts them."""


class Costs(NamedTuple):
    """Of a micro batch: seconds of the device forward and backward, of the host, of the host for FSDP; bytes kept in between;
    besides these while the loss is made, and in a block's backward; in all at the end, with the embedding's gradient."""

    forward: float
    backward: float
    host: float
    host_fsdp: float
    kept: float
    loss: float
    again: float
    end: float


class Fit(NamedTuple):
    """Costs as a function of sequences and blocks: those of (sequences, blocks) = (1, 1), (1, 2), (2, 1), (2, 2)."""

    corners: tuple[Costs, ...]

    def block(self, sequences: int) -> Costs:
        """Of one block."""
        return Costs(*(b - a for a, b in self._at(sequences)))

    def rest(self, sequences: int) -> Costs:
        """Of what there is besides blocks."""
        return Costs(*(2 * a - b for a, b in self._at(sequences)))

    def peaks(self, sequences: int) -> Costs:
        """With one block: what does not grow with their number."""
        return Costs(*(a for a, _ in self._at(sequences)))

    def _at(self, sequences: int) -> list[tuple[float, float]]:
        line = lambda one, two: one + (sequences - 1) * (two - one)  # noqa: E731
        return [(line(a, c), line(b, d)) for a, b, c, d in zip(*self.corners, strict=True)]


def measure(cut: Cut, config: Config, clusters: Sequence[Cluster], like: Sequence[Fit] = ()) -> list[Fit]:
    """Take the dry steps, and price them on each cluster. like: fits of a cut with the same tp, cp and Float8 on these.

    Raises ValueError where a block cannot be cut so.
    """
    prices = [Prices(cluster, config.precision.tf32) for cluster in clusters]
    one = [_corner(cut, config, prices, sequences, 1) for sequences in (1, 2)]
    if like:
        two = [[_one_more(own, fit.rest(s)) for own, fit in zip(one[s - 1], like, strict=True)] for s in (1, 2)]
    else:
        two = [_corner(cut, config, prices, sequences, 2) for sequences in (1, 2)]
    return [Fit(own) for own in zip(one[0], two[0], one[1], two[1], strict=True)]


def _one_more(one: Costs, rest: Costs) -> Costs:
    """With a second block, where the rest is known. What does not grow with their number stays, and `end` is not known."""
    grown = (2 * own - other for own, other in zip(one, rest, strict=True))
    return Costs(*grown)._replace(loss=one.loss, again=one.again, end=one.end)


def _corner(cut: Cut, config: Config, prices: Sequence[Prices], sequences: int, blocks: int) -> list[Costs]:
    shards = 2 if cut.sharded else 1
    keys: dict[str, Any] = {"dp_replicate": 1, "dp_shard": shards, "tp": cut.tp, "cp": cut.cp, "pp": 1}
    keys["cp_method"] = cut.cp_method
    mode, float8 = cast(Any, cut.recompute), cast(Any, cut.float8)
    config = replace(
        config,
        model=replace(config.model, config=replace(config.model.config, n_layers=blocks)),
        training=replace(config.training, global_batch_size=shards * sequences, micro_batch_size=sequences),
        parallel=replace(config.parallel, **keys, pp_split=[], reshard_after_forward="auto"),
        recompute=replace(config.recompute, mode=mode),
        precision=replace(config.precision, float8=float8),
    )
    seen = dry_step(config, cut.tp - 1, shards * cut.tp * cut.cp, prices[0].cluster.links.gpus_per_node)
    (span,) = (span for span in as_compiled(config, seen.work) if span.where == 0 and span.items)
    sizes = _bytes(seen.memory)
    return [Costs(*_seconds(span, of), *sizes) for of in prices]


def _seconds(span: Span, prices: Prices) -> tuple[float, float, float, float]:
    """As Costs has them, without FSDP's part on the device."""
    device, host, of_fsdp = [0.0, 0.0], [0.0, 0.0], False
    ends: dict[Message, float] = {}
    for item in span.items:
        if isinstance(item, Operation):
            of_fsdp = item.name.startswith(FSDP) or (of_fsdp and item.free)
            host[of_fsdp] += prices.launch
            if not of_fsdp:
                device[item.backward] += prices.operation(item)
        elif isinstance(item, Wait):
            device[item.message.backward] += max(0.0, ends.pop(item.message, 0.0) - sum(device))
        elif item.posted and prices.cluster.gpu.asynchronous:
            ends[item] = max([sum(device), *ends.values()]) + prices.message(item)
        elif not of_fsdp:
            device[item.backward] += prices.message(item)
    return device[0], device[1], host[0], host[1]


def _bytes(story: Story) -> tuple[int, int, int, int]:
    """As Costs has them."""
    begins = next((when for when, name in story.phases if name == "backward"), math.inf)
    points = [(when, sum(sizes[kind] for kind in MADE), sizes) for when, sizes in story.points]
    kept = [size for when, size, _ in points if when <= begins][-1]
    released = next((i for i, (when, _, sizes) in enumerate(points) if when > begins and sizes[MADE[0]] < kept), len(points))
    loss = max(size for _, size, _ in points[:released]) - kept
    again = max((sizes[MADE[1]] for when, _, sizes in points if when > begins), default=0)
    return kept, loss, again, max((size for _, size, _ in points[released:]), default=0)


class Model(NamedTuple):
    """Elements of a block's weights, of those that Float8 would take, of all others, and of those of these that a pipeline's
    first or last rank has; multiplications of blocks, for their sharing out."""

    block: int
    eight: int
    rest: int
    end: float
    costs: tuple[float, ...]


def model_of(config: Config) -> Model:
    """Of a config's model."""
    with torch.device("meta"):
        whole = zoo.make(config.model.name, config.model.config)
    sharding = zoo.sharding(config.model.name, config.model.config)
    costs = tuple(block_costs(whole, sharding, config.training.seq_len))
    inside = sharding.block.split("*")[0]
    blocks = sum(p.numel() for name, p in whole.named_parameters() if name.startswith(inside))
    rest = sum(p.numel() for p in whole.parameters()) - blocks
    eight = 0
    with suppress(ValueError):  # a word of float8_skip that fits nothing, which check.py refuses where it matters
        layers = float8_layers(sharding, replace(config.precision, float8="tensorwise"))
        eight = sum(outputs * inputs for outputs, inputs in layers.values()) // len(costs)
    return Model(blocks // len(costs), eight, rest, rest if sharding.tied else rest / 2, costs)


class Estimate(NamedTuple):
    """Of a plan."""

    seconds: float
    bytes: float
    """Of the fullest rank, tensors alone."""


class _Weights(NamedTuple):
    """What FSDP and the optimizer do with weights. Seconds of a block: its gather, its sum, and to take it out of messages."""

    shards: int
    width: int
    """Bytes of an element as it is computed with."""
    gathered: float
    """And as FSDP gathers blocks, on average."""
    copied: int
    """And of a copy in that format, which each pass makes, and keeps for the backward pass, where FSDP does not; where it was
    measured with the block, 0."""
    gather: float
    reduce: float
    copies: tuple[float, float]
    after: float
    """Seconds of the optimizer and the norm."""
    sums: float
    """Over replicas."""


def _weights(config: Config, plan: Degrees, model: Model, prices: Prices) -> _Weights:
    gpu, gpus = prices.cluster.gpu, prices.cluster.links.gpus_per_node
    width = 2 if config.precision.param == "bfloat16" else 4
    eight = model.eight / model.block if config.precision.float8 == "tensorwise" else 0.0
    gathered = width - (width - 1) * eight
    summed = 2 if config.precision.reduce == "bfloat16" and plan.pp == 1 else 4
    shards, own = plan.dp_shard * plan.cp, model.block / plan.tp
    near, rate = min(shards, max(1, gpus // plan.tp)), gpu.memory_gb_per_second * gpu.memory_reach * 1e9
    held = (model.block * len(model.costs) + model.rest) / plan.tp / plan.pp / shards
    near_copies = min(plan.dp_replicate, max(1, gpus // (shards * plan.tp)))
    # FSDP holds what waits for the replicas only in float32; else it sums over them after each micro batch.
    sums = accumulation(config.training, plan.data_parallel) if shards > 1 and summed == 2 else 1
    copies = (2 * own * gathered / rate, own * (width + summed) / rate) if shards > 1 else (0.0, 0.0)
    return _Weights(
        shards,
        width,
        gathered,
        width if width == 2 and shards == 1 and not eight else 0,
        prices.sent("all_gather", int(own * gathered), shards, near),
        prices.sent("reduce_scatter", int(own * summed), shards, near),
        copies,
        held * (ADAMW_BYTES + CLIP_BYTES) / rate,
        sums * prices.sent("all_reduce", int(held * summed), plan.dp_replicate, near_copies),
    )


def estimate(config: Config, plan: Degrees, fit: Fit, model: Model, prices: Prices) -> Estimate:
    """Of a config under a plan; fit: of its block's cut."""
    weights = _weights(config, plan, model, prices)
    return (_alone if plan.pp == 1 else _pipeline)(config, plan, fit, model, prices, weights)


def _alone(config: Config, plan: Degrees, fit: Fit, model: Model, prices: Prices, weights: _Weights) -> Estimate:
    """Without a pipeline."""
    training, layers = config.training, len(model.costs)
    micros = accumulation(training, plan.data_parallel)
    block, rest, peaks = (of(training.micro_batch_size) for of in (fit.block, fit.rest, fit.peaks))
    never = config.parallel.reshard_after_forward == "never"
    beside = max if prices.cluster.gpu.asynchronous else lambda *all: sum(all)
    out, back = weights.copies
    forward = layers * beside(block.forward + out, weights.gather) + rest.forward + weights.gather
    again = 0.0 if never else weights.gather
    backward = layers * beside(block.backward + back + (0 if never else out), again + weights.reduce) + rest.backward
    host = layers * block.host + rest.host + (layers * block.host_fsdp + rest.host_fsdp if weights.shards > 1 else 0.0)
    micro = _with_host(forward + backward + weights.reduce, host, prices)
    hidden = backward if prices.cluster.gpu.asynchronous else 0.0
    seconds = micros * micro + max(0.0, weights.sums - hidden) + weights.after
    elements = (model.block * layers + model.rest) / plan.tp
    own = 0.0 if config.offload.states else elements / weights.shards * 16
    most = layers * block.kept + rest.kept + max(peaks.loss, peaks.again)
    if weights.shards > 1:
        own += (layers if never else 2) * model.block / plan.tp * weights.gathered + model.rest / 2 / plan.tp * weights.width
    else:
        own += elements * weights.copied
    buckets = elements * 4 if plan.dp_replicate > 1 and weights.shards == 1 else 0.0
    return Estimate(seconds, own + max(most, peaks.end, buckets))


def _with_host(device: float, host: float, prices: Prices) -> float:
    """The host, which starts operations, runs ahead of a device that works by itself."""
    return max(device, host) if prices.cluster.gpu.asynchronous else device + host


def _pipeline(config: Config, plan: Degrees, fit: Fit, model: Model, prices: Prices, weights: _Weights) -> Estimate:
    """With one."""
    training, parallel = config.training, config.parallel
    micros = accumulation(training, plan.data_parallel)
    block, rest, peaks = (of(training.micro_batch_size) for of in (fit.block, fit.rest, fit.peaks))
    each = parallel.pp_stages_per_rank or stages_per_rank(parallel.pp_schedule)
    idle, flight = _schedule(parallel.pp_schedule, plan.pp, parallel.pp_stages_per_rank, micros)
    owners = [owner(parallel.pp_schedule, plan.pp, stage) for stage in range(plan.pp * each)]
    sizes = parallel.pp_split or _layers(model.costs, plan.pp * each)
    layers = [sum(n for n, rank in zip(sizes, owners, strict=True) if rank == own) for own in range(plan.pp)]
    busy = [_with_host(n * (block.forward + block.backward), n * block.host, prices) for n in layers]
    busy[owners[-1]] += _with_host(rest.forward + rest.backward, rest.host, prices)
    tokens = training.micro_batch_size * training.seq_len // plan.cp // plan.tp
    far = 1 if plan.world > prices.cluster.links.gpus_per_node else plan.pp
    travel = prices.sent("send", tokens * config.model.config.dim * weights.width, plan.pp, far)
    once = max(layers) * (weights.gather + (weights.reduce if weights.shards > 1 else 0.0) + sum(weights.copies)) + weights.sums
    seconds = micros * max(busy) / (1 - idle) + 2 * (plan.pp - 1) * travel + once + weights.after
    most = 0.0
    for rank, n in enumerate(layers):
        ends = (rank == owners[0]) + (rank == owners[-1])
        blocks, others = n * model.block / plan.tp, model.end * min(ends, 1 if model.end == model.rest else 2) / plan.tp
        elements = blocks + others
        whole = 4 * elements + (blocks * weights.gathered + others * weights.width if weights.shards > 1 else 0.0)
        made = flight[rank] * n / each * (block.kept + weights.copied * model.block / plan.tp)
        made += rest.kept + max(peaks.loss, peaks.again) if rank == owners[-1] else peaks.again
        held = 0.0 if config.offload.states else elements * 12 / weights.shards
        most = max(most, held + whole + made)
    return Estimate(seconds, most)


@cache
def _schedule(name: str, ranks: int, stages: int, micros: int) -> tuple[float, tuple[int, ...]]:
    """A schedule's bubble with equal stages, and what its ranks hold.

    Both are simulated. From two rounds of micro batches on ranks idle no longer with more of them, nor hold more, but in GPipe.
    """
    few = 2 * ranks if micros > 2 * ranks and micros % ranks == 0 and name != "GPipe" else micros
    orders, owners = table(name, ranks, stages, few)
    idle = timeline.bubble(timeline.timeline(orders, owners), owners)
    return idle / (idle + (1 - idle) * micros / few), tuple(timeline.in_flight(orders))


@cache
def _layers(costs: tuple[float, ...], stages: int) -> tuple[int, ...]:
    return tuple(shares(costs, stages))
