"""titan plan CONFIG [B.toml] [--world-size N] [--cluster NAME] [--plan PLAN] [--json] [--table.key=value ...]

What a job would take, found on this machine without a GPU: the code of training takes a step as one rank of each pipeline
stage, with tensors that have no memory, among ranks that are not there. Printed are a GPU's memory at the step's fullest moment
and whether it fits, what a GPU sends in a step, within its node and to others, and how long a step takes and what for. Of two
configs: what differs, in them and in what comes of it.

  --world-size N  GPUs of the whole job (as few as the plan needs)
  --cluster NAME  a100, h100, h200, b200, or a .toml file like those in
                  train_configs/clusters (h100)
  --plan PLAN     keys of [parallel], or any table.key, with their values and
                  commas between: tp=8,pp=4,dp_shard=-1, which takes what is
                  left; degrees that it does not name are 1. Without it:
                  CONFIG's own plan
  --savings       try what would take less memory, too: a step for each
  --calibrate     measure first what this machine's operations and messages
                  take, on the ranks of the plan, add it to the cluster file
                  local, or --cluster FILE.toml, and plan with it
  --out FILE      FILE.svg: the pipeline's passes as a picture, too;
                  FILE.toml, with --search: CONFIG with the best plan's keys
  --search        the best plan: thousands estimated, those of the first few
                  kinds dry-run; CONFIG's own plan does not matter
  --pin KEY=VALUE with --search: what has to stay, such as parallel.tp=8;
                  may be given several times
  --float8        with --search: turn Float8 on or off, too, which changes
                  what is computed; else it stays as CONFIG has it
  --json          one object instead of words

  titan plan train_configs/llama3_8b.toml --world-size 64
  titan plan train_configs/llama3_70b.toml --world-size 256 --cluster h200
  titan plan train_configs/llama3_8b.toml --world-size 64 --training.seq_len=8192 --recompute.mode=full --savings
  titan plan train_configs/debug.toml --plan dp_shard=2 --calibrate
  titan plan train_configs/llama3_8b.toml --world-size 64 --search --pin parallel.tp=1 --out best.toml

Memory is of tensors, as PyTorch's operations make them on a CPU and without a compiler; on a GPU norms keep less, and with a
compiler activations do. Every sequence is one document. Gathers of tp and cp are shown as all-to-alls of as many bytes, which
they are on a CPU. What a device takes besides is the cluster file's reserved_gib. What an allocator loses to fragments is not
known: 5% of the memory is left for it.

Times are of data sheets and the shares of them that programs reach, which the cluster files state and nobody measured here:
beside published figures of other systems they are up to half too fast, or a quarter too slow. After --calibrate on a CPU 16
planned steps were within 13% of measured ones, half of them within 5% (docs/benchmarks.md). Not in them are reading data, which
the loader does beside training (printed is what it has to keep up with), ranks that wait because one happens to be slower, and
with [offload] the bus to the host and the host's cores.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from titan.arguments import Parser, blame, did_you_mean, read_config
from titan.check import problems
from titan.commands.schedule import require_picture
from titan.commands.trace import plan_words
from titan.commands.verify import with_plan
from titan.config import Config, accumulation, degrees, least_ranks
from titan.drawing.schedule import Panel, svg
from titan.dryrun.cluster import DATA_SHEETS, Cluster, joined, place, read_cluster, write
from titan.dryrun.space import FLOAT8, KEYS
from titan.dryrun.words import GIB, as_json, heading, memory_lines, pair_lines, saving_lines, time_lines, traffic_lines
from titan.files import write_atomically
from titan.progress import ProgressBar
from titan.status import Exit
from titan.terminal import columns, plural
from titan.toml import ConfigError, read_text, to_toml
from titan.toml_edit import with_keys

if TYPE_CHECKING:
    from titan.dryrun.plan import JobPlan

Again = Callable[[list[str]], Config]
"""The command line's config with more words on it."""


def run(words: list[str]) -> int:
    """Plan and print."""
    parser = Parser("plan")
    parser.add_argument("--plan", default="")
    parser.add_argument("--world-size", type=int)
    parser.add_argument("--cluster")
    parser.add_argument("--savings", action="store_true")
    parser.add_argument("--calibrate", action="store_true")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--search", action="store_true")
    parser.add_argument("--pin", action="append", default=[])
    parser.add_argument("--float8", action="store_true")
    parser.add_argument("--json", action="store_true")
    given, rest = parser.parse_with_config(words)
    if given.world_size is not None and given.world_size < 1:
        parser.error("--world-size is a whole number, 1 or more")
    files = [place for place, word in enumerate(rest) if not word.startswith("-")]
    for option in ("savings", "calibrate", "out", "search"):
        if len(files) == 2 and getattr(given, option):
            parser.error(f"--{option} is for one CONFIG")
    if given.calibrate and given.cluster in DATA_SHEETS:
        parser.error(f"--calibrate writes a file, and {given.cluster} is a data sheet's; leave --cluster out, or name another")
    if given.calibrate and given.cluster not in (None, "local") and not given.cluster.endswith(".toml"):
        parser.error(f"--calibrate writes the cluster file local, or one that you name: --cluster {given.cluster}.toml")
    for option in ("pin", "float8"):
        if getattr(given, option) and not given.search:
            parser.error(f"--{option} is for --search")
    if given.search and (given.plan or given.savings or given.calibrate):
        parser.error("--search finds a plan: --plan, --savings and --calibrate are for one that is given; --pin holds keys")
    if given.search and given.out is not None and given.out.suffix != ".toml":
        parser.error(f"--out {given.out}: with --search a config is written; name it {given.out.with_suffix('.toml')}")
    if given.search and given.out is not None and not given.out.parent.is_dir():
        parser.error(f"--out {given.out}: there is no folder {given.out.parent}")
    changed = [key for key in KEYS if key != FLOAT8 or given.float8]
    if given.search and (held := next((word for word in rest if word[2:].split("=")[0] in changed), None)):
        parser.error(f"{held}: a search finds this key; write --pin {held[2:]} to hold it")
    if not given.search:
        require_picture(given.out)
    cluster = None if given.calibrate else read_cluster(given.cluster or "h100")
    began, width = time.monotonic(), columns(sys.stdout, 100)
    configs, jobs, less = [], [], list[tuple[str, float]]()
    for file in files if len(files) == 2 else [None]:
        own = [word for place, word in enumerate(rest) if file is None or place == file or place not in files]
        own = with_plan(given.plan, own) if given.plan else own
        again = partial(config_of, own)
        config = again([])
        world = given.world_size or least_ranks(config.parallel)
        if given.search:
            assert cluster is not None
            return find(config, own, again, world, cluster, given)
        if wrong := problems(config, world, elsewhere=True):
            raise ConfigError("\n".join(blame(config, own, f"{problem.key}: {problem.sentence}") for problem in wrong))
        if given.out is not None and config.parallel.pp == 1:
            parser.error("--out draws a pipeline, and the plan has none: write --plan pp=4, say")
        if cluster is None:
            cluster = calibrated(config, world, place(given.cluster or "local"))
        try:
            jobs.append(plan_with_bar(config, world, cluster))
            less = savings(config, again, world, cluster, jobs[0]) if given.savings else []
        except ValueError as error:  # a word that only PyTorch can judge
            raise ConfigError(f"{config.source}: {error}") from error
        configs.append(config)
    assert cluster is not None
    if given.out is not None:
        draw(given.out, configs[0], jobs[0])
    if given.json:
        found = [as_json(config, job, cluster) for config, job in zip(configs, jobs, strict=True)]
        print(json.dumps(found if len(found) == 2 else found[0], indent=2))
        return Exit.FINISHED
    for name, config, job in zip("AB", configs, jobs, strict=False):
        print("\n".join([*([f"{name}: {config.source}"] if len(jobs) == 2 else []), *heading(config, job, cluster), ""]))
    if len(jobs) == 2:
        print("\n".join(pair_lines(configs, jobs, cluster, width)))
    else:
        job, sent = jobs[0], traffic_lines(jobs[0])
        print("\n".join([*memory_lines(configs[0], job, cluster, width), *saving_lines(less), "", *sent]))
        print("\n".join(time_lines(configs[0], job, cluster, width)))
    if given.out is not None:
        print(f"\nwritten: {given.out}")
    print(f"\nPlanned in {time.monotonic() - began:.0f} s. None of the ranks was started.")
    return Exit.FINISHED


def config_of(words: list[str], more: list[str]) -> Config:
    """The command line's config with more words on it."""
    return read_config([*words, *more])


def find(config: Config, words: list[str], again: Again, world: int, cluster: Cluster, given: argparse.Namespace) -> int:
    """Search for the best plan; print and write what was found."""
    from titan.dryrun.found import as_object, changed_keys, found_lines
    from titan.dryrun.search import search

    began, pins = time.monotonic(), dict[str, Any]()
    for pin in given.pin:
        key, _, value = pin.partition("=")
        if key not in KEYS:
            hint = did_you_mean(key, KEYS) or f"; a search changes {', '.join(KEYS)}"
            raise ConfigError(f"command line: --pin {pin}: no key of a search{hint}; others are given as --table.key=value")
        table, name = key.split(".")
        if key in pins:
            raise ConfigError(f"command line: --pin {pin}: {key} is pinned twice")
        pins[key] = getattr(getattr(again([f"--{key}={value}"]), table), name)
        if pins[key] == -1:
            raise ConfigError(f"command line: --pin {pin}: -1 is what is left; pin a number, or the other degrees")
    if str(pins.get("parallel.pp_schedule")).endswith(".csv"):
        said = "a file is for so many ranks and micro batches, which a search varies; plan with it without --search"
        raise ConfigError(f"command line: --pin parallel.pp_schedule: {said}")
    if given.float8 and FLOAT8 in pins:
        raise ConfigError(f"command line: --float8 searches over what --pin {FLOAT8}={pins[FLOAT8]} holds; leave one out")
    if not given.float8:
        pins.setdefault(FLOAT8, config.precision.float8)
    try:
        if given.out is not None:
            with_keys(read_text(Path(config.source)), {})
        found = search(config, world, cluster, pins, bar)
    except ValueError as error:
        raise ConfigError(f"{config.source}: --search: {error}") from error
    keys = changed_keys(config, world, found.entries[0].choice)
    if given.json:
        print(json.dumps(as_object(config, world, cluster, found), indent=2))
    else:
        print("\n".join(found_lines(config, world, cluster, found, columns(sys.stdout, 100))))
    if given.out is not None:
        write_winner(given.out, config, words, keys)
    if given.json:
        return Exit.FINISHED
    if given.out is not None:
        print(f"\nwritten: {given.out}, with {', '.join(f'{key} = {to_toml(value)}' for key, value in keys.items())}")
    print(f"\nSearched for {time.monotonic() - began:.0f} s. None of the ranks was started.")
    return Exit.FINISHED


def write_winner(out: Path, config: Config, words: list[str], keys: dict[str, Any]) -> None:
    """The config's file with these keys, and with those of the command line."""
    given = dict[str, Any]()
    for word in words:
        if word.startswith("--") and "=" in word:
            table, name = word[2:].split("=")[0].split(".")
            owner = config.model.config if table == "model" and name not in ("name", "size") else getattr(config, table)
            given[f"{table}.{name}"] = getattr(owner, name)
    try:
        text = with_keys(read_text(Path(config.source)), given | keys)
    except ValueError as error:
        said = ", ".join(f"{key} = {to_toml(value)}" for key, value in keys.items())
        raise ConfigError(f"{config.source}: {error}; write {said} into it yourself") from error
    write_atomically(out, text)


def bar(what: str, count: int, items: Iterable[Any]) -> Iterator[Any]:
    """The items, with a bar of how many are done."""
    shown = ProgressBar(count, "searching", lambda line: print(line, file=sys.stderr), unit=what)
    for item in items:
        yield item
        shown.add(1)
    shown.close()


def calibrated(config: Config, world: int, path: Path) -> Cluster:
    """This machine as a cluster, with what the config's step is made of measured; written to the file."""
    from titan.dryrun.calibrate import calibrate
    from titan.dryrun.plan import work_of_ranks

    if not path.parent.is_dir():
        raise ConfigError(f"command line: --cluster {path}: there is no folder {path.parent}")
    old = read_cluster(str(path)) if path.exists() else None
    try:
        print(f"measuring operations and messages on {plural(world, 'rank')}", file=sys.stderr)
        found = calibrate(work_of_ranks(config, world), world, config.model.name)
    except ValueError as error:
        raise ConfigError(f"command line: --calibrate: {error}") from error
    if old is not None and old.gpu.name != found.gpu.name:
        print(f"{path} was of {old.gpu.name}, this is {found.gpu.name}: nothing of it is kept", file=sys.stderr)
    write(path, found if old is None else joined(old, found))
    print(f"written: {path}", file=sys.stderr)
    return read_cluster(str(path))


def draw(out: Path, config: Config, job: JobPlan) -> None:
    """The passes of the job's pipeline in time."""
    from titan.parallel.schedules import table
    from titan.parallel.timeline import in_flight

    parallel, micros = config.parallel, accumulation(config.training, job.plan.data_parallel)
    schedule = table(parallel.pp_schedule, parallel.pp, parallel.pp_stages_per_rank, micros)
    note = f"passes as long as planned; in all {job.time.seconds:.3g} s a step"
    panel = Panel("planned", note, job.time.times, job.time.owners, in_flight(schedule.orders))
    write_atomically(out, svg(f"{config.source}: {plan_words(config, job.plan.world)}", [panel]))


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
