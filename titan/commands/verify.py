"""titan verify CONFIG --plan PLAN [--plan PLAN ...] [--seeds N] [--steps N] [--mistake NAME] [--table.key=value ...]

Shows that a parallel plan computes what one process computes. Starts as many ranks as the plan has, on this machine's CPU,
trains a few steps under the plan and in one process with the same weights and data, and compares losses, gradient norms and
every parameter's gradient. No GPU is needed. Exit code 1 where one of them is off by more than rounding.

  --plan PLAN   keys of [parallel], or any table.key, with their values and
                commas between: tp=2,pp=2,pp_schedule=GPipe. What it does not
                name is as in CONFIG, but for the degrees, which are 1
  --seeds N     how many seeds, from training.seed on (1)
  --steps N     how many steps are compared (5)
  --all         each parameter's error, not only the worst one's
  --mistake M   have the plan's ranks make a mistake that is easily made, to
                see it caught: weights-by-rank, same-samples, mean-of-means,
                no-sum, partial-norms, divided-twice, positions-from-zero,
                new-masks (titan/mistakes.py)

  titan verify train_configs/debug.toml --plan tp=2 --plan pp=2
  titan verify train_configs/debug.toml --plan dp_shard=2,cp=2 --seeds 3
  titan verify train_configs/debug.toml --plan tp=2,recompute.mode=full
  titan verify train_configs/debug.toml --plan tp=2 --model.name=gpt2
  titan verify CONFIG --plan cp=2,data.document_mask=true --training.seq_len=64

A gradient's error is |g_plan - g_one| / |g_one|, in float32: up to 3e-6 is rounding, from additions in another order.
A wrong divisor or a lost sum is 1e-3 or more, in the parameters that it concerns. With precision.float8 both runs round
to 8 bits, and a number between two roundings may go either way: most errors are as small, some are a few percent.
Large models take long: make them small with --model.n_layers=4 and --training.seq_len=64; a plan's mistakes do not
depend on the size.
"""

from __future__ import annotations

import argparse
import re
from dataclasses import replace
from typing import TYPE_CHECKING

from titan.arguments import Parser, check_config, did_you_mean, read_config
from titan.config import Config, degrees, least_ranks
from titan.status import Exit
from titan.terminal import plural
from titan.toml import ConfigError

if TYPE_CHECKING:
    from titan.pool import Pool
    from titan.verify import Comparison

DEGREES = ("dp_replicate", "dp_shard", "tp", "cp", "pp")


def run(words: list[str]) -> int:
    """Compare each plan with one process, a line each as it is done."""
    parser = Parser("verify")
    parser.add_argument("--plan", action="append", default=[])
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--all", action="store_true")
    parser.add_argument("--mistake", default="")
    given, rest = parser.parse_with_config(words)
    if not given.plan:
        parser.error("which plan? for example --plan tp=2")
    if given.seeds < 1 or given.steps < 1:
        parser.error("--seeds and --steps are whole numbers, 1 or more")
    plans = {plan: planned(plan, rest) for plan in given.plan}
    for plan, config in plans.items():
        if {config.precision.param, config.precision.reduce} != {"float32"}:
            said = "what is compared is float32, where rounding is small; leave [precision] as it is"
            raise ConfigError(f"--plan {plan}: {said}")

    from titan.pool import Pool

    ranks = degrees(next(iter(plans.values())).parallel, 1).world
    with Pool(group_seconds=300, workers=ranks) as pool:  # compilers are slow, and a machine may be small
        failed = compare_all(parser, given, plans, pool)
    compared = plural(len(plans) * given.seeds, "comparison")
    print(f"\n{compared}: " + (f"{failed} out of bounds" if failed else "each computes what one process computes"))
    return Exit.FAILED if failed else Exit.FINISHED


def compare_all(parser: Parser, given: argparse.Namespace, plans: dict[str, Config], pool: Pool) -> int:
    """Compare and print; how many are out of bounds."""
    from titan.rehearsal import with_data
    from titan.verify import FLOAT8, DisagreeError, Verifier, tolerance

    if given.mistake:
        from titan.mistakes import MISTAKES, has_place

        if given.mistake not in MISTAKES:
            hint = did_you_mean(given.mistake, MISTAKES) or f"; there are {', '.join(MISTAKES)}"
            parser.error(f"--mistake: no mistake {given.mistake!r}{hint}")
        for plan, config in plans.items():
            if what := has_place(given.mistake, config):
                raise ConfigError(f"--plan {plan}: --mistake {given.mistake} has no place in it: it needs {what}")
        print(f"The plan's ranks make a mistake. {MISTAKES[given.mistake].__doc__}")
    print(f"{plural(given.steps, 'step')} in float32 against one process, same weights and data; errors are relative.")
    for most in dict.fromkeys(tolerance(config) for config in plans.values()):
        what = "In Float8 a gradient" if most == FLOAT8 else "A gradient"
        print(f"{what} may be off by {most.gradient:.0e} of its norm, losses and the norm of all by {most.loss:.0e}.")
    print()
    width, failed = max(map(len, plans)), 0
    heads = f"{'plan':{width}}  ranks  seed     loss     norm  gradient  worst parameter"
    verifier = Verifier(pool, given.steps, given.mistake)
    for plan, config in plans.items():
        config = with_data(config, print)
        for seed in range(config.training.seed, config.training.seed + given.seeds):
            asked = replace(config, training=replace(config.training, seed=seed))
            if heads:
                print(heads)
                heads = ""
            line = f"{plan:{width}}  {degrees(config.parallel, 1).world:5}  {seed:4} "
            try:
                found = verifier.compare(asked)
            except DisagreeError as error:
                print(f"{line} FAILED: {error}", flush=True)
                failed += 1
                continue
            print(f"{line} {outcome(found)}", flush=True)
            if given.all:
                print("\n".join(f"    {error:8.1e}  {name}" for name, error in found.gradients.items()))
            failed += not found.holds
    return failed


def planned(plan: str, rest: list[str]) -> Config:
    """CONFIG under a plan, checked. Degrees are 1 unless the plan says otherwise."""
    words = with_plan(plan, rest)
    config = read_config(words)
    return check_config(config, degrees(config.parallel, 1).world, words)


def with_plan(plan: str, rest: list[str]) -> list[str]:
    """The command line with a plan's keys on it."""
    keys = [key for key in re.split(r",(?![^\[{]*[\]}])", plan) if key]
    if not all("=" in key for key in keys):
        raise ConfigError(f"command line: --plan {plan}: expected key=value pairs with commas between, as in tp=2,pp=2")
    own = [f"--{key}" if "." in key.split("=")[0] else f"--parallel.{key}" for key in keys]
    return [*rest, *(f"--parallel.{name}=1" for name in DEGREES), *own]


def config_and_world(plan: str, rest: list[str], world_size: int = 0) -> tuple[Config, int]:
    """CONFIG under a plan, or "" for its own, checked for so many ranks, 0: as few as it needs; and the ranks."""
    if world_size < 0:
        raise ConfigError("command line: --world-size is a whole number, 1 or more")
    config = planned(plan, rest) if plan else read_config(rest)
    world = world_size or least_ranks(config.parallel)
    return check_config(config, world, rest), world


def outcome(found: Comparison) -> str:
    """The figures of a line, and in words what is wrong."""
    wrong = "" if found.holds else "   <- out of bounds" if found.starts_equal else "   <- the weights start differently"
    return f"{found.loss:7.1e}  {found.norm:7.1e}   {found.gradient:7.1e}  {found.worst}{wrong}"
