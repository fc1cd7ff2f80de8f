"""titan schedule CONFIG [--plan PLAN] [--out FILE.svg] [--ideal] [--world-size N] [--times F,I,W] [--table.key=value ...]

A pipeline's grid: what each rank does when, how long it idles (the bubble), and how many activations it holds. Three grids: the
ideal one, from the schedule's table of actions; the same with passes as long as they are on this machine's processor, which
shows what uneven stages cost; and the ranks as they ran here, on as many cores as there are. No GPU is needed.

  --plan PLAN       keys of [parallel], or any table.key, with their values
                    and commas between: pp=4,pp_schedule=ZBVZeroBubble.
                    Without it: CONFIG's own plan
  --out FILE.svg    the grids as a picture, too
  --ideal           the ideal grid alone: nothing runs, any number of ranks
  --world-size N    with --ideal: the ranks of the whole job, where the
                    plan leaves a degree open
  --times F,I,W     with --ideal: how long a forward pass, a backward pass for
                    the input and one for the weights take, of a rank that
                    holds one stage (1,1,1)
  --steps N         how many steps are timed, after two others (3)

  titan schedule train_configs/debug.toml --plan pp=4
  titan schedule train_configs/debug.toml --plan pp=4,pp_schedule=Interleaved1F1B --ideal
  titan schedule train_configs/debug.toml --plan pp=4,pp_schedule=ZBVZeroBubble --out zbv.svg
  titan schedule train_configs/debug.toml --plan pp=8 --training.global_batch_size=64 --ideal

In the terminal F3 is the forward pass of micro batch 3, B a backward pass, I and W its two halves, small letters a rank's later
stages, dots idling. "holds 4": of 4 passes the activations at once, each of one stage.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from titan.arguments import Parser
from titan.commands.verify import config_and_world
from titan.config import Config, accumulation, degrees
from titan.cores import cores
from titan.drawing.schedule import Panel, svg, text
from titan.files import write_atomically
from titan.parallel.schedules import Table, table
from titan.parallel.timeline import Action, Times, in_flight, timeline
from titan.status import Exit
from titan.terminal import beside, columns, has_colours, plural
from titan.toml import ConfigError

if TYPE_CHECKING:
    from titan.pass_times import Measured

MOST_RANKS = 16
"""Real ranks that are started on this machine."""


def run(words: list[str]) -> int:
    """Draw the grids in the terminal, and write them as a picture."""
    parser = Parser("schedule")
    parser.add_argument("--plan", default="")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--ideal", action="store_true")
    parser.add_argument("--world-size", type=int, default=0)
    parser.add_argument("--times", default="1,1,1")
    parser.add_argument("--steps", type=int)
    given, rest = parser.parse_with_config(words)
    require_picture(given.out)
    config, world = config_and_world(given.plan, rest, given.world_size)
    if config.parallel.pp == 1:
        raise ConfigError("command line: the plan has no pipeline: write --plan pp=4, say")
    if (given.world_size or given.times != "1,1,1") and not given.ideal:
        parser.error("--world-size and --times are for --ideal; what runs takes the time that it takes")
    if given.steps is not None and given.ideal:
        parser.error("--steps is for what runs; --ideal runs nothing")
    steps = 3 if given.steps is None else given.steps
    if steps < 1:
        parser.error("--steps is a whole number, 1 or more")
    if world > MOST_RANKS and not given.ideal:
        parser.error(f"the plan has {world} ranks, and at most {MOST_RANKS} are started here; --ideal starts none")

    parallel = config.parallel
    micros = accumulation(config.training, degrees(parallel, world).data_parallel)
    schedule = table(parallel.pp_schedule, parallel.pp, parallel.pp_stages_per_rank, micros)
    panels = [ideal(schedule, lengths(given.times, parser))]
    if not given.ideal:
        panels += measured(config, schedule, world, steps)
    name = Path(parallel.pp_schedule).stem
    each, many = len(schedule.owners) // parallel.pp, "batch" if micros == 1 else "batches"
    title = f"{name}: {parallel.pp} ranks, {plural(each, 'stage')} each, {micros:,} micro {many}"
    print(f"{title}\n")
    show(panels)
    if given.out is not None:
        write_atomically(given.out, svg(title, panels))
        print(f"written: {given.out}")
    return Exit.FINISHED


def require_picture(out: Path | None) -> None:
    """ConfigError where no SVG can be written there."""
    if out is not None and out.suffix != ".svg":
        raise ConfigError(f"command line: --out {out}: what is written is SVG; name it {out.with_suffix('.svg')}")
    if out is not None and not out.parent.is_dir():
        raise ConfigError(f"command line: --out {out}: there is no folder {out.parent}")


def lengths(said: str, parser: Parser) -> tuple[float, float, float]:
    """Of --times."""
    try:
        forward, back, weights = (float(word) for word in said.split(","))
    except ValueError:
        forward = back = weights = 0
    if not all(0 < length < float("inf") for length in (forward, back, weights)):
        parser.error(f"--times {said}: expected three numbers above 0 with commas between, such as 1,1.2,0.8")
    return forward, back, weights


def ideal(schedule: Table, times: tuple[float, float, float]) -> Panel:
    """The grid where every stage takes as long as another, and transfers no time."""
    forward, back, weights = times
    each = len(schedule.owners) // len(schedule.orders)
    cost = {"F": forward / each, "I": back / each, "W": weights / each, "B": (back + weights) / each}
    said = f"F {forward:g}, B {back + weights:g}" if "W" not in kinds(schedule) else f"F {forward:g}, I {back:g}, W {weights:g}"
    held = in_flight(schedule.orders)
    note = f"{said} on each rank; transfers take no time"
    return Panel("ideal", note, timeline(*schedule, cost=lambda action: cost[action.kind]), schedule.owners, held)


def kinds(schedule: Table) -> set[str]:
    return {action.kind for order in schedule.orders for action in order}


def measured(config: Config, schedule: Table, world: int, steps: int) -> list[Panel]:
    """The grid with passes as long as they were on a processor, and the ranks as they ran."""
    from titan.pool import Pool

    with Pool(group_seconds=300, workers=world) as pool:
        from titan.pass_times import measure
        from titan.rehearsal import with_data

        config = with_data(config, print)
        found: list[Measured] = pool.run(world, measure, config, steps, pool.group_seconds, timeout=600)
    ranks = found[:: world // config.parallel.pp]  # pp is the mesh's outermost dimension: the first rank of each
    spent = {action: seconds for own in ranks for action, seconds in own.processor.items()}
    clocks: list[Times] = [{a: t for own in ranks for a, t in own.clocks[i].items()} for i in range(steps)]
    clock = min(clocks, key=length)
    held = in_flight([sorted(own.clocks[0], key=own.clocks[0].__getitem__) for own in ranks])
    replay = timeline(*schedule, cost=spent.__getitem__)
    return [
        Panel(
            "measured passes, a core each",
            f"{length(replay) * 1e3:.0f} ms: the passes' processor time here, laid out as if each rank had a core of its own; "
            f"{by_stage(spent, len(schedule.owners))}",
            replay,
            schedule.owners,
            held,
        ),
        Panel(
            "as they ran here",
            f"{length(clock) * 1e3:.0f} ms by the clock: {plural(world, 'rank')} on {plural(cores(), 'core')}, "
            "transfers included",
            clock,
            schedule.owners,
            held,
        ),
    ]


def length(times: Times) -> float:
    """From the first pass's start to the last one's end."""
    return max(end for _, end in times.values()) - min(start for start, _ in times.values())


def by_stage(spent: dict[Action, float], stages: int) -> str:
    """The mean forward pass of each stage."""
    means = []
    for stage in range(stages):
        own = [seconds for action, seconds in spent.items() if action.stage == stage and action.kind == "F"]
        means.append(f"{sum(own) / len(own) * 1e3:.1f}")
    return f"a forward pass of stages 0 to {stages - 1}: {', '.join(means)} ms"


def show(panels: list[Panel]) -> None:
    """In the terminal."""
    width = columns(sys.stdout, 100)
    unicode = (sys.stdout.encoding or "").lower().replace("-", "").startswith("utf")
    for panel in panels:
        lead = f"{panel.title}: bubble {panel.bubble:.1%}"
        print(lead)
        print(beside("  ", panel.note, width))
        print(text(panel, width, has_colours(sys.stdout), unicode))
