"""A plan in words: memory as bars, messages as a table, two plans side by side; and as an object for other programs."""

from __future__ import annotations

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


def room(cluster: Cluster) -> float:
    """GiB that tensors may take."""
    return cluster.gpu.memory_gib * (1 - MARGIN) - cluster.gpu.reserved_gib


def fits(job: JobPlan, cluster: Cluster) -> bool:
    return job.fullest.device_bytes / GIB <= room(cluster)


def heading(config: Config, job: JobPlan, cluster: Cluster) -> list[str]:
    tokens = config.training.global_batch_size * config.training.seq_len
    world = job.plan.world
    said = f"{plural(world, 'GPU')} ({cluster.gpu.name}): {plan_words(config, world)}"
    return [said, f"{job.parameters:,} parameters, {tokens:,} tokens a step in sequences of {config.training.seq_len:,}"]


def memory_lines(job: JobPlan, cluster: Cluster, width: int) -> list[str]:
    """The fullest rank's memory by kind as bars; a line for each pipeline rank; the verdict."""
    full, gpu = job.fullest, cluster.gpu
    whole = max(gpu.memory_gib, full.device_bytes / GIB + gpu.reserved_gib)
    space = max(10, min(50, width - 30))
    stage = f" of pipeline rank {job.ranks.index(full)} ({full.holds})" if len(job.ranks) > 1 else ""
    lines = [fill(f"Memory of a GPU{stage}, GiB, at the step's fullest moment ({full.where}):", width), ""]
    for kind, size in [*full.peak.items(), ("reserved", round(gpu.reserved_gib * GIB))]:
        if size and kind != "host":
            lines.append(f"  {kind:12} {size / GIB:8.2f}  {'#' * max(1, round(space * size / GIB / whole))}")
    total = full.device_bytes / GIB + gpu.reserved_gib
    lines.append(f"  {'in all':12} {total:8.2f}  of {gpu.memory_gib:g}")
    if host := full.peak.get("host", 0):
        lines.append(f"  {'with the host':12} {host / GIB:7.2f}  of each GPU")
    if len(job.ranks) > 1:
        lines += ["", f"  {'pipeline rank':14} {'holds':34} {'parameters':>14} {'GiB':>8}"]
        for place, rank in enumerate(job.ranks):
            lines.append(f"  {place:<14} {rank.holds[:34]:34} {rank.parameters:14,} {rank.device_bytes / GIB:8.2f}")
        lines.append(f"  bubble, if all stages are alike: {job.bubble:.1%}")
    usable = gpu.memory_gib * (1 - MARGIN)
    share = f"{total:.1f} GiB of {gpu.memory_gib:g}, {total / gpu.memory_gib:.0%}"
    if total <= usable:
        return [*lines, "", f"It fits: {share}."]
    return [*lines, "", f"It does not fit: {share}; {total - usable:.1f} GiB too many, with {MARGIN:.0%} left for fragments."]


def saving_lines(found: list[tuple[str, float]]) -> list[str]:
    if not found:
        return []
    return ["", "What would save most, each by itself:"] + [f"  {word:40} {left:8.2f} GiB of tensors" for word, left in found]


def traffic_lines(job: JobPlan, cluster: Cluster) -> list[str]:
    """A table of what the busiest rank sends."""
    most = busiest(job)
    if not most.sent:
        return ["It sends nothing."]
    which = f", pipeline rank {job.ranks.index(most)}" if len(job.ranks) > 1 else ""
    lines = [f"What a GPU sends in a step{which}:", ""]
    lines.append(f"  {'dimension':13} {'operation':15} {'ranks':>7} {'messages':>9} {'GB':>10}  where")
    for sent in sorted(most.sent, key=lambda sent: -sent.bytes):
        where = "between nodes" if sent.between_nodes else "in a node"
        counts = f"{sent.ranks:7,} {sent.messages:9,} {sent.bytes / 1e9:10,.3f}"
        lines.append(f"  {sent.dimension:13} {sent.op:15} {counts}  {where}")
    inside, between = (sum(s.bytes for s in most.sent if s.between_nodes == far) for far in (False, True))
    links, seconds = cluster.links, job.flops / job.plan.world / cluster.gpu.bfloat16_tflops / 1e12
    lines += ["", "By the data sheet, if nothing else took time:"]
    lines.append(f"  {'matrix products':26} {seconds:9.3f} s  {job.flops / job.plan.world / 1e12:,.1f} TFLOP a GPU")
    for what, size, rate in (
        ("messages in a node", inside, links.inside_gb_per_second),
        ("messages between nodes", between, links.between_gb_per_second),
    ):
        lines.append(f"  {what:26} {size / rate / 1e9:9.3f} s  {size / 1e9:,.2f} GB")
    return lines


def busiest(job: JobPlan) -> RankPlan:
    """The pipeline rank that sends most."""
    return max(job.ranks, key=lambda rank: sum(sent.bytes for sent in rank.sent))


def pair_lines(configs: list[Config], jobs: list[JobPlan], cluster: Cluster, width: int) -> list[str]:
    """What two configs differ in, and what comes of it."""
    lines = ["What differs, A and B:"]
    lines += [beside("  ", f"{key} = {a} and {b}", width) for key, a, b in differences(*configs)] or ["  nothing"]
    rows: list[tuple[str, float, float, str]] = []
    full = [job.fullest for job in jobs]
    for kind in full[0].peak:
        rows.append((kind, *(rank.peak[kind] / GIB for rank in full), "GiB"))  # type: ignore[arg-type]
    rows.append(("in all, with reserved", *(rank.device_bytes / GIB + cluster.gpu.reserved_gib for rank in full), "GiB"))  # type: ignore[arg-type]
    sent = [{(s.dimension, s.between_nodes): 0.0 for rank in map(busiest, jobs) for s in rank.sent} for _ in jobs]
    for of, job in zip(sent, jobs, strict=True):
        for s in busiest(job).sent:
            of[s.dimension, s.between_nodes] += s.bytes / 1e9
    for dimension, far in sent[0]:
        where = "between nodes" if far else "in a node"
        rows.append((f"sent, {dimension}, {where}", *(of[dimension, far] for of in sent), "GB"))  # type: ignore[arg-type]
    rows.append(("matrix products", *(job.flops / job.plan.world / 1e12 for job in jobs), "TFLOP"))  # type: ignore[arg-type]
    rows.append(("bubble", *(100 * job.bubble for job in jobs), "%"))  # type: ignore[arg-type]
    lines += ["", f"  {'of a GPU':36} {'A':>11} {'B':>11} {'B - A':>11}"]
    lines += [f"  {what:36} {a:11,.2f} {b:11,.2f} {b - a:+11,.2f} {unit}" for what, a, b, unit in rows if a or b]
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
    own = [vars(config.model.config) for config in (a, b)]
    found += [(f"model.{key}", *(to_toml(of.get(key)) for of in own)) for key in own[0] if own[0][key] != own[1].get(key)]
    return found  # type: ignore[return-value]


def as_json(job: JobPlan, cluster: Cluster) -> dict[str, Any]:
    """For other programs."""
    full = job.fullest
    traffic: dict[str, int] = {}
    for sent in full.sent:
        traffic[sent.dimension] = traffic.get(sent.dimension, 0) + sent.bytes
    return {
        "fits": fits(job, cluster),
        "memory_gib": round(full.device_bytes / GIB + cluster.gpu.reserved_gib, 4),
        "memory": [
            {kind: round(size / GIB, 6) for kind, size in rank.peak.items()} | {"reserved": cluster.gpu.reserved_gib}
            for rank in job.ranks
        ],
        "traffic": traffic,
        "bubble": round(job.bubble, 6),
        "plan": vars(job.plan),
    }
