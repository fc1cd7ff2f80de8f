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


def memory_lines(config: Config, job: JobPlan, cluster: Cluster, width: int) -> list[str]:
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
    lines.append(f"  {'in all':12} {total:8.2f}  of {gpu.memory_gib:.4g}")
    if host := full.peak.get("host", 0):
        lines.append(f"  {'with the host':12} {host / GIB:7.2f}  of each GPU")
    if copied := staged(config, full):
        lines.append(f"  {'saves':12} {copied / GIB:8.2f}  of the host's memory for each GPU, while one is written")
    if len(job.ranks) > 1:
        lines += ["", f"  {'pipeline rank':14} {'holds':34} {'parameters':>14} {'GiB':>8}"]
        for place, rank in enumerate(job.ranks):
            lines.append(f"  {place:<14} {rank.holds[:34]:34} {rank.parameters:14,} {rank.device_bytes / GIB:8.2f}")
    share = f"{total:.1f} GiB of {gpu.memory_gib:.4g}, {total / gpu.memory_gib:.0%}"
    if fits(job, cluster):
        return [*lines, "", f"It fits: {share}."]
    over = f"{total - usable(cluster):.1f} GiB too many, with {MARGIN:.0%} left for fragments"
    return [*lines, "", f"It does not fit: {share}; {over}."]


def staged(config: Config, rank: RankPlan) -> int:
    """Bytes that a save beside training copies to the host: what a rank has of weights and optimizer states."""
    both = rank.peak["parameters"] + rank.peak["optimizer"]
    return (both or rank.peak["host"]) if config.checkpoint.async_save else 0


def saving_lines(found: list[tuple[str, float]]) -> list[str]:
    if not found:
        return []
    return ["", "What would save most, each by itself:"] + [f"  {word:40} {left:8.2f} GiB of tensors" for word, left in found]


def traffic_lines(job: JobPlan) -> list[str]:
    """A table of what the busiest rank sends."""
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
    return lines


def time_lines(config: Config, job: JobPlan, cluster: Cluster, width: int) -> list[str]:
    """How long a step takes, what it goes to as bars, and how long the whole run takes."""
    time, world, steps = job.time, job.plan.world, config.training.steps
    own = f"{job.flops / world / 1e12:,.4g} TFLOP a GPU and step, {mfu(job, cluster):.1%} of its peak in bfloat16 (MFU)"
    which = ", of the slowest pipeline rank" if len(job.ranks) > 1 else ""
    rate = f"{tokens_per_second(config, job):,.0f} tokens a second and GPU"
    lines = [f"A step takes {spell(time.seconds)}: {rate}.", f"{own}.", "", f"What it goes to{which}:", ""]
    space = max(10, min(50, width - 46))
    for kind, seconds in time.spent.most_common():
        if seconds >= 0.0005 * time.seconds:
            share = seconds / time.seconds
            lines.append(f"  {kind:24} {spell(seconds):>9} {share:6.1%}  {'#' * max(1, round(space * share))}")
    if len(job.ranks) > 1:
        lines += ["", f"Of the passes' time pipeline ranks idle {time.bubble:.1%}; {job.bubble:.1%}, if all stages were alike."]
    hours = steps * time.seconds / 3600
    tokens = steps * config.training.global_batch_size * config.training.seq_len
    many = f"{tokens / 1e9:,.4g} billion tokens" if tokens >= 1e9 else f"{tokens:,} tokens"
    long = f"{hours:,.1f} hours, {hours * world:,.1f} GPU-hours" if hours >= 1 else spell(hours * 3600)
    read = tokens_per_second(config, job) * world / job.plan.data_parallel
    lines += ["", f"{steps:,} steps, {many}: {long}, without saves, validation and restarts."]
    return [*lines, f"The loader of each data-parallel rank has to read {read:,.0f} tokens a second."]


def spell(seconds: float) -> str:
    """Seconds for people."""
    return f"{seconds:,.2f} s" if seconds >= 1 else f"{seconds * 1e3:,.1f} ms"


def tokens_per_second(config: Config, job: JobPlan) -> float:
    """Of a GPU."""
    return config.training.global_batch_size * config.training.seq_len / job.time.seconds / job.plan.world


def mfu(job: JobPlan, cluster: Cluster) -> float:
    """The share of the GPUs' peak in bfloat16 that the operations are which training needs."""
    return job.flops / job.plan.world / job.time.seconds / cluster.gpu.bfloat16_tflops / 1e12


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
    kinds = jobs[0].time.spent | jobs[1].time.spent
    rows += [(kind, [job.time.spent[kind] for job in jobs], "s") for kind, most in kinds.items() if most >= 0.001]
    rows.append(("a step", [job.time.seconds for job in jobs], "s"))
    rows.append(("MFU", [100 * mfu(job, cluster) for job in jobs], "%"))
    lines += ["", f"  {'of a GPU':36} {'A':>11} {'B':>11} {'B - A':>11}"]
    lines += [f"  {what:36} {a:11,.3f} {b:11,.3f} {b - a:+11,.3f} {unit}" for what, (a, b), unit in rows if a or b]
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


def as_json(config: Config, job: JobPlan, cluster: Cluster) -> dict[str, Any]:
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
        "staging_gib": staged(config, job.fullest) / GIB,
        "traffic": dict(traffic),
        "sent": [sent._asdict() for sent in most.sent],
        "flops": job.flops,
        "bubble": round(job.time.bubble, 6),
        "bubble_if_alike": round(job.bubble, 6),
        "step_seconds": job.time.seconds,
        "spent_seconds": dict(job.time.spent),
        "tokens_per_second_per_gpu": tokens_per_second(config, job),
        "mfu": mfu(job, cluster),
        "plan": vars(job.plan),
    }
