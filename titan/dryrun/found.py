"""What a search for plans found, in words and as an object: the plans, what each pays for, on what the order depends."""

from __future__ import annotations

from typing import Any

from titan.config import Config, degrees
from titan.dryrun.cluster import Cluster
from titan.dryrun.search import Entry, Found
from titan.dryrun.space import Choice
from titan.dryrun.words import mfu, spell, taken, tokens_per_second
from titan.terminal import beside, plural

KINDS = ("matrix products", "attention", "other operations", "starting operations", "bubble")


def changed_keys(config: Config, world: int, choice: Choice) -> dict[str, Any]:
    """Keys whose values differ from what the config says, or says by its defaults."""
    own, plan = config.parallel, degrees(config.parallel, world)
    now = {f"parallel.{name}": getattr(plan, name) for name in ("dp_replicate", "dp_shard", "tp", "cp", "pp")}
    now |= {f"parallel.{name}": getattr(own, name) for name in ("cp_method", "pp_schedule", "reshard_after_forward")}
    now |= {"parallel.pp_stages_per_rank": own.pp_stages_per_rank, "recompute.mode": config.recompute.mode}
    now |= {"training.micro_batch_size": config.training.micro_batch_size, "precision.float8": config.precision.float8}
    of_pipeline = ("parallel.pp_schedule", "parallel.pp_stages_per_rank")
    left_out = {"parallel.cp_method"} if choice.cp == 1 else set()
    left_out |= set(of_pipeline) if choice.pp == 1 else set()
    return {key: value for key, value in choice.keys().items() if value != now[key] and key not in left_out}


def words_of(config: Config, choice: Choice) -> str:
    """A plan as --plan takes it on this config: degrees of 1 are understood, and what the config says already."""
    now: dict[str, Any] = dict.fromkeys(("dp_replicate", "dp_shard", "tp", "cp", "pp"), 1)
    now |= {name: getattr(config.parallel, name) for name in ("cp_method", "pp_schedule", "pp_stages_per_rank")}
    now |= {"reshard_after_forward": config.parallel.reshard_after_forward, "float8": config.precision.float8}
    idle = ({"cp_method"} if choice.cp == 1 else set()) | ({"pp_schedule", "pp_stages_per_rank"} if choice.pp == 1 else set())
    said = []
    for key, value in choice.keys().items():
        table, name = key.split(".")
        if name not in idle and now.get(name) != value:
            said.append(f"{name if table == 'parallel' else key}={value}")
    return ",".join(said)


def found_lines(config: Config, world: int, cluster: Cluster, found: Found, width: int) -> list[str]:
    """Tables of the plans and of what each pays for; on what the order depends, and how far to trust it."""
    gpus = f"{plural(world, 'GPU')} ({cluster.gpu.name})"
    lines = [f"{found.plans:,} plans for {gpus}, {found.too_large:,} of them too large.", ""]
    lines.append(f"  {'':2} {'a step':>10} {'tokens/s/GPU':>13} {'MFU':>7} {'GiB':>8} {'estimate':>9}")
    for place, entry in enumerate(found.entries, 1):
        job = entry.job
        off = entry.estimate.seconds / job.time.seconds - 1
        rate, share = tokens_per_second(entry.choice.on(config), job), mfu(job, cluster)
        figures = f"{rate:13,.0f} {share:7.1%} {taken(job, cluster):8.1f} {off:+9.1%}"
        lines += [f"  {place:<2} {spell(job.time.seconds):>10} {figures}", f"     --plan {words_of(config, entry.choice)}"]
    if any(entry.choice.float8 != config.precision.float8 for entry in found.entries):
        lines += ["", "Another precision.float8 computes other numbers than CONFIG does: compare losses before a long run."]
    lines += ["", "What a step of each pays for, on its slowest pipeline rank, and what is left of the memory:", ""]
    lines.append("  " + " " * 24 + "".join(f"{place:>10}" for place in range(1, len(found.entries) + 1)))
    for kind, seconds in paid(found.entries).items():
        if any(own >= 0.0005 * entry.job.time.seconds for own, entry in zip(seconds, found.entries, strict=True)):
            lines.append(f"  {kind:24}" + "".join(f"{spell(own):>10}" for own in seconds))
    left = [cluster.gpu.memory_gib - taken(entry.job, cluster) for entry in found.entries]
    lines.append(f"  {'memory left, GiB':24}" + "".join(f"{own:10.1f}" for own in left))
    lines.append("")
    for name, (choice, gain) in found.elsewhere.items():
        lines.append(f"With {name} another kind would be first by estimate, {gain:.1%} faster than this one there:")
        lines.append(f"     --plan {words_of(config, choice)}")
    if not found.elsewhere:
        lines.append("With links twice as fast, or half as much memory again, this kind of plan stays the first.")
    trust = "plans that are nearer to each other may be as good"
    lines.append(f"Estimates, which order the plans, were within {found.error:.1%} of the dry runs taken: {trust}.")
    if found.refused:
        lines += ["", "Refused, of those that were asked about:"]
    return lines + [beside(f"  {count:6,} x ", said, width) for said, count in found.refused.most_common(4)]


def paid(entries: list[Entry]) -> dict[str, list[float]]:
    """In words -> of each plan the seconds that go to it."""
    times = [entry.job.time.spent for entry in entries]
    rows = {kind: [float(spent[kind]) for spent in times] for kind in KINDS}
    waits = [[seconds for kind, seconds in spent.items() if kind.startswith("waiting")] for spent in times]
    return rows | {"waiting for messages": [float(sum(own)) for own in waits]}


def as_object(config: Config, world: int, cluster: Cluster, found: Found) -> dict[str, Any]:
    """For other programs."""
    entries = [
        {
            "plan": words_of(config, entry.choice),
            "keys": changed_keys(config, world, entry.choice),
            "step_seconds": entry.job.time.seconds,
            "estimated_seconds": entry.estimate.seconds,
            "tokens_per_second_per_gpu": tokens_per_second(entry.choice.on(config), entry.job),
            "mfu": mfu(entry.job, cluster),
            "memory_gib": taken(entry.job, cluster),
            "estimated_memory_gib": entry.estimate.bytes / 2**30 + cluster.gpu.reserved_gib,
            "spent_seconds": dict(entry.job.time.spent),
        }
        for entry in found.entries
    ]
    elsewhere = {name: {"plan": words_of(config, choice), "gain": gain} for name, (choice, gain) in found.elsewhere.items()}
    return {
        "plans": found.plans,
        "too_large": found.too_large,
        "refused": dict(found.refused),
        "found": entries,
        "elsewhere": elsewhere,
        "estimate_error": found.error,
    }
