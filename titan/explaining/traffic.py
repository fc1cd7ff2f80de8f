"""What a rank sends in a step: for each dimension and operation its flows by formula, and how much takes which link."""

from __future__ import annotations

from titan.drawing.svg import BLUE, ORANGE
from titan.dryrun.cluster import Cluster
from titan.dryrun.plan import JobPlan, Sent
from titan.dryrun.words import busiest
from titan.explaining.facts import Facts, RankFacts
from titan.explaining.numbers import Number, figure, given, worked
from titan.explaining.pieces import Html, bar, html, listed, name, paragraph, section
from titan.traffic.shape import Flow

LESSON = (
    "Every dimension has its own messages. Within a node GPUs talk over fast links, between nodes over slower ones, so the "
    "plan puts whoever talks most side by side. Not all of a message leaves a rank: of a gather among some ranks its own part "
    "is there already. How often and how large is known by formula before anything runs."
)
LETTERS = (
    "M micro batches; B sequences in one; s tokens of a sequence that a rank has; d width of hidden states; L blocks; T ranks "
    "of tp; n ranks of cp; H, G, h query heads, key heads and their width; P parameters, padded where rows are shared; "
    "gather, row, embed, head: how many of the rank's modules are cut that way; done again: exchanges that recompute repeats."
)


def traffic(plan: JobPlan, cluster: Cluster, facts: Facts) -> Html:
    """The section."""
    most = busiest(plan)
    place = plan.ranks.index(most)
    sends = sorted((s for s in most.sent if s.ranks > 1), key=lambda s: -s.inside - s.between)
    if not sends:
        return section("traffic", "Traffic", LESSON, paragraph("One rank has nobody to talk to."))
    who = (
        html("What a GPU of ", name(f"pipeline rank {place}"), ", which sends most, sends in a step")
        if place or len(plan.ranks) > 1
        else html("What a GPU sends in a step")
    )
    head = paragraph(who, ". GB are of a thousand million bytes, as links are sold.")
    rows = [row(sent, facts.ranks[place]) for sent in sends]
    letters = paragraph("The letters: ", LETTERS, kind="note")
    return section(
        "traffic", "Traffic", LESSON, head, *links(sends, cluster), Html("<h3>By dimension and operation</h3>"), *rows, letters
    )


def row(sent: Sent, rank: RankFacts) -> Html:
    """A dimension's operation: its flows, the bytes of all, and what of them leaves the rank."""
    own = [(flow, size) for flow, size in rank.flows if (flow.dimension, flow.op) == (sent.dimension, sent.op)]
    if sum(flow.bytes for flow, _ in own) != sent.message_bytes:  # gathers within a copy that was kept are a row of their own
        own = [(flow, size) for flow, size in own if (flow.phase == "backward") == (sent.ranks < rank.shards)]
    lines = [
        html(
            f"{flow.phase}: ",
            name(flow.what),
            ", ",
            given(flow.count, "messages" if flow.count > 1 else "message"),
            ": ",
            size,
            note(flow),
        )
        for flow, size in own
    ]
    total = worked(" + ".join(f"{flow.bytes:,}" for flow, _ in own) + " bytes", "sent")
    inside, between = leaving(sent)
    lines.append(html("all messages together: ", total))
    lines.append(html("leaves for its node: ", inside))
    lines.append(html("leaves for other nodes: ", between))
    title = html(
        name(f"{sent.dimension} {sent.op}"),
        " among ",
        given(sent.ranks, "ranks"),
        ", ",
        given(sent.messages, "messages" if sent.messages > 1 else "message"),
    )
    return html(Html('<div class="card"><h3>'), title, Html("</h3>"), listed(lines, "numbers"), Html("</div>"))


def note(flow: Flow) -> Html:
    """The formula in letters."""
    return html(Html(' <span class="letters">'), flow.formula.split(" = ")[0], Html("</span>"))


def leaving(sent: Sent) -> tuple[Number, Number]:
    """What leaves a rank for its node and for others: `titan.dryrun.prices.leaving` with its figures."""
    size, n, near = f"{sent.message_bytes:,} bytes", f"{sent.ranks:,} (ranks)", f"{sent.near:,} (in its node)"
    if sent.op == "recv":
        return worked(f"0 x {size} (it receives)", "sent"), worked(f"0 x {size} (it receives)", "sent")
    if sent.op == "all_to_all":
        return worked(f"{size} x ({near} - 1) / {n}", "sent"), worked(f"{size} x ({n} - {near}) / {n}", "sent")
    out = size if sent.op in ("send", "broadcast") else f"{size} x ({n} - 1) / {n}"
    out = f"{out} x 2 (there and back)" if sent.op == "all_reduce" else out
    if sent.near == sent.ranks:
        return worked(out, "sent"), worked(f"{n} - {near}", "sent")
    return worked(f"{out} x ({near} - 1) / {near}", "sent"), worked(f"{out} / {near}", "sent")


def links(sends: list[Sent], cluster: Cluster) -> list[Html]:
    """A bar for each kind of link, as long as what it carries would take it."""
    own = cluster.links
    pairs = [leaving(sent) for sent in sends]
    kinds = [
        ("to GPUs of its node", [a for a, _ in pairs], own.inside_gb_per_second, "inside_gb_per_second", BLUE),
        ("to other nodes", [b for _, b in pairs], own.between_gb_per_second, "between_gb_per_second", ORANGE),
    ]
    found = [(said, total(numbers), speed, key, colour) for said, numbers, speed, key, colour in kinds]
    times = [busy(number, speed, own.reach) for _, number, speed, _, _ in found]
    longest = max(time.value for time in times) or 1.0
    rows = []
    for (said, number, speed, key, colour), time in zip(found, times, strict=True):
        link = given(speed, "GB/s", f"cluster.links.{key}")
        rows.append(bar(said, number, time.value / longest, colour, "over a link of ", link, ", busy for ", time))
    more = paragraph(
        "A bar is as long as its link is busy. Reach: the share of a link's speed that large messages get, ",
        given(own.reach, "", "cluster.links.reach"),
        ".",
        kind="note",
    )
    return [*rows, more]


def total(numbers: list[Number]) -> Number:
    """A sum of what was shown."""
    said = [figure(round(number.value)) for number in numbers if number.value]
    return worked((" + ".join(said) or "0") + " bytes", "sent")


def busy(number: Number, speed: float, reach: float) -> Number:
    """Seconds that a link takes for so much."""
    return worked(
        f"{figure(number.value)} bytes / ({figure(speed)} (GB a second) x 1,000,000,000 x {figure(reach)} (reach))", "seconds"
    )
