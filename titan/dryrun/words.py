"""A plan in words: memory as bars, messages as a table, two plans side by side; and as an object for other programs."""

from __future__ import annotations

from collections import Counter
from textwrap import fill
from typing import TYPE_CHECKING, Any

from titan.commands.trace import plan_words
from titan.config import Config
from titan.dryrun.cluster import Cluster
from titan.terminal import beside, plural
from titan.toml import keys, table_kinds, to_toml

if TYPE_CHECKING:
    from titan.dryrun.plan import JobPlan, RankPlan

GIB = 2**30
MARGIN = 0.05
"""Of a GPU's memory, left for what an allocator loses to fragments."""


def taken(job: JobPlan, cluster: Cluster) -> float:
    """GiB of the fullest GPU, with what it takes besides tensors."""
    return job.fullest.device_bytes / GIB + cluster.gpu.reserved_gib


def usable(cluster: Cluster) -> float:
    """GiB that may be taken."""
    return cluster.gpu.memory_gib * (1 - MARGIN)


def fits(job: JobPlan, cluster: Cluster) -> bool:
    return taken(job, cluster) <= usable(cluster)


def heading(config: Config, job: JobPlan, cluster: Cluster) -> list[str]:
    tokens = config.training.global_batch_size * config.training.seq_len
    world = job.plan.world
    said = f"{plural(world, 'GPU')} ({cluster.gpu.name}): {plan_words(config, world)}"
    return [said, f"{job.parameters:,} parameters, {tokens:,} tokens a step in sequences of {config.training.seq_len:,}"]


def memory_lines(job: JobPlan, cluster: Cluster, width: int) -> list[str]:
    """The fullest rank's memory by kind as bars; a line for each pipeline rank; the verdict."""
    full, gpu = job.fullest, cluster.gpu
    total = taken(job, cluster)
    whole = max(gpu.memory_gib, total)
    space = max(10, min(50, width - 30))
    stage = f" of pipeline rank {job.ranks.index(full)} ({full.holds})" if len(job.ranks) > 1 else ""
    lines = [fill(f"Memory of a GPU{stage}, GiB, at the step's fullest moment ({full.where}):", width), ""]
    for kind, size in [*full.peak.items(), ("reserved", round(gpu.reserved_gib * GIB))]:
        if size and kind != "host":
            lines.append(f"  {kind:12} {size / GIB:8.2f}  {'#' * max(1, round(space * size / GIB / whole))}")
    lines.append(f"  {'in all':12} {total:8.2f}  of {gpu.memory_gib:g}")
    if host := full.peak.get("host", 0):
        lines.append(f"  {'with the host':12} {host / GIB:7.2f}  of each GPU")
    if len(job.ranks) > 1:
        lines += ["", f"  {'pipeline rank':14} {'holds':34} {'parameters':>14} {'GiB':>8}"]
        for place, rank in enumerate(job.ranks):
            lines.append(f"  {place:<14} {rank.holds[:34]:34} {rank.parameters:14,} {rank.device_bytes / GIB:8.2f}")
        lines.append(f"  bubble, if all stages are alike: {job.bubble:.1%}")
    share = f"{total:.1f} GiB of {gpu.memory_gib:g}, {total / gpu.memory_gib:.0%}"
    if fits(job, cluster):
        return [*lines, "", f"It fits: {share}."]
    over = f"{total - usable(cluster):.1f} GiB too many, with {MARGIN:.0%} left for fragments"
    return [*lines, "", f"It does not fit: {share}; {over}."]


def saving_lines(found: list[tuple[str, float]]) -> list[str]:
    if not found:
        return []
    return ["", "What would save most, each by itself:"] + [f"  {word:40} {left:8.2f} GiB of tensors" for word, left in found]


def traffic_lines(job: JobPlan, cluster: Cluster) -> list[str]:
    """A table of what the busiest rank sends, and what bounds a step's time from below."""
    most = busiest(job)
    lines: list[str] = []
    if any(sent.inside + sent.between for sent in most.sent):
        which = f", pipeline rank {job.ranks.index(most)}" if len(job.ranks) > 1 else ""
        lines = [f"What a GPU sends in a step{which}, GB:", ""]
        lines.append(f"  {'dimension':13} {'operation':15} {'ranks':>7} {'messages':>9} {'in its node':>12} {'to others':>12}")
        for sent in sorted(most.sent, key=lambda sent: -sent.inside - sent.between):
            if sent.inside + sent.between:
                sizes = f"{sent.inside / 1e9:12,.3f} {sent.between / 1e9:12,.3f}"
                lines.append(f"  {sent.dimension:13} {sent.op:15} {sent.ranks:7,} {sent.messages:9,} {sizes}")
        lines.append("")
    links, own = cluster.links, job.flops / job.plan.world
    lines.append("By the data sheet, if nothing else took time:")
    seconds = own / cluster.gpu.bfloat16_tflops / 1e12
    lines.append(f"  {'products, in bfloat16':26} {seconds:9.3f} s  {own / 1e12:,.1f} TFLOP a GPU")
    for what, size, rate in (
        ("messages in a node", sum(sent.inside for sent in most.sent), links.inside_gb_per_second),
        ("messages between nodes", sum(sent.between for sent in most.sent), links.between_gb_per_second),
    ):
        lines.append(f"  {what:26} {size / rate / 1e9:9.3f} s  {size / 1e9:,.2f} GB")
    return lines


def busiest(job: JobPlan) -> RankPlan:
    """The pipeline rank that sends most."""
    return max(job.ranks, key=lambda rank: sum(sent.inside + sent.between for sent in rank.sent))


def pair_lines(configs: list[Config], jobs: list[JobPlan], cluster: Cluster, width: int) -> list[str]:
    """What two configs differ in, and what comes of it."""
    lines = ["What differs, A and B:"]
    lines += [beside("  ", f"{key} = {a} and {b}", width) for key, a, b in differences(*configs)] or ["  nothing"]
    full = [job.fullest for job in jobs]
    rows = [(kind, [rank.peak[kind] / GIB for rank in full], "GiB") for kind in full[0].peak]
    rows.append(("in all, with reserved", [taken(job, cluster) for job in jobs], "GiB"))
    sent: list[Counter[str]] = [Counter() for _ in jobs]
    for of, job in zip(sent, jobs, strict=True):
        for s in busiest(job).sent:
            of[f"sent, {s.dimension}, in a node"] += s.inside
            of[f"sent, {s.dimension}, to other nodes"] += s.between
    rows += [(what, [of[what] / 1e9 for of in sent], "GB") for what in sent[0] | sent[1]]
    rows.append(("matrix products", [job.flops / job.plan.world / 1e12 for job in jobs], "TFLOP"))
    rows.append(("bubble", [100 * job.bubble for job in jobs], "%"))
    lines += ["", f"  {'of a GPU':36} {'A':>11} {'B':>11} {'B - A':>11}"]
    lines += [f"  {what:36} {a:11,.2f} {b:11,.2f} {b - a:+11,.2f} {unit}" for what, (a, b), unit in rows if a or b]
    said = [f"{name} {'fits' if fits(job, cluster) else 'does not fit'}" for name, job in zip("AB", jobs, strict=True)]
    return [*lines, "", f"On {cluster.gpu.name}, {cluster.gpu.memory_gib:g} GiB: {', '.join(said)}."]


def differences(a: Config, b: Config) -> list[tuple[str, str, str]]:
    """Keys, and what each config says of them, but for where a run lives."""
    found = []
    for table, kind in table_kinds().items():
        ours = [getattr(config, table) for config in (a, b)]
        for key in () if table == "job" else keys(kind):
            said = [to_toml(getattr(of, key)) for of in ours]
            if said[0] != said[1]:
                found.append((f"{table}.{key}", *said))
    own = [{key: to_toml(value) for key, value in vars(config.model.config).items()} for config in (a, b)]
    for key in own[0] | own[1]:
        said = [of.get(key, "-") for of in own]
        if said[0] != said[1]:
            found.append((f"model.{key}", *said))
    return found  # type: ignore[return-value]


def as_json(job: JobPlan, cluster: Cluster) -> dict[str, Any]:
    """For other programs. memory: of each pipeline rank; traffic and sent: of the one that sends most, in bytes."""
    most = busiest(job)
    traffic: Counter[str] = Counter()
    for sent in most.sent:
        traffic[sent.dimension] += sent.inside + sent.between
    return {
        "fits": fits(job, cluster),
        "memory_gib": round(taken(job, cluster), 4),
        "memory": [
            {kind: round(size / GIB, 6) for kind, size in rank.peak.items()} | {"reserved": cluster.gpu.reserved_gib}
            for rank in job.ranks
        ],
        "traffic": dict(traffic),
        "sent": [sent._asdict() for sent in most.sent],
        "flops": job.flops,
        "bubble": round(job.bubble, 6),
        "plan": vars(job.plan),
    }
