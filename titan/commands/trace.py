"""titan trace CONFIG [--plan PLAN] [--rank R] [--steps N] [--story] [--table.key=value ...]

What the ranks say to each other in a training step: every collective and message, by where in the step it happens, the
dimension of the plan that it belongs to, operation, type and bytes; and beside it what the formula of that dimension gives.
Starts as many ranks as the plan has, on this machine's CPU, and runs a few real steps. No GPU is needed. Exit code 1 where the
two differ on any rank.

  --plan PLAN   keys of [parallel], or any table.key, with their values and
                commas between: tp=2,pp=2. Without it: CONFIG's own plan,
                on as few ranks as it needs
  --rank R      whose messages are shown (0); all ranks are compared
  --steps N     how many steps are counted, after a first one (2)
  --story       instead of the table, what rank R does in a step, in plain
                sentences with figures

  titan trace train_configs/debug.toml --plan dp_shard=2
  titan trace train_configs/debug.toml --plan tp=2,pp=2 --rank 2
  titan trace train_configs/debug.toml --plan dp_shard=2,cp=2 --story
  titan trace train_configs/debug.toml --plan cp=4,cp_method=ulysses
  titan trace train_configs/debug.toml --plan tp=2,recompute.mode=full

Bytes are of a message as the operation sees it: of a tensor that is added up (all_reduce), sent or received; of all that an
all_gather has in the end, or a reduce_scatter or all_to_all in the beginning. On n ranks a rank sends (n - 1)/n of those, of an
all_reduce twice as much. On a CPU, gathers and reduce-scatters of tensor and context parallelism are all_to_alls of as many
bytes.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from textwrap import fill
from typing import TYPE_CHECKING

from titan.arguments import Parser
from titan.commands.verify import config_and_world
from titan.config import Config, degrees
from titan.status import Exit
from titan.terminal import beside, columns, plural

if TYPE_CHECKING:
    from titan.tracing import Traffic
    from titan.traffic.shape import Flow

HEAD = f"{'where':10} {'dimension':12} {'operation':14} {'type':9} {'messages':>8} {'bytes':>16}"


def run(words: list[str]) -> int:
    """Trace, print, compare."""
    parser = Parser("trace")
    parser.add_argument("--plan", default="")
    parser.add_argument("--rank", type=int, default=0)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--story", action="store_true")
    given, rest = parser.parse_with_config(words)
    config, world = config_and_world(given.plan, rest)
    if given.steps < 1:
        parser.error("--steps is a whole number, 1 or more")
    if not 0 <= given.rank < world:
        parser.error(f"--rank {given.rank}: the plan has ranks 0 to {world - 1}")

    from titan.pool import Pool

    with Pool(group_seconds=300, workers=world) as pool:
        from titan.rehearsal import with_data
        from titan.tracing import trace

        config = with_data(config, print)
        if given.story:
            from titan.story import live, tell

            facts = pool.run(world, live, config, 1 + given.steps, pool.group_seconds, timeout=600)[given.rank]
            for part, said in tell(config, world, facts):
                print(fill(said, columns(sys.stdout, 100), initial_indent=f"{part:10} ", subsequent_indent=" " * 11))
            return Exit.FINISHED
        found = pool.run(world, trace, config, given.steps, pool.group_seconds, timeout=600)
    print(f"A step of {plan_words(config, world)}, as rank {given.rank} of {world} sends and receives it:\n")
    width = columns(sys.stdout, 100)
    print(HEAD)
    for row, below in table(*found[given.rank]):
        print(row)
        for lead, text in below:
            print(beside(lead, text, width))
    wrong = [f"rank {rank}: {words}" for rank, (got, flows) in enumerate(found) for words in differences(got, flows)]
    print()
    print("\n".join(wrong) if wrong else f"Measured and by formula: equal on {plural(world, 'rank')}, to the byte.")
    return Exit.FAILED if wrong else Exit.FINISHED


def plan_words(config: Config, world: int) -> str:
    """The plan: dp_shard 2 x tp 2, 8 micro batches."""
    plan = degrees(config.parallel, world)
    used = [f"{name} {degree}" for name, degree in vars(plan).items() if isinstance(degree, int) and degree > 1]
    micros = config.training.global_batch_size // (plan.data_parallel * config.training.micro_batch_size)
    return f"{' x '.join(used) or 'one rank'}, {micros:,} micro batch{'' if micros == 1 else 'es'}"


def table(got: Traffic, flows: list[Flow]) -> Iterator[tuple[str, list[tuple[str, str]]]]:
    """A row for each kind, and what stands below it with how far it is set in: what it is, and its formula."""
    last = ""
    order = ("count", "weights", "forward", "hand-over", "backward", "gradients", "norm")
    for kind in sorted(got, key=lambda kind: (order.index(kind.phase), kind)):
        count, size = got[kind]
        own = [flow for flow in flows if (flow.phase, flow.dimension, flow.op, flow.dtype) == tuple(vars(kind).values())]
        sign = "=" if (sum(flow.count for flow in own), sum(flow.bytes for flow in own)) == (count, size) else "<- not as below"
        phase = "" if kind.phase == last else kind.phase
        last = kind.phase
        row = f"{phase:10} {kind.dimension:12} {kind.op:14} {kind.dtype:9} {count:>8,} {size:>16,}  {sign}"
        yield row, [line for flow in own for line in (("    ", flow.what), ("      ", flow.formula))]


def differences(got: Traffic, flows: list[Flow]) -> Iterator[str]:
    """What was measured and what the formulas give, where they differ."""
    from titan.tracing import Kind

    wanted: dict[Kind, tuple[int, int]] = {}
    for flow in flows:
        kind = Kind(flow.phase, flow.dimension, flow.op, flow.dtype)
        count, size = wanted.get(kind, (0, 0))
        wanted[kind] = count + flow.count, size + flow.bytes
    for kind in sorted(set(got) | set(wanted)):
        measured, formula = got.get(kind, (0, 0)), wanted.get(kind, (0, 0))
        if measured != formula:
            said = f"{measured[0]:,} messages, {measured[1]:,} bytes; by formula {formula[0]:,}, {formula[1]:,}"
            yield f"{kind.phase}, {kind.dimension}, {kind.op}, {kind.dtype}: {said}"
