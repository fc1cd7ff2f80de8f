"""Memory by kind of the fullest pipeline rank, at the step's fullest moment, and whether that fits."""

from __future__ import annotations

import torch

from titan.config import Config, accumulation
from titan.drawing.memory import COLOURS, svg
from titan.drawing.svg import GREY
from titan.dryrun.cluster import Cluster
from titan.dryrun.plan import JobPlan, RankPlan, fewer_micro_batches
from titan.dryrun.words import GIB, MARGIN
from titan.explaining.facts import Facts
from titan.explaining.job import micro_batches
from titan.explaining.numbers import Number, figure, first_that_gives, given, worked
from titan.explaining.parameters import of_rank
from titan.explaining.pieces import Html, bar, html, name, paragraph, picture, plain, section

LESSON = (
    "A GPU's memory holds what lasts (parameters, the optimizer's two numbers for each, gradients) and what comes and goes: "
    "what the forward pass keeps for the backward pass, weights borrowed from other ranks, messages. What lasts has a "
    "formula. What comes and goes depends on every operation's order: the dry run takes a step of the real code with tensors "
    "that have a shape and no memory, and notes the fullest moment."
)
MEANINGS = {
    "parameters": "the shards that the rank owns",
    "optimizer": "AdamW's two running averages for each parameter, and a step count for each tensor",
    "gradients": "what the step is made of",
    "gathered": "weights of a block, whole while it runs",
    "activations": "what forward passes made and backward passes need",
    "backward": "what backward passes made",
    "buffers": "messages, sums, norms",
    "host": "with the host, not on the GPU",
    "reserved": "what a GPU takes before any tensor: the driver, libraries",
}
NO_FORMULA = "found by the dry run, no formula"


def memory(config: Config, plan: JobPlan, cluster: Cluster, facts: Facts) -> Html:
    """The section."""
    full, gpu = plan.fullest, cluster.gpu
    place = plan.ranks.index(full)
    most = max(gpu.memory_gib * GIB, full.device_bytes + gpu.reserved_gib * GIB)
    rows = [
        bar(kind, number, number.value / most, COLOURS[kind], MEANINGS[kind], "" if number.formula else f"; {NO_FORMULA}")
        for kind, number in kinds(config, plan, facts, place).items()
    ]
    reserved = given(gpu.reserved_gib, "GiB", "cluster.gpu.reserved_gib")
    rows.append(
        bar("reserved", reserved, reserved.value * GIB / most, GREY, MEANINGS["reserved"], "; a figure of the cluster's file")
    )
    total = in_all(full, cluster)
    rows.append(bar("in all", total, total.value * GIB / most, "var(--ink)"))
    who = (
        html("A GPU of ", name(f"pipeline rank {place} ({full.holds})"), ", the fullest")
        if len(plan.ranks) > 1
        else html("A GPU")
    )
    head = paragraph(
        who, f", at the step's fullest moment: {full.where}. The full width is its memory, ", memory_of(cluster), "."
    )
    over = over_the_step(config, plan, place)
    return section("memory", "Memory", LESSON, head, *rows, *verdict(total, cluster), *over, *others(plan, cluster, most))


def over_the_step(config: Config, plan: JobPlan, place: int) -> list[Html]:
    """A picture of what the rank holds when, or of the rank nearest to it that took a step."""
    taken = [other for other, rank in enumerate(plan.ranks) if rank.story is not None]
    nearest = min(taken, key=lambda other: abs(other - place))
    story, fewer = plan.ranks[nearest].story, fewer_micro_batches(config, plan.plan.world)
    assert story is not None
    who = f"pipeline rank {nearest}" if len(plan.ranks) > 1 else "a GPU"
    count = given(accumulation(fewer.training, plan.plan.data_parallel))
    said = html("Of ", name(who), " in a step of ", count, " of its ", plain(micro_batches(config, plan)), " micro batches.")
    drawn = svg(f"Memory of {who} in a step", story, "each change of memory as wide as another, however long it lasts")
    return [Html("<h3>Over the step</h3>"), paragraph(said), picture(drawn)]


def kinds(config: Config, plan: JobPlan, facts: Facts, place: int) -> dict[str, Number]:
    """Kind -> bytes, by formula where one gives what the dry run found."""
    rank, peak = facts.ranks[place], plan.ranks[place].peak
    held, tensors = plan.ranks[place].parameters, len(rank.parts)
    sizes = {part.itemsize for part in rank.parts.values()}
    itemsize = max(sizes, default=4)
    narrow = getattr(torch, config.precision.param).itemsize
    both = f" x {rank.shards:,} ({rank.shards_named.replace('dp_shard_cp', 'dp_shard x cp')})" if rank.shards else ""
    formulas = {
        "parameters": [f"({of_rank(plan, facts, place)}) x {itemsize} bytes"],
        "optimizer": [f"2 (averages) x {held:,} (parameters) x {itemsize} bytes + {tensors:,} (tensors) x 4 bytes"],
        "gradients": [f"{held:,} (parameters) x {itemsize} bytes", f"{held:,} (parameters){both} x {itemsize} bytes (whole)"],
        "gathered": [f"{held:,} (parameters){both} x {narrow} bytes (all blocks whole)"],
    }
    return {kind: first_that_gives(size, "memory", formulas.get(kind, [])) for kind, size in peak.items() if size}


def in_all(rank: RankPlan, cluster: Cluster) -> Number:
    """What a GPU has taken, in GiB."""
    said = [f"{figure(float(f'{size / GIB:.5g}'))} ({kind})" for kind, size in rank.peak.items() if size and kind != "host"]
    return worked(" + ".join([*said, f"{figure(cluster.gpu.reserved_gib)} (reserved)"]), "GiB")


def memory_of(cluster: Cluster) -> Number:
    return given(cluster.gpu.memory_gib, "GiB", "cluster.gpu.memory_gib")


def verdict(total: Number, cluster: Cluster) -> list[Html]:
    """Whether it fits, with what is left for an allocator's fragments."""
    has = figure(cluster.gpu.memory_gib)
    usable = worked(f"{has} (memory) x (1 - {MARGIN})", "GiB")
    room = worked(f"{usable.value:.6g} (usable) - {figure(float(f'{total.value:.6g}'))} (in all)", "GiB")
    share = worked(f"{figure(float(f'{total.value:.6g}'))} (in all) / {has} (memory)", "share")
    said = "It fits" if total.value <= usable.value else "It does not fit"
    why = "A twentieth is left for what an allocator loses to fragments. "
    return [
        paragraph(Html(f"<strong>{said}</strong>"), " on ", name(cluster.gpu.name), ": ", share, kind="verdict"),
        paragraph(why, "Usable: ", usable, "; room: ", room, "."),
    ]


def others(plan: JobPlan, cluster: Cluster, most: float) -> list[Html]:
    """The other pipeline ranks, one below the other."""
    if len(plan.ranks) == 1:
        return []
    found = [Html("<h3>Every pipeline rank</h3>")]
    for place, rank in enumerate(plan.ranks):
        total = in_all(rank, cluster)
        said = html(name(f"pipeline rank {place}"), ": ", name(rank.holds))
        found.append(bar(said, total, total.value * GIB / most, COLOURS["activations"]))
    return found
