"""How near `titan plan` comes: steps planned after calibration on this machine, against the same steps taken here.

    python benchmarks/plan_times.py [--steps 8] [--only 3,4]

A thread a rank, ranks of the pool that the tests use, so for two ranks a machine with two free cores. Each plan is calibrated
(`titan plan --calibrate`), planned, and run: two steps to warm up, then the median of some. Printed: milliseconds planned and
measured, and whether plans with the same work come in the measured order.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path

from titan.commands.verify import planned
from titan.config import Config, degrees
from titan.dryrun.calibrate import calibrate
from titan.dryrun.plan import plan_job, work_of_ranks
from titan.pool import Pool
from titan.rehearsal import Rehearsal, with_data

CONFIG = str(Path(__file__).parents[1] / "train_configs" / "debug.toml")
GPT2 = "model.name=gpt2,model.size=debug"
WIDE = "model.dim=256,model.ffn_dim=768"
SAME_WORK = (
    "dp_shard=2",
    "dp_replicate=2",
    "tp=2",
    "cp=2",
    "pp=2",
    "pp=2,pp_schedule=ZBVZeroBubble",
    "pp=2,pp_schedule=GPipe",
    "dp_shard=2,recompute.mode=full",
)
"""Two ranks each."""
OTHERS = (
    "tp=1",
    f"tp=1,{GPT2}",
    "tp=1,recompute.mode=full",
    "tp=1,training.micro_batch_size=16",
    f"tp=1,{WIDE}",
    f"dp_shard=2,{WIDE}",
    f"tp=2,{GPT2}",
    f"pp=2,{WIDE}",
)


def measure(rank: int, config: Config, steps: int, seconds: float) -> float:
    """On a rank: the median of so many steps, in seconds."""
    job = Rehearsal(rank, config, seconds)
    taken = []
    for number in range(2 + steps):
        began = time.perf_counter()
        job.step()
        if number >= 2:
            taken.append(time.perf_counter() - began)
    job.close()
    return statistics.median(taken)


def main() -> int:
    """Plan, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--only", default="", help="numbers of plans, from 0, with commas between")
    given = parser.parse_args()
    plans = [*SAME_WORK, *OTHERS]
    wanted = [int(word) for word in given.only.split(",")] if given.only else range(len(plans))
    found: dict[str, tuple[float, float]] = {}
    print(f"  {'plan':52} {'planned':>9} {'measured':>9} {'error':>7}")
    with Pool(120) as pool:
        for plan in (plans[number] for number in wanted):
            words = ["--data.tokenizer=bytes", "--model.vocab_size=1024"]
            config = with_data(planned(plan, [CONFIG, *words]), lambda line: None)
            world = degrees(config.parallel, 1).world
            cluster = calibrate(work_of_ranks(config, world), world, config.model.name, threads=1)
            ours = plan_job(config, world, cluster).time.seconds
            real = statistics.median(pool.run(world, measure, config, given.steps, pool.group_seconds, timeout=600))
            found[plan] = ours, real
            print(f"  {plan:52} {ours * 1e3:6.0f} ms {real * 1e3:6.0f} ms {ours / real - 1:+7.1%}", flush=True)
    errors = sorted(abs(ours / real - 1) for ours, real in found.values())
    print(f"\n{len(errors)} plans: half are within {statistics.median(errors):.1%}, all within {errors[-1]:.1%}")
    same = [found[plan] for plan in SAME_WORK if plan in found]
    pairs = [(a, b) for i, a in enumerate(same) for b in same[i + 1 :]]
    right = sum((a[0] < b[0]) == (a[1] < b[1]) for a, b in pairs)
    print(f"of {len(pairs)} pairs of plans with the same work {right} are planned in the order in which they were measured")
    return 0


if __name__ == "__main__":
    sys.exit(main())
