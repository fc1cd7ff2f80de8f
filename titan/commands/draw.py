"""titan draw WHAT CONFIG [--plan PLAN] [--out FILE.svg] [--table.key=value ...]

Pictures of a plan, in words in the terminal and, with --out, as an SVG that a README or a browser shows. WHAT is one of

  mesh      which rank stands where, and what it holds and sees
  weights   how parameters are cut: which ranks hold which part
  tokens    context parallelism: which tokens a rank has, and when it attends
            to which
  memory    what lies in a rank's memory during a step, by kind: of a real step,
            on this machine's CPU

  --plan PLAN        keys of [parallel], or any table.key, with their values
                     and commas between: tp=2,pp=2. Without it: CONFIG's own
  --out FILE.svg     the picture
  --world-size N     ranks of the whole job, where the plan leaves a degree
                     open; not for memory
  --parameter NAME   weights: this one alone, such as layers.0.attention.q.weight
  --rank R           memory: whose (0)

  titan draw mesh train_configs/debug.toml --plan dp_shard=2,tp=2,pp=2
  titan draw mesh train_configs/llama3_8b.toml --world-size 64 --out mesh.svg
  titan draw weights train_configs/debug.toml --plan dp_shard=2,tp=2
  titan draw tokens train_configs/debug.toml --plan cp=4 --out ring.svg
  titan draw memory train_configs/debug.toml --plan recompute.mode=full

mesh and weights cut the model by the code of training, in a world that is not there: no rank is started, and no memory taken.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

from titan.arguments import Parser
from titan.commands.schedule import MOST_RANKS, require_picture
from titan.commands.verify import config_and_world
from titan.config import Config, degrees
from titan.files import write_atomically
from titan.status import Exit
from titan.terminal import beside, columns, plural
from titan.toml import ConfigError

MOST_SHARED = 512
"""Ranks whose parts of a parameter are found, one after another."""


def run(words: list[str]) -> int:
    """Draw one of PICTURES."""
    parser = Parser("draw")
    parser.add_argument("what", choices=sorted(PICTURES))
    parser.add_argument("--plan", default="")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--world-size", type=int, default=0)
    parser.add_argument("--parameter", default="")
    parser.add_argument("--rank", type=int, default=0)
    given, rest = parser.parse_with_config(words)
    require_picture(given.out)
    config, world = config_and_world(given.plan, rest, given.world_size)
    if given.parameter and given.what != "weights":
        parser.error(f"--parameter is for weights, not for {given.what}")
    if given.rank and given.what != "memory":
        parser.error(f"--rank is for memory; {given.what} shows all ranks")
    if given.world_size and given.what == "memory":
        parser.error("--world-size is not for memory, which runs the plan on as few ranks as it needs")
    try:
        picture = PICTURES[given.what](config, world, given)
    except ValueError as error:  # a word that only PyTorch can judge, such as a compiler's name
        raise ConfigError(f"{config.source}: {error}") from error
    if given.out is not None:
        write_atomically(given.out, picture)
        print(f"written: {given.out}")
    return Exit.FINISHED


def title(config: Config, world: int, plan: str) -> str:
    """debug.toml: dp_shard=2, tp=2; of a plan of its own: debug.toml: dp_shard 2 x tp 2"""
    if plan:
        return f"{Path(config.source).name}: {plan.replace(',', ', ')}"
    used = [f"{name} {n}" for name, n in vars(degrees(config.parallel, world)).items() if n > 1]
    return f"{Path(config.source).name}: {' x '.join(used) or 'one rank'}"


def mesh(config: Config, world: int, given: argparse.Namespace) -> str:
    from titan.drawing.mesh import places, svg, words
    from titan.drawing.shards import ranges

    plan = degrees(config.parallel, world)
    holds = [held_by(config, stage * world // plan.pp, world) for stage in range(plan.pp)]
    print(f"{title(config, world, given.plan)}\n")
    per_step = config.training.global_batch_size // plan.data_parallel
    for at in places(plan)[:64]:
        first = (at.replicate * plan.dp_shard + at.shard) * per_step
        which = ranges(range(first, first + per_step))
        sees = f"sequence{'s' if per_step > 1 else ''} {which} of a batch's {config.training.global_batch_size}"
        print(beside(f"rank {at.rank:<4} ", f"{words(plan, at)}: {holds[at.pp]}; {sees}", columns(sys.stdout, 100)))
    if world > 64:
        print(f"... and {world - 64:,} more")
    return svg(title(config, world, given.plan), plan, holds)


def held_by(config: Config, rank: int, world: int) -> str:
    """Which of the model's modules a rank has, and how much of them."""
    from titan import zoo
    from titan.holdings import holdings, in_words, share

    held = holdings(config, rank, world)
    own, whole = share(held)
    return f"{in_words(held, zoo.sharding(config.model.name, config.model.config))}: {own:,} of {whole:,} parameters"


def weights(config: Config, world: int, given: argparse.Namespace) -> str:
    from titan.arguments import did_you_mean
    from titan.drawing.shards import Rectangle, owners, ranges, svg
    from titan.holdings import holdings

    if world > MOST_SHARED:
        raise ConfigError(f"command line: {world} ranks would take long: write a smaller plan, of {MOST_SHARED} at most")
    held = [holdings(config, rank, world) for rank in range(world)]
    shapes = {name: part.shape for of_rank in held for name, part in of_rank.items()}
    if given.parameter and given.parameter not in shapes:
        hint = did_you_mean(given.parameter, shapes) or f"; there are {', '.join(list(shapes)[:4])} ..."
        raise ConfigError(f"command line: --parameter: no parameter {given.parameter!r}{hint}")
    names = [given.parameter] if given.parameter else typical(shapes)
    parts: dict[str, tuple[tuple[int, ...], dict[Rectangle, list[int]]]] = {}
    print(f"{title(config, world, given.plan)}\n")
    for name in names:
        rectangles = [(of_rank[name].offset, of_rank[name].size) if name in of_rank else None for of_rank in held]
        parts[name] = (shapes[name], owners(rectangles))
        print(f"{name}, {' x '.join(f'{n:,}' for n in shapes[name])}")
        for (offset, size), ranks in parts[name][1].items():
            spans = [f"{a} {o:,} to {o + s - 1:,}" for a, o, s in zip(("rows", "columns"), offset, size, strict=False)]
            print(f"  {', '.join(spans):40} rank{'s' if len(ranks) > 1 else ''} {ranges(ranks)}")
    return svg(title(config, world, given.plan), parts)


def typical(shapes: dict[str, tuple[int, ...]]) -> list[str]:
    """Matrices before and after the blocks, and of the first block those of different shapes; one norm."""
    found: dict[object, str] = {}
    for name, shape in shapes.items():
        path = name.split(".")
        if len(path) > 2 and path[1] != "0":
            continue
        kind: object = "vector" if len(shape) == 1 else (path[2], shape) if len(path) > 2 else name
        found.setdefault(kind, name)
    return list(found.values())


def tokens(config: Config, world: int, given: argparse.Namespace) -> str:
    from titan import zoo
    from titan.drawing.tokens import explanation, svg, when, work
    from titan.parallel.context import pieces

    degree, method, length = config.parallel.cp, config.parallel.cp_method, config.training.seq_len
    if degree == 1:
        raise ConfigError("command line: the plan has no context parallelism: write --plan cp=4, say")
    heads = zoo.sharding(config.model.name, config.model.config).heads // config.parallel.tp
    spans = [pieces(length, rank, degree) for rank in range(degree)]
    said = f"{title(config, world, given.plan)}: {method}, {length:,} tokens"
    print(said)
    print(beside("  ", explanation(method, degree, heads), columns(sys.stdout, 100)) + "\n")
    for rank, (own, pairs) in enumerate(zip(spans, work(spans), strict=True)):
        has = " and ".join(f"{begin:,} to {end - 1:,}" for begin, end in own)
        turns = ", ".join(map(str, sorted(range(degree), key=lambda owner: when(method, rank, owner, degree))))
        meets = f"; meets keys of ranks {turns} in turn" if method == "ring" else ""
        print(f"rank {rank}: tokens {has}{meets}" + (f"; {pairs:,} pairs" if method != "ulysses" else ""))
    return svg(said, method, spans, heads)


def memory(config: Config, world: int, given: argparse.Namespace) -> str:
    from titan.drawing.memory import KINDS, amount, on_device, svg
    from titan.pool import Pool

    if world > MOST_RANKS:
        raise ConfigError(f"command line: the plan has {world} ranks, and at most {MOST_RANKS} are started here")
    if not 0 <= given.rank < world:
        raise ConfigError(f"command line: --rank {given.rank}: the plan has ranks 0 to {world - 1}")
    with Pool(group_seconds=300, workers=world) as pool:
        from titan.memory import watch_step
        from titan.rehearsal import with_data

        config = with_data(config, print)
        stories = pool.run(world, watch_step, config, pool.group_seconds, timeout=1200)
    story = stories[given.rank]
    most = story.peak[1]
    said = f"{title(config, world, given.plan)}, rank {given.rank} of {world}"
    print(f"{said}: when most of its memory is taken in a step\n")
    largest = max(most)
    for kind, size in zip(KINDS, most, strict=True):
        if size:
            bar = "#" * max(1, round(40 * size / largest))
            where = "  with the host, on a GPU" if kind == "host" else ""
            print(f"{kind:12} {amount(size):>8}  {bar}{where}")
    print(f"{'in all':12} {amount(on_device(most)):>8}" + ("  on the device" if most[KINDS.index("host")] else ""))
    if world > 1:
        peaks = [on_device(of_rank.peak[1]) for of_rank in stories]
        print(f"\npeaks of {plural(world, 'rank')}: {', '.join(map(amount, peaks))}")
    return svg(said, story)


PICTURES: dict[str, Callable[[Config, int, argparse.Namespace], str]] = {
    "mesh": mesh,
    "weights": weights,
    "tokens": tokens,
    "memory": memory,
}
