"""Whether the plans that `titan plan --search` puts first are the fastest ones, measured on this machine.

    python benchmarks/search_order.py [--ranks 4] [--plans 12] [--steps 8]

Ranks may be more than cores. The machine is calibrated with some plans, and the search is made with that. Its first three are
then run for real, and so are plans of other kinds, from all of its list: the next by estimate to the last. Printed are the
milliseconds estimated, planned by a dry run and measured, and how far these agree.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from itertools import combinations

from plan_times import CONFIG, measure

from titan import toml
from titan.check import problems
from titan.commands.verify import planned
from titan.config import Config
from titan.dryrun.calibrate import calibrate
from titan.dryrun.cluster import Cluster, joined
from titan.dryrun.found import words_of
from titan.dryrun.plan import plan_job, work_of_ranks
from titan.dryrun.search import Found, search
from titan.dryrun.space import Choice
from titan.pool import Pool
from titan.rehearsal import with_data

WORDS = ["--data.tokenizer=bytes", "--model.vocab_size=1024", "--model.dim=256", "--model.ffn_dim=768"]
PINS = {"precision.float8": "none", "parallel.cp": 1}
FIRST = 3


def calibration(ranks: int) -> list[str]:
    """Plans whose operations and messages are measured."""
    half = ranks // 2
    plans = [f"dp_shard={ranks}", f"tp={ranks}", f"pp={ranks}", f"tp={half},dp_shard=2", f"pp={half},dp_replicate=2"]
    plans += [f"dp_shard={ranks},training.micro_batch_size={n}" for n in (1, 2)]
    return [*plans, f"tp={half},pp=2,recompute.mode=full"]


def calibrated(ranks: int) -> Cluster:
    """This machine, as it is for these plans."""
    found: Cluster | None = None
    for plan in calibration(ranks):
        config = planned(plan, [CONFIG, *WORDS])
        new = calibrate(work_of_ranks(config, ranks), ranks, config.model.name, threads=1)
        found = new if found is None else joined(found, new)
    assert found is not None
    return found


def chosen(config: Config, ranks: int, found: Found, plans: int) -> list[tuple[Choice, float]]:
    """The first three and, of the best plan of each other kind, some at even distances to the last; with estimated seconds."""
    first = [(entry.choice, entry.estimate.seconds) for entry in found.entries[:FIRST]]
    of_kind: dict[object, tuple[Choice, float]] = {choice.family: (choice, seconds) for choice, seconds in first}
    for choice, guess in found.ranked:
        if choice.family not in of_kind and not problems(choice.on(config), ranks, elsewhere=True):
            of_kind[choice.family] = choice, guess.seconds
    others = list(of_kind.values())[FIRST:]
    wanted = min(plans - len(first), len(others))
    return first + [others[place * (len(others) - 1) // max(1, wanted - 1)] for place in range(wanted)]


def main() -> int:
    """Search, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--plans", type=int, default=12)
    parser.add_argument("--steps", type=int, default=8)
    given = parser.parse_args()
    config = toml.load(CONFIG, WORDS)
    cluster = calibrated(given.ranks)
    found = search(config, given.ranks, cluster, PINS, lambda what, count, items: items)
    print(f"{found.plans} plans for {given.ranks} ranks on {cluster.gpu.name}; {len(found.ranked)} fit\n")
    print(f"  {'plan':86} {'estimated':>9} {'planned':>9} {'measured':>9} {'error':>7}")
    rows = []
    with Pool(120) as pool:
        for choice, guess in chosen(config, given.ranks, found, given.plans):
            own = with_data(choice.on(config), lambda line: None)
            ours = plan_job(own, given.ranks, cluster).time.seconds
            taken = pool.run(given.ranks, measure, own, given.steps, pool.group_seconds, timeout=600)
            rows.append((ours, statistics.median(taken)))
            figures = "".join(f"{seconds * 1e3:7.0f} ms" for seconds in (guess, *rows[-1]))
            print(f"  {words_of(config, choice):86}{figures} {ours / rows[-1][1] - 1:+7.1%}", flush=True)
    errors = sorted(abs(ours / real - 1) for ours, real in rows)
    print(f"\n{len(rows)} plans: half are within {statistics.median(errors):.1%}, all within {errors[-1]:.1%}")
    real = [seconds for _, seconds in rows]
    places = ", ".join(str(sorted(real).index(seconds) + 1) for seconds in real[:FIRST])
    print(f"by measurement the search's first {FIRST} have the places {places} of {len(rows)}")
    print(f"its first one takes {real[0] / min(real) - 1:.1%} longer than the fastest measured")
    pairs = list(combinations(rows, 2))
    right = sum((a[0] < b[0]) == (a[1] < b[1]) for a, b in pairs)
    print(f"of {len(pairs)} pairs {right} are planned in the order in which they were measured")
    return 0


if __name__ == "__main__":
    sys.exit(main())
