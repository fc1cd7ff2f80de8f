"""The mesh: a button a rank; pressed, it tells what the rank holds, what it sees, and who its neighbours are.

Every rank's words stand in a folded list below, which is there without a script; the script only brings the chosen rank's
beside the picture, where paper has them as well, and marks its neighbours. Of a large world as many of each dimension are
drawn as fit MOST cells, those that talk most first: tp, pp, cp, dp_shard, dp_replicate.
"""

from __future__ import annotations

from html import escape
from math import prod

from titan.config import Config, Degrees
from titan.drawing.mesh import COLOURS, Place, places, words
from titan.drawing.shards import ranges
from titan.drawing.svg import BLUE
from titan.dryrun.cluster import Cluster
from titan.dryrun.plan import JobPlan
from titan.explaining.job import micro_batches, samples_of_rank
from titan.explaining.numbers import given, worked
from titan.explaining.pieces import Html, folded, html, listed, name, paragraph, section

MOST, MOST_COLUMNS = 64, 16
FIELDS = {"tp": "tp", "pp": "pp", "cp": "cp", "dp_shard": "shard", "dp_replicate": "replicate"}
"""Dimension -> its field of a Place, in the order in which they are drawn."""
LESSON = (
    "Ranks stand on a grid with an axis for each dimension of the plan. Two ranks that differ on one axis alone are "
    "neighbours there, and only neighbours talk. Press a rank to see what it holds and who they are."
)


def mesh(config: Config, plan: JobPlan, cluster: Cluster) -> Html:
    """The section."""
    counts = drawn(plan)
    degrees = plan.plan
    left = {key: count for key, count in counts.items() if count < getattr(degrees, key)}
    note = [
        "A colour: ranks that see the same samples",
        "; after seven colours they begin again. " if degrees.data_parallel > 7 else ". ",
    ]
    parts = [f"the first {count} of {getattr(degrees, key):,} of {key}" for key, count in left.items()]
    some = (
        paragraph("Not all ranks are drawn: ", name(", ".join(parts)), ". The others are alike.", kind="note")
        if left
        else Html("")
    )
    columns = across(counts)
    body, items = [], []
    for stage in range(counts["pp"]):
        ranks = [at for at in places(Degrees(**counts)) if at.pp == stage]
        said = html(name(f"pipeline rank {stage}"), ": ") if degrees.pp > 1 else Html("")
        body.append(paragraph(said, name(plan.ranks[stage].holds), kind="band"))
        cells = "".join(cell(number(at, plan), at, plan) for at in ranks)
        body.append(Html(f'<div class="ranks" style="--columns:{columns}">{cells}</div>'))
        items += [panel(at, config, plan, cluster) for at in ranks]
    aside = Html('<div id="rank" class="card" aria-live="polite" hidden></div>')
    every = folded("Every rank that is drawn, in words", Html(f'<ul class="every">{"".join(items)}</ul>'))
    return section("mesh", "The mesh", LESSON, paragraph(*note, layout(counts)), some, *body, aside, every)


def drawn(plan: JobPlan) -> dict[str, int]:
    """How many of each dimension are drawn."""
    counts: dict[str, int] = {}
    for key in FIELDS:
        counts[key] = max(1, min(getattr(plan.plan, key), MOST // prod(counts.values())))
    return counts


def number(at: Place, plan: JobPlan) -> int:
    """A place's rank: the last axis goes fastest."""
    d = plan.plan
    return (((at.pp * d.dp_replicate + at.replicate) * d.dp_shard + at.shard) * d.cp + at.cp) * d.tp + at.tp


def across(counts: dict[str, int]) -> int:
    """Columns: those that talk most side by side; where a row would be long, it goes on below."""
    wide = counts["cp"] * counts["tp"]
    for key in ("dp_shard", "dp_replicate"):
        wide = counts[key] if wide == 1 else wide
    return wide if wide <= MOST_COLUMNS else 8


def layout(counts: dict[str, int]) -> str:
    """What goes which way, in words."""
    row = [key for key in ("cp", "tp") if counts[key] > 1]
    down = [key for key in ("dp_replicate", "dp_shard") if counts[key] > 1]
    if not row and down:
        row = [down.pop()]
    said = f"From left to right: {', then '.join(row)}. " if row else ""
    return said + (f"From top to bottom: {', then '.join(down)}." if down else "")


def cell(rank: int, at: Place, plan: JobPlan) -> str:
    """A button."""
    colour = COLOURS[(at.replicate * plan.plan.dp_shard + at.shard) % len(COLOURS)]
    place = ",".join(str(getattr(at, field)) for field in FIELDS.values())
    ink = "#fff" if colour == BLUE else "#111"
    said = f"rank {rank}: {words(plan.plan, at)}"
    data = f'data-rank="{rank}" data-at="{place}" aria-label="{escape(said)}"'
    return f'<button type="button" class="name" {data} style="background:{colour};color:{ink}">{rank}</button>'


def panel(at: Place, config: Config, plan: JobPlan, cluster: Cluster) -> Html:
    """A rank in words."""
    d, rank, near = plan.plan, number(at, plan), cluster.links.gpus_per_node
    stage = plan.ranks[at.pp]
    node = worked(f"floor({rank:,} (rank) / {near:,} (gpus_per_node))")
    lines = [html("node: ", node)]
    lines.append(
        html("holds: ", name(stage.holds), "; ", given(stage.parameters, "parameters", "holdings"), " or a little less")
    )
    each = samples_of_rank(config, plan)
    index = place_among_data(at, d)
    lines.append(html("first of its samples in a batch: ", worked(f"{index} x ({each})")))
    lines.append(html("last: ", worked(f"({index} + 1) x ({each}) - 1")))
    lines.append(html("micro batches of these: ", micro_batches(config, plan)))
    if d.cp > 1:
        lines += tokens(at, config, d.cp)
    for key, members in neighbours(at, plan).items():
        where = "all in its node" if len({member // near for member in members}) == 1 else "on several nodes"
        lines.append(
            html(
                f"neighbours by {key}: ",
                Html(f'<span class="name" data-neighbours="{key}">{ranges(members)}</span>'),
                f", {where}",
            )
        )
    title = html(Html("<strong>"), name(f"rank {rank}: {words(d, at)}"), Html("</strong>"))
    return Html(f'<li id="rank-{rank}">{title}{listed(lines, "numbers")}</li>')


def place_among_data(at: Place, plan: Degrees) -> str:
    """Of a rank among those that see different samples, a formula."""
    replicate, shard = f"{at.replicate:,} (place in dp_replicate)", f"{at.shard:,} (place in dp_shard)"
    if plan.dp_replicate > 1 and plan.dp_shard > 1:
        return f"({replicate} x {plan.dp_shard:,} (dp_shard) + {shard})"
    return replicate if plan.dp_replicate > 1 else shard if plan.dp_shard > 1 else "0 (sees all)"


def tokens(at: Place, config: Config, cp: int) -> list[Html]:
    """Under context parallelism a rank has a chunk from a sequence's head and one from its tail."""
    chunk = f"{config.training.seq_len:,} (seq_len) / (2 x {cp:,} (cp))"
    head, tail = f"{at.cp:,} (place in cp)", f"(2 x {cp:,} (cp) - 1 - {at.cp:,} (place in cp))"
    return [
        html("tokens of a sequence, from: ", worked(f"{head} x {chunk}"), " to: ", worked(f"({head} + 1) x {chunk} - 1")),
        html("and from: ", worked(f"{tail} x {chunk}"), " to: ", worked(f"({tail} + 1) x {chunk} - 1")),
    ]


def neighbours(at: Place, plan: JobPlan) -> dict[str, list[int]]:
    """Dimension -> the ranks that differ from this one in it alone, and itself."""
    found = {}
    for key, field in FIELDS.items():
        if (degree := getattr(plan.plan, key)) > 1:
            found[key] = [number(Place(0, **(_axes(at) | {field: i})), plan) for i in range(degree)]
    return found


def _axes(at: Place) -> dict[str, int]:
    return {field: getattr(at, field) for field in FIELDS.values()}
