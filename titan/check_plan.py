"""The rules of the plan, `[parallel]`: what `titan.check` lists of it. How a rule works is said there.

A degree of 1 switches its dimension off, and with it the rules for that: a plan in a TOML stays as it is while
`--parallel.tp=1` on the command line tries it without. Whatever can work is let through, uneven widths among it. No torch.
"""

from __future__ import annotations

import difflib
import math
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from titan import zoo
from titan.config import Config, accumulation, degrees
from titan.parallel import schedules
from titan.parallel.schedules import STAGES, Table
from titan.sharding import styles

AXES = ("pp", "dp_replicate", "dp_shard", "cp", "tp")


@dataclass(frozen=True)
class Problem:
    """A refusal: the key to change and why."""

    key: str
    sentence: str


def degrees_make_up_the_world(config: Config, world: int | None) -> Problem | None:
    plan = config.parallel
    if plan.dp_replicate == -1 and plan.dp_shard == -1:
        return Problem("parallel.dp_replicate", "only one degree can be -1 (what is left); dp_shard is -1 too")
    if world is None or degrees(plan, world).world == world:
        return None
    asked = {axis: getattr(plan, axis) for axis in AXES}
    shown = [axis for axis in AXES if asked[axis] != 1 or axis.startswith("dp")]

    def distance(found: dict[str, int]) -> list[float]:
        """How far another plan is from the one that was asked for: how many degrees differ, then by what factor."""
        apart: list[float] = []
        for axes in (("tp", "cp", "pp"), ("dp_replicate", "dp_shard")):  # the first as they are, if possible
            factors = [abs(math.log(found[axis] / asked[axis])) for axis in axes if asked[axis] != -1]
            apart += [sum(f > 0 for f in factors), sum(factors)]
        return apart

    plans = (dict(zip(AXES, factors, strict=True)) for factors in _factorings(world, len(AXES)))
    fits = [
        ", ".join(f"{axis} = {n}" for axis, n in found.items() if axis in shown or n > 1)
        for found in sorted(plans, key=distance)[:3]
    ]
    said = " x ".join(f"{axis} {asked[axis]}" for axis in shown)
    return Problem("parallel", f"{said} do not multiply up to {world} ranks; these do: {'; '.join(fits)}")


def batch_divides(config: Config, world: int | None) -> Problem | None:
    if world is None or degrees(config.parallel, world).world != world:
        return None
    total, micro = config.training.global_batch_size, config.training.micro_batch_size
    ranks = degrees(config.parallel, world).data_parallel
    unit = ranks * micro
    if total % unit == 0:
        return None
    nearest = either(n for n in (total // unit * unit, (total // unit + 1) * unit) if n > 0)
    said = f"{total} sequences are not a whole number of {ranks} data-parallel ranks x micro_batch_size {micro} = {unit}"
    fits = [m for m in range(1, total // ranks + 1) if total % (ranks * m) == 0]
    close = sorted(sorted(fits, key=lambda m: abs(m - micro))[:3])
    also = f"; or keep it and set micro_batch_size to {either(close)}" if close else ""
    return Problem("training.global_batch_size", f"{said}; the nearest that are: {nearest}{also}")


def sharding_words_fit(config: Config, world: int | None) -> Problem | None:
    table, overrides = zoo.sharding(config.model.name, config.model.config), config.parallel.sharding
    if not overrides:
        return None
    try:
        words = styles(table, overrides)
    except ValueError as error:
        return Problem("parallel.sharding", str(error))
    attention = table.core.rpartition(".")[0]
    for pattern, own in table.tensor.items():
        for number in range(table.blocks if f"{pattern}.".startswith(f"{attention}.") else 0):
            name = pattern.replace("*", str(number), 1)
            if words[name] != own:
                said = f"{name!r} cannot be {words[name]!r}: attention needs whole sequences and whole heads"
                return Problem("parallel.sharding", f"{said}; leave it {own!r}")
    return None


def heads_are_shared_evenly(config: Config, world: int | None) -> Problem | None:
    tp, words, table = config.parallel.tp, _words(config), zoo.sharding(config.model.name, config.model.config)
    heads, kv_heads = table.heads, table.kv_heads

    def fits(ranks: int) -> bool:
        kv_fit = kv_heads % ranks == 0 or ranks % kv_heads == 0
        return ("heads" not in words or heads % ranks == 0) and ("kv" not in words or kv_fit)

    if fits(tp):
        return None
    said = f"{tp} ranks cannot share {heads} query heads" + (f" and {kv_heads} key and value heads" if "kv" in words else "")
    nearest = either(around(filter(fits, range(1, heads + 1)), tp))
    return Problem("parallel.tp", f"{said} evenly; the nearest that can: {nearest}")


def widths_reach_every_rank(config: Config, world: int | None) -> Problem | None:
    tp, words, table = config.parallel.tp, _words(config), zoo.sharding(config.model.name, config.model.config)
    ffn = getattr(config.model.config, "ffn_dim", None)
    for what, width, cut_by in (("vocab_size", table.vocabulary, {"embed", "head"}), ("ffn_dim", ffn, {"col"})):
        if width is not None and width < tp and cut_by & words:
            return Problem("parallel.tp", f"{tp} ranks cannot share model.{what} = {width}; write at most {width}")
    return None


def sequence_is_shared_evenly(config: Config, world: int | None) -> Problem | None:
    asked, cp, tp = config.training.seq_len, config.parallel.cp, config.parallel.tp
    unit = math.lcm(2 * cp, cp * tp) if cp > 1 else tp
    if asked % unit == 0:
        return None
    cuts = " and ".join([f"cp = {cp} (two pieces a rank)"] * (cp > 1) + [f"tp = {tp}"] * (tp > 1))
    nearest = either(n for n in (asked // unit * unit, (asked // unit + 1) * unit) if n > 0)
    return Problem("training.seq_len", f"{cuts} cannot cut {asked} tokens evenly; write a multiple of {unit}: {nearest}")


def ulysses_has_heads_for_every_rank(config: Config, world: int | None) -> Problem | None:
    plan, heads = config.parallel, zoo.sharding(config.model.name, config.model.config).heads
    rank_has = heads // plan.tp
    if plan.cp_method != "ulysses" or rank_has % plan.cp == 0:
        return None
    said = f"ulysses cannot share {rank_has} query heads evenly among cp = {plan.cp}"
    whose = f" (of {heads}, cut by tp = {plan.tp})" if rank_has < heads else ""
    return Problem("parallel.cp_method", f'{said}{whose}; write "ring" or "allgather"')


def schedule_exists(config: Config, world: int | None) -> Problem | None:
    name = config.parallel.pp_schedule
    if name in STAGES or (name.endswith(".csv") and os.path.isfile(name)):
        return None
    if name.endswith(".csv"):
        return Problem("parallel.pp_schedule", f"{name!r} does not exist{nearest_path(name)}")
    close = difflib.get_close_matches(name.lower(), [known.lower() for known in STAGES], 1)
    meant = [f"did you mean {known!r}?" for known in STAGES if known.lower() in close]
    known = f"there are {', '.join(STAGES)}, and paths of .csv files"
    return Problem("parallel.pp_schedule", f"no schedule {name!r}; {meant[0] if meant else known}")


def schedule_takes_the_stages(config: Config, world: int | None) -> Problem | None:
    plan = config.parallel
    if plan.pp == 1 or plan.pp_schedule not in STAGES:
        return None
    try:
        schedules.table(plan.pp_schedule, plan.pp, plan.pp_stages_per_rank, 2 * plan.pp)
    except ValueError as error:
        return Problem("parallel.pp_stages_per_rank", str(error))
    return None


def schedule_takes_the_micro_batches(config: Config, world: int | None) -> Problem | None:
    try:
        _table(config, world)
    except ValueError as error:
        if config.parallel.pp_schedule not in STAGES:
            return Problem("parallel.pp_schedule", str(error))
        return Problem("training.micro_batch_size", f"{error}; lower it, or raise training.global_batch_size")
    return None


def stages_have_blocks(config: Config, world: int | None) -> Problem | None:
    stages, blocks = _stages(config, world), zoo.sharding(config.model.name, config.model.config).blocks
    if stages <= blocks:
        return None
    said = f"{stages} stages need a block each, and the model has {blocks}"
    return Problem("parallel.pp", f"{said}; lower it, or write fewer in parallel.pp_stages_per_rank")


def split_shares_out_the_blocks(config: Config, world: int | None) -> Problem | None:
    split, stages = config.parallel.pp_split, _stages(config, world)
    blocks = zoo.sharding(config.model.name, config.model.config).blocks
    if not split or not stages or stages > blocks or (len(split) == stages and min(split) > 0 and sum(split) == blocks):
        return None
    even = [blocks * (i + 1) // stages - blocks * i // stages for i in range(stages)]
    wanted = f"write {stages} numbers, each 1 or more, that add up to {blocks}, such as {even}, or leave it out"
    return Problem("parallel.pp_split", f"{split} does not share out {blocks} blocks to {stages} stages; {wanted}")


def zero_bubble_is_not_compiled(config: Config, world: int | None) -> Problem | None:
    if not config.compile.enable:
        return None
    try:
        found = _table(config, world)
    except ValueError:  # another rule says so
        return None
    if found is None or not any(action.kind == "W" for order in found.orders for action in order):
        return None
    said = f"{config.parallel.pp_schedule} computes gradients of weights later, which a compiled block cannot"
    return Problem("compile.enable", f'{said}; leave it out, or set parallel.pp_schedule to "1F1B" or "Interleaved1F1B"')


def what_selective_keeps_stays(config: Config, world: int | None) -> Problem | None:
    if not config.offload.activations or config.recompute.mode != "selective":
        return None
    said = "selective recompute keeps results by itself, on the device"
    return Problem("offload.activations", f'{said}; set recompute.mode to "full" or "none", or leave this out')


def reshard_divides_the_shards(config: Config, world: int | None) -> Problem | None:
    asked = config.parallel.reshard_after_forward
    if world is None or not asked.isdecimal() or degrees(config.parallel, world).world != world:
        return None
    ranks = degrees(config.parallel, world).dp_shard * config.parallel.cp
    if ranks < world:  # PyTorch makes a group for the copy, which only all ranks together can
        said = f'a copy within "{asked}" ranks needs all {world} ranks in one copy (dp_shard x cp), not {ranks}'
        return Problem("parallel.reshard_after_forward", f'{said}; write "always" or "never"')
    if ranks == 1 or (ranks % int(asked) == 0 and int(asked) < ranks):
        return None
    fits = around((n for n in range(2, ranks) if ranks % n == 0), int(asked))
    hint = either(f'"{n}"' for n in fits) if fits else '"auto"'
    said = f'"{asked}" has to divide the {ranks} ranks that share one copy (dp_shard x cp), and be less'
    return Problem("parallel.reshard_after_forward", f"{said}; write {hint}")


def nearest_path(path: str) -> str:
    """A question whether a path was meant that exists, where one in the same folder is nearly the same."""
    folder, name = os.path.split(path)
    try:
        found = difflib.get_close_matches(name, os.listdir(folder or "."), 1)
    except OSError:
        return ""
    return f"; did you mean {os.path.join(folder, found[0])!r}?" if found else ""


def either(values: Iterable[object]) -> str:
    """a, b or c."""
    shown = [str(v) for v in values]
    return shown[0] if len(shown) == 1 else ", ".join(shown[:-1]) + " or " + shown[-1]


def around(fits: Iterable[int], asked: int) -> list[int]:
    """The nearest of the numbers that fit: one below what was asked for and one above, as far as there are any."""
    fits = sorted(fits)
    return [*[n for n in fits if n < asked][-1:], *[n for n in fits if n > asked][:1]]


def words_of(config: Config) -> dict[str, str]:
    """The model's modules and their words; none where they do not fit together, which another rule refuses."""
    try:
        return styles(zoo.sharding(config.model.name, config.model.config), config.parallel.sharding)
    except ValueError:
        return {}


def _words(config: Config) -> set[str]:
    return set(words_of(config).values())


def _table(config: Config, world: int | None) -> Table | None:
    """The pipeline's schedule; None without a pipeline, and where it is not known or other rules refuse it.

    Raises ValueError where there is none for this number of micro batches.
    """
    plan = config.parallel
    if plan.pp == 1 or schedule_exists(config, world) or schedule_takes_the_stages(config, world):
        return None
    micro_batches = 2 * plan.pp if plan.pp_schedule in STAGES else 0  # as many as every schedule takes, without a world
    if world is not None and degrees(plan, world).world == world and batch_divides(config, world) is None:
        micro_batches = accumulation(config.training, degrees(plan, world).data_parallel)
    return schedules.table(plan.pp_schedule, plan.pp, plan.pp_stages_per_rank, micro_batches) if micro_batches else None


def _stages(config: Config, world: int | None) -> int:
    """Stages of the pipeline; 0 without one, and where they are not known or other rules refuse them."""
    try:
        found = _table(config, world)
    except ValueError:
        return 0
    return 0 if found is None else len(found.owners)


def _factorings(number: int, count: int) -> Iterator[tuple[int, ...]]:
    """Every way to write a number as a product of so many factors, in order."""
    if count == 1:
        yield (number,)
        return
    for factor in range(1, number + 1):
        if number % factor == 0:
            for others in _factorings(number // factor, count - 1):
                yield (factor, *others)
