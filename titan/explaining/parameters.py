"""Parameters: each with its whole shape, how it is cut, and what of it a rank holds. Blocks that are alike are told once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from math import prod

from titan.config import Config
from titan.drawing.shards import ranges
from titan.dryrun.plan import JobPlan
from titan.explaining.facts import Facts, Part, RankFacts
from titan.explaining.numbers import evaluate, figure, given, worked
from titan.explaining.pieces import Html, html, listed, name, paragraph, plain, section
from titan.sharding import styles

LESSON = (
    "A matrix is cut twice. Tensor parallelism cuts it where the arithmetic allows: by outputs, so that each rank computes "
    "some columns, or by inputs, so that the ranks' results are added. FSDP then cuts what is left by rows, only to store it: "
    "before a block runs its rows are gathered, and dropped afterwards."
)
WORDS = {
    "col": "tp: by outputs (col)",
    "heads": "tp: by whole query heads (heads)",
    "kv": "tp: by whole key and value heads (kv)",
    "row": "tp: by inputs (row); results are added",
    "seq": "tp: whole on every rank (seq)",
    "scatter": "tp: whole on every rank (scatter)",
    "embed": "tp: by tokens of the vocabulary (embed)",
    "head": "tp: by tokens of the vocabulary (head)",
    "gather": "tp: whole on every rank (gather)",
}


def parameters(config: Config, plan: JobPlan, facts: Facts) -> Html:
    """The section."""
    rows = []
    for (said, part), places in alike(facts).items():
        rank = facts.ranks[min(places)]
        count = sum(places.values())
        lines = [html("whole: ", worked(f"{' x '.join(map(figure, part.whole))} x {part.itemsize} bytes", "memory"))]
        lines.append(html("cut: ", how_it_is_cut(config, plan, facts, said, part, rank)))
        lines.append(html("shard: ", worked(f"{elements(plan, facts, part, rank)} x {part.itemsize} bytes", "memory")))
        lines.append(html("its shape: ", shape_of(plan, facts, part, rank)))
        if count > 1 or len(facts.ranks) > 1:
            lines.append(html("how many of these a rank holds: ", held_by(places, facts)))
        rows.append(html(Html('<div class="card"><h3>'), name(said), Html("</h3>"), listed(lines, "numbers"), Html("</div>")))
    note = paragraph("Shown is what the rank of its kind with most holds; where a number does not divide, others have less.")
    return section("parameters", "Parameters and their shards", LESSON, note, Html(f'<div class="cards">{"".join(rows)}</div>'))


def alike(facts: Facts) -> dict[tuple[str, Part], Counter[int]]:
    """Parameter, with a star for the block's number, and its part -> how many of these each pipeline rank has."""
    found: dict[tuple[str, Part], Counter[int]] = {}
    for place, rank in enumerate(facts.ranks):
        for key, part in rank.parts.items():
            found.setdefault((starred(key, facts), part), Counter())[place] += 1
    return found


def starred(key: str, facts: Facts) -> str:
    """layers.*.ffn.up.weight"""
    stem = facts.table.block.split("*")[0]
    return f"{stem}*.{key.removeprefix(stem).split('.', 1)[1]}" if key.startswith(stem) else key


def held_by(places: Counter[int], facts: Facts) -> Html:
    """Of each pipeline rank; those that hold as many together."""
    by_count: dict[int, list[int]] = {}
    for place in range(len(facts.ranks)):
        by_count.setdefault(places[place], []).append(place)
    if len(facts.ranks) == 1:
        return html(given(places[0]))
    said = [html(given(count), " on ", name(f"pipeline rank {ranges(ranks)}")) for count, ranks in by_count.items()]
    return html(*(part for i, one in enumerate(said) for part in ((", ", one) if i else (one,))))


def shape_of(plan: JobPlan, facts: Facts, part: Part, rank: RankFacts) -> Html:
    """The shard's: 1,792 x 512."""
    sizes = [plain(worked(along(i, plan, facts, part, rank))) for i in range(len(part.whole))]
    return html(*(piece for i, size in enumerate(sizes) for piece in ((" x ", size) if i else (size,))))


def how_it_is_cut(config: Config, plan: JobPlan, facts: Facts, said: str, part: Part, rank: RankFacts) -> str:
    """In words."""
    found = []
    if plan.plan.tp > 1:
        by_module = styles(facts.table, config.parallel.sharding)
        word = by_module.get(said.replace("*", "0").rpartition(".")[0], "")
        found.append(WORDS.get(word, "tp: whole on every rank"))
    if rank.shards > 1:
        found.append(f"{rank.shards_named.replace('dp_shard_cp', 'dp_shard x cp')}: by rows (FSDP)")
    if plan.plan.dp_replicate > 1:
        found.append("dp_replicate: a copy on each")
    return "; ".join(found) or "not at all"


def elements(plan: JobPlan, facts: Facts, part: Part, rank: RankFacts) -> str:
    """Of a shard, a formula: 4,096 / 8 (tp) / 8 (dp_shard) x 14,336."""
    return " x ".join(along(i, plan, facts, part, rank) for i in range(len(part.whole)))


def along(i: int, plan: JobPlan, facts: Facts, part: Part, rank: RankFacts) -> str:
    """Of one dimension, from the whole to the shard: the first formula that gives what the code cuts."""
    whole, cut, own, tp = part.whole[i], part.cut[i], part.own[i], plan.plan.tp
    said = figure(whole)
    if cut != whole:
        width = facts.table.width // facts.table.heads
        key_heads = f"ceil({facts.table.kv_heads:,} (kv heads) / {tp:,} (tp)) x {width:,} (width of a head)"
        said = gives(cut, [f"{said} / {tp:,} (tp)", f"ceil({said} / {tp:,} (tp))", key_heads, f"{cut:,} (of this rank of tp)"])
    if own != cut:
        shared = f" / {rank.shards:,} ({rank.shards_named.replace('dp_shard_cp', 'dp_shard x cp')})"
        said = gives(own, [f"{said}{shared}", f"ceil({said}{shared})", f"{own:,} (rows)"])
    return said


def gives(value: int, formulas: Iterable[str]) -> str:
    """The first that does; the last states it."""
    return next(formula for formula in formulas if evaluate(formula) == value)


def of_rank(plan: JobPlan, facts: Facts, place: int) -> str:
    """A formula: the elements that a pipeline rank holds, shard by shard."""
    rank = facts.ranks[place]
    counts: Counter[tuple[str, int]] = Counter((starred(key, facts), part.elements) for key, part in rank.parts.items())
    said = [f"{times:,} x {size:,}" if times > 1 else f"{size:,}" for (_, size), times in counts.items() if size]
    assert sum(prod(part.own) for part in rank.parts.values()) == evaluate(" + ".join(said))
    return " + ".join(said)
