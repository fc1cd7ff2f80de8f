"""titan plan CONFIG [--world-size N] [--cluster NAME] [--plan PLAN] [--json] [--table.key=value ...]

What a job would take, found on this machine without a GPU: the code of training takes a step as one rank of each pipeline
stage, with tensors that have no memory, among ranks that are not there. Printed are a GPU's memory at the step's fullest moment
and whether it fits, and what a GPU sends in a step, within its node and to others.

  --world-size N  GPUs of the whole job (as few as the plan needs)
  --cluster NAME  a100, h100, h200, b200, or a .toml file like those in
                  train_configs/clusters (h100)
  --plan PLAN     keys of [parallel], or any table.key, with their values and
                  commas between: tp=8,pp=4. Without it: CONFIG's own plan
  --savings       try what would take less memory, too: a step for each
  --json          one object instead of words

  titan plan train_configs/llama3_8b.toml --world-size 64
  titan plan train_configs/llama3_70b.toml --world-size 256 --cluster h200
  titan plan train_configs/llama3_8b.toml --world-size 64 --training.seq_len=8192 --recompute.mode=full --savings

Memory is of tensors, as PyTorch's operations make them on a CPU and without a compiler; on a GPU norms keep less, and with a
compiler activations do. Every sequence is one document. Gathers of tp and cp are shown as all-to-alls of as many bytes, which
they are on a CPU. What a device takes besides is the cluster file's reserved_gib. What an allocator loses to fragments is not
known: 5% of the memory is left for it. How long a step takes is not planned yet.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from textwrap import fill
from typing import TYPE_CHECKING, Any

from titan.arguments import Parser, blame, read_config
from titan.check import problems
from titan.check_plan import Problem
from titan.commands.trace import plan_words
from titan.commands.verify import with_plan
from titan.config import Config, degrees, least_ranks
from titan.dryrun.cluster import Cluster, read_cluster
from titan.progress import ProgressBar
from titan.status import Exit
from titan.terminal import columns, plural
from titan.toml import ConfigError

if TYPE_CHECKING:
    from titan.dryrun.plan import JobPlan, RankPlan

Again = Callable[[list[str]], Config]
"""The command line's config with more words on it."""
GIB = 2**30
MARGIN = 0.05
OF_THIS_MACHINE = ("data.", "checkpoint.load", "metrics.", "compile.backend", "profiling.", "kernels.", "job.")
"""Keys whose rules ask what lies or is installed here, where the job will not run."""


def run(words: list[str]) -> int:
    """Plan and print."""
    parser = Parser("plan")
    parser.add_argument("--plan", default="")
    parser.add_argument("--world-size", type=int, default=0)
    parser.add_argument("--cluster", default="h100")
    parser.add_argument("--savings", action="store_true")
    parser.add_argument("--json", action="store_true")
    given, rest = parser.parse_with_config(words)
    if given.world_size < 0:
        parser.error("--world-size is a whole number, 1 or more")
    cluster = read_cluster(given.cluster)

    words = with_plan(given.plan, rest) if given.plan else rest

    def again(more: list[str]) -> Config:
        return read_config([*words, *more])

    config = again([])
    world = given.world_size or least_ranks(config.parallel)
    if wrong := wrong_here(config, world):
        raise ConfigError("\n".join(blame(config, words, f"{problem.key}: {problem.sentence}") for problem in wrong))
    began = time.monotonic()
    try:
        job = plan_with_bar(config, world, cluster)
        less = savings(config, again, world, job) if given.savings else []
    except ValueError as error:  # a word that only PyTorch can judge
        raise ConfigError(f"{config.source}: {error}") from error
    if given.json:
        print(json.dumps(as_json(job, cluster), indent=2))
        return Exit.FINISHED
    width = columns(sys.stdout, 100)
    for line in (*heading(config, world, job, cluster), "", *memory_lines(job, cluster, width), *saving_lines(less)):
        print(line)
    print("\n" + "\n".join(traffic_lines(job, cluster)))
    print(f"\nPlanned in {time.monotonic() - began:.0f} s. None of the {world:,} ranks was started.")
    return Exit.FINISHED


def wrong_here(config: Config, world: int) -> list[Problem]:
    """Rules that the job would break, wherever it runs."""
    return [problem for problem in problems(config, world) if not problem.key.startswith(OF_THIS_MACHINE)]


def plan_with_bar(config: Config, world: int, cluster: Cluster) -> JobPlan:
    from titan.dryrun.plan import plan_job

    def show(ranks: list[int]) -> Iterator[int]:
        bar = ProgressBar(len(ranks), "planning", lambda line: print(line, file=sys.stderr), unit="ranks")
        for rank in ranks:
            yield rank
            bar.add(1)
        bar.close()

    return plan_job(config, world, cluster.links.gpus_per_node, show)


def room(cluster: Cluster) -> float:
    """GiB that tensors may take."""
    return cluster.gpu.memory_gib * (1 - MARGIN) - cluster.gpu.reserved_gib


def fits(job: JobPlan, cluster: Cluster) -> bool:
    return job.fullest.device_bytes / GIB <= room(cluster)


def heading(config: Config, world: int, job: JobPlan, cluster: Cluster) -> list[str]:
    tokens = config.training.global_batch_size * config.training.seq_len
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


def savings(config: Config, again: Again, world: int, job: JobPlan) -> list[tuple[str, float]]:
    """Changes, as on the command line, and the GiB of tensors on the fullest rank with each: the three that leave least."""
    from titan.dryrun.plan import fullest_moment, on_device, typical_ranks

    found = []
    for words in candidates(config, world):
        changed = again(words)
        if changed != config and not wrong_here(changed, world):
            rank = typical_ranks(degrees(changed.parallel, world))[job.ranks.index(job.fullest)]
            found.append((" ".join(words), on_device(fullest_moment(changed, rank, world)[0]) / GIB))
    before = job.fullest.device_bytes / GIB
    return sorted((pair for pair in found if pair[1] < before), key=lambda pair: pair[1])[:3]


def candidates(config: Config, world: int) -> list[list[str]]:
    """What is worth a try."""
    training, plan = config.training, degrees(config.parallel, world)
    found = [["--recompute.mode=selective"], ["--recompute.mode=full"], ["--offload.activations=true"]]
    found += [["--offload.states=true"], ["--precision.param=bfloat16"]]
    if training.micro_batch_size > 1:
        found.append([f"--training.micro_batch_size={training.micro_batch_size // 2}"])
    if plan.tp == 1 and plan.dp_shard % 8 == 0:
        found.append(["--parallel.tp=8", f"--parallel.dp_shard={plan.dp_shard // 8}"])
    if plan.cp == 1 and plan.dp_shard % 2 == 0:
        found.append(["--parallel.cp=2", f"--parallel.dp_shard={plan.dp_shard // 2}"])
    return found


def saving_lines(found: list[tuple[str, float]]) -> list[str]:
    if not found:
        return []
    return ["", "What would save most, each by itself:"] + [f"  {word:40} {left:8.2f} GiB of tensors" for word, left in found]


def traffic_lines(job: JobPlan, cluster: Cluster) -> list[str]:
    """A table of what the busiest rank sends."""
    busiest: RankPlan = max(job.ranks, key=lambda rank: sum(sent.bytes for sent in rank.sent))
    if not busiest.sent:
        return ["It sends nothing."]
    which = f", pipeline rank {job.ranks.index(busiest)}" if len(job.ranks) > 1 else ""
    lines = [f"What a GPU sends in a step{which}:", ""]
    lines.append(f"  {'dimension':13} {'operation':15} {'ranks':>7} {'messages':>9} {'GB':>10}  where")
    for sent in sorted(busiest.sent, key=lambda sent: -sent.bytes):
        where = "between nodes" if sent.between_nodes else "in a node"
        counts = f"{sent.ranks:7,} {sent.messages:9,} {sent.bytes / 1e9:10,.3f}"
        lines.append(f"  {sent.dimension:13} {sent.op:15} {counts}  {where}")
    inside, between = (sum(s.bytes for s in busiest.sent if s.between_nodes == far) for far in (False, True))
    links, seconds = cluster.links, job.flops / job.plan.world / cluster.gpu.bfloat16_tflops / 1e12
    lines += ["", "By the data sheet, if nothing else took time:"]
    lines.append(f"  {'matrix products':26} {seconds:9.3f} s  {job.flops / job.plan.world / 1e12:,.1f} TFLOP a GPU")
    for what, size, rate in (
        ("messages in a node", inside, links.inside_gb_per_second),
        ("messages between nodes", between, links.between_gb_per_second),
    ):
        lines.append(f"  {what:26} {size / rate / 1e9:9.3f} s  {size / 1e9:,.2f} GB")
    return lines


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
