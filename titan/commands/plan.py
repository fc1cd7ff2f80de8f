"""titan plan CONFIG [B.toml] [--world-size N] [--cluster NAME] [--plan PLAN] [--json] [--table.key=value ...]

What a job would take, found on this machine without a GPU: the code of training takes a step as one rank of each pipeline
stage, with tensors that have no memory, among ranks that are not there. Printed are a GPU's memory at the step's fullest moment
and whether it fits, and what a GPU sends in a step, within its node and to others. Of two configs: what differs, in them and in
what comes of it.

  --world-size N  GPUs of the whole job (as few as the plan needs)
  --cluster NAME  a100, h100, h200, b200, or a .toml file like those in
                  train_configs/clusters (h100)
  --plan PLAN     keys of [parallel], or any table.key, with their values and
                  commas between: tp=8,pp=4,dp_shard=-1, which takes what is
                  left; degrees that it does not name are 1. Without it:
                  CONFIG's own plan
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
from functools import partial
from typing import TYPE_CHECKING

from titan.arguments import Parser, blame, read_config
from titan.check import problems
from titan.commands.verify import with_plan
from titan.config import Config, degrees, least_ranks
from titan.dryrun.cluster import Cluster, read_cluster
from titan.dryrun.words import GIB, as_json, heading, memory_lines, pair_lines, saving_lines, traffic_lines
from titan.progress import ProgressBar
from titan.status import Exit
from titan.terminal import columns
from titan.toml import ConfigError

if TYPE_CHECKING:
    from titan.dryrun.plan import JobPlan

Again = Callable[[list[str]], Config]
"""The command line's config with more words on it."""


def run(words: list[str]) -> int:
    """Plan and print."""
    parser = Parser("plan")
    parser.add_argument("--plan", default="")
    parser.add_argument("--world-size", type=int)
    parser.add_argument("--cluster", default="h100")
    parser.add_argument("--savings", action="store_true")
    parser.add_argument("--json", action="store_true")
    given, rest = parser.parse_with_config(words)
    if given.world_size is not None and given.world_size < 1:
        parser.error("--world-size is a whole number, 1 or more")
    files = [place for place, word in enumerate(rest) if not word.startswith("-")]
    if len(files) == 2 and given.savings:
        parser.error("--savings is for one CONFIG")
    cluster = read_cluster(given.cluster)
    began, width = time.monotonic(), columns(sys.stdout, 100)
    configs, jobs, less = [], [], list[tuple[str, float]]()
    for file in files if len(files) == 2 else [None]:
        own = [word for place, word in enumerate(rest) if file is None or place == file or place not in files]
        own = with_plan(given.plan, own) if given.plan else own
        again = partial(config_of, own)
        config = again([])
        world = given.world_size or least_ranks(config.parallel)
        if wrong := problems(config, world, elsewhere=True):
            raise ConfigError("\n".join(blame(config, own, f"{problem.key}: {problem.sentence}") for problem in wrong))
        try:
            jobs.append(plan_with_bar(config, world, cluster))
            less = savings(config, again, world, cluster, jobs[0]) if given.savings else []
        except ValueError as error:  # a word that only PyTorch can judge
            raise ConfigError(f"{config.source}: {error}") from error
        configs.append(config)
    if given.json:
        found = [as_json(job, cluster) for job in jobs]
        print(json.dumps(found if len(found) == 2 else found[0], indent=2))
        return Exit.FINISHED
    for name, config, job in zip("AB", configs, jobs, strict=False):
        print("\n".join([*([f"{name}: {config.source}"] if len(jobs) == 2 else []), *heading(config, job, cluster), ""]))
    if len(jobs) == 2:
        print("\n".join(pair_lines(configs, jobs, cluster, width)))
    else:
        print("\n".join([*memory_lines(jobs[0], cluster, width), *saving_lines(less), "", *traffic_lines(jobs[0], cluster)]))
    print(f"\nPlanned in {time.monotonic() - began:.0f} s. None of the ranks was started.")
    return Exit.FINISHED


def config_of(words: list[str], more: list[str]) -> Config:
    """The command line's config with more words on it."""
    return read_config([*words, *more])


def plan_with_bar(config: Config, world: int, cluster: Cluster) -> JobPlan:
    from titan.dryrun.plan import plan_job

    def show(ranks: list[int]) -> Iterator[int]:
        bar = ProgressBar(len(ranks), "planning", lambda line: print(line, file=sys.stderr), unit="ranks")
        for rank in ranks:
            yield rank
            bar.add(1)
        bar.close()

    return plan_job(config, world, cluster, show)


def savings(config: Config, again: Again, world: int, cluster: Cluster, job: JobPlan) -> list[tuple[str, float]]:
    """Changes, as on the command line, and the fullest GPU's GiB of tensors with each: the three that leave least."""
    found = []
    for words in candidates(config, world):
        changed = again(words)
        if changed != config and not problems(changed, world, elsewhere=True):
            found.append((" ".join(words), plan_with_bar(changed, world, cluster).fullest.device_bytes / GIB))
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
