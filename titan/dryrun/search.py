"""The best plan: all that there are estimated, those that fit ranked, the first few of different kinds taken as a dry step.

A plan's worth is its tokens a second under the memory line. Estimates (`estimate.py`) only order: each of the first plans is
then dry-run; one that turns out not to fit makes room for a smaller one of its kind. How far estimates were from the dry runs
says how far the order can be trusted: plans that are nearer to each other than that are as good as each other.

The same blocks are priced on other clusters, too: with faster links, more memory. Where another kind of plan is first there by
estimate than here, the order depends on that.
"""

from __future__ import annotations

import math
import multiprocessing
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from dataclasses import replace
from typing import Any, NamedTuple

from titan.check import problems
from titan.config import Config, degrees
from titan.cores import cores
from titan.dryrun.cluster import Cluster
from titan.dryrun.estimate import Cut, Estimate, Fit, Model, estimate, measure, model_of
from titan.dryrun.plan import MANY_PASSES, JobPlan, plan_job
from titan.dryrun.prices import Prices
from titan.dryrun.space import Choice, choices
from titan.dryrun.words import GIB, fits, usable

CONFIRMED, TRIED = 4, 8
"""Plans that are wanted with a dry run, and dry runs at most."""
BLOCKS_OF_A_CUT = 6
"""That take a dry step to measure it, at most."""


class Here(Executor):
    """Does at once what it is handed: for little work, of which a process's start would be most."""

    def submit(self, function: Callable[..., Any], /, *given: Any, **named: Any) -> Future[Any]:
        done = Future[Any]()
        try:
            done.set_result(function(*given, **named))
        except ValueError as error:
            done.set_exception(error)
        return done


class Entry(NamedTuple):
    """A plan that was found."""

    choice: Choice
    estimate: Estimate
    job: JobPlan


class Found(NamedTuple):
    """What a search found."""

    entries: list[Entry]
    """The best first, by their dry runs; all fit."""
    ranked: list[tuple[Choice, Estimate]]
    """All that fit by estimate, the best first; check.py has judged none of them."""
    plans: int
    """That were looked at."""
    too_large: int
    refused: Counter[str]
    """Keys and sentences of check.py -> plans that it refuses, of those that were asked about."""
    elsewhere: dict[str, tuple[Choice, float]]
    """What is changed about the cluster, in words -> the plan that is first there, and how much faster than the winner."""
    error: float
    """The largest share by which an estimated step was off, of all that were dry-run, too large ones also."""


Show = Callable[[str, int, Iterable[Any]], Iterable[Any]]
"""What is done, how many, and they -> they, while a bar shows how far it is."""


def variants(cluster: Cluster) -> dict[str, Cluster]:
    """Clusters that one might have instead."""
    links, gpu = cluster.links, cluster.gpu
    return {
        "": cluster,
        "links between nodes twice as fast": replace(
            cluster, links=replace(links, between_gb_per_second=2 * links.between_gb_per_second)
        ),
        "links within a node twice as fast": replace(
            cluster, links=replace(links, inside_gb_per_second=2 * links.inside_gb_per_second)
        ),
        "half as much memory again": replace(cluster, gpu=replace(gpu, memory_gib=1.5 * gpu.memory_gib)),
    }


def search(config: Config, world: int, cluster: Cluster, pins: dict[str, Any], show: Show) -> Found:
    """Find the best plans. pins: values of `space.KEYS` that have to stay. Raises ValueError where none is legal and fits."""
    every = list(choices(config, world, cluster.links.gpus_per_node, pins))
    if not every:
        raise ValueError(f"no plan for {world} GPUs has what is pinned")
    require_alike(config)
    others, model, refused = variants(cluster), model_of(config), Counter[str]()
    cuts = legal_cuts(config, world, every, refused)
    passes = BLOCKS_OF_A_CUT * len(cuts) + CONFIRMED * 3 * config.model.config.n_layers
    many = passes >= MANY_PASSES
    with ProcessPoolExecutor(cores(), mp_context=multiprocessing.get_context("spawn")) if many else Here() as pool:
        measured = measure_all(config, list(others.values()), cuts, refused, pool, show)
        ranked, too_large = rank(config, world, every, model, measured, others)
        if not ranked[""]:
            said = f"{too_large:,} are too large for {usable(cluster):.1f} GiB; {reasons(refused)}"
            raise ValueError(f"of {len(every):,} plans none is legal and fits: {said}")
        taken = confirm(config, world, cluster, ranked[""], refused, pool, show)
    entries = [entry for entry in taken if fits(entry.job, cluster)]
    if not entries:
        hint = "pin what takes less, such as recompute.mode=full"
        raise ValueError(f"none of {len(taken)} plans that fit by estimate does; {hint}")
    off = max(abs(entry.estimate.seconds / entry.job.time.seconds - 1) for entry in taken)
    legal = {name: first_legal(config, world, pairs) for name, pairs in ranked.items()}
    elsewhere = {}
    for number, (name, first) in enumerate(legal.items()):
        if first.family != legal[""].family:
            own = of(config, world, legal[""], model, measured, others[name], number)
            elsewhere[name] = first, own.seconds / of(config, world, first, model, measured, others[name], number).seconds - 1
    ordered = sorted(entries, key=lambda entry: entry.job.time.seconds)
    return Found(ordered, ranked[""], len(every), too_large, refused, elsewhere, off)


def first_legal(config: Config, world: int, ranked: list[tuple[Choice, Estimate]]) -> Choice:
    """The best by estimate."""
    return next(choice for choice, _ in ranked if not problems(choice.on(config), world, elsewhere=True))


def require_alike(config: Config) -> None:
    """ValueError where the config names single blocks."""
    said = {"parallel.sharding": config.parallel.sharding, "precision.float8_skip": config.precision.float8_skip}
    for key, globs in said.items():
        if single := next((glob for glob in globs if any(part.isdecimal() for part in glob.split("."))), None):
            raise ValueError(f"{key} names a single block ({single}), and a search takes all to be alike; write * for it")


def legal_cuts(config: Config, world: int, every: list[Choice], refused: Counter[str]) -> list[Cut]:
    """Ways to cut a block of which a plan is legal. Of each way and micro batch the fewest pipeline ranks are asked about."""
    by_cut: dict[Cut, list[Choice]] = {}
    for choice in every:
        by_cut.setdefault(choice.cut, []).append(choice)
    found = []
    for cut, own in by_cut.items():
        fewest = {choice.micro_batch_size: choice for choice in sorted(own, key=lambda choice: -choice.pp)}
        for choice in fewest.values():
            wrong = problems(choice.on(config), world, elsewhere=True)
            if not wrong:
                found.append(cut)
                break
            refused[f"{wrong[0].key}: {wrong[0].sentence}"] += 1
    return found


def measure_all(
    config: Config, clusters: list[Cluster], cuts: list[Cut], refused: Counter[str], pool: Executor, show: Show
) -> dict[Cut, list[Fit]]:
    """Each cut's blocks on each cluster: first one of each tp, cp and Float8, which says what the others have besides."""
    kind = lambda cut: (cut.tp, cut.cp, cut.float8, cut.sharded)  # noqa: E731
    alike: dict[tuple[int, int, str, bool], Cut] = {}
    for cut in cuts:
        alike.setdefault(kind(cut), cut)
    firsts, measured = list(alike.values()), dict[Cut, list[Fit]]()
    for part in filter(None, (firsts, [cut for cut in cuts if cut not in firsts])):
        likes = {cut: measured.get(alike[kind(cut)], []) for cut in part}
        waiting = {cut: pool.submit(measure, cut, config, clusters, likes[cut]) for cut in part}
        for cut, future in show("blocks", len(waiting), waiting.items()):
            try:
                measured[cut] = future.result()
            except ValueError as error:  # a word that only PyTorch can judge
                refused[str(error)] += 1
    return measured


def of(
    config: Config, world: int, choice: Choice, model: Model, measured: dict[Cut, list[Fit]], cluster: Cluster, number: int
) -> Estimate:
    """A plan's estimate on one of the clusters."""
    own = choice.on(config)
    prices = Prices(cluster, config.precision.tf32)
    return estimate(own, degrees(own.parallel, world), measured[choice.cut][number], model, prices)


def rank(
    config: Config,
    world: int,
    every: list[Choice],
    model: Model,
    measured: dict[Cut, list[Fit]],
    clusters: dict[str, Cluster],
) -> tuple[dict[str, list[tuple[Choice, Estimate]]], int]:
    """On each cluster those that fit, by their estimated time; and how many do not on the first."""
    found: dict[str, list[tuple[Choice, Estimate]]] = {name: [] for name in clusters}
    places = [(Prices(cluster, config.precision.tf32), found[name]) for name, cluster in clusters.items()]
    too_large = 0
    for choice in every:
        if choice.cut not in measured:
            continue
        changed = choice.on(config)
        plan = degrees(changed.parallel, world)
        for (prices, own), fit in zip(places, measured[choice.cut], strict=True):
            try:
                guess = estimate(changed, plan, fit, model, prices)
            except ValueError:  # a schedule that takes no such number of micro batches, or more stages than blocks
                break
            if guess.bytes / GIB + prices.cluster.gpu.reserved_gib <= usable(prices.cluster):
                own.append((choice, guess))
            else:
                too_large += prices is places[0][0]
    return {name: sorted(own, key=lambda pair: pair[1].seconds) for name, own in found.items()}, too_large


def confirm(
    config: Config,
    world: int,
    cluster: Cluster,
    ranked: list[tuple[Choice, Estimate]],
    refused: Counter[str],
    pool: Executor,
    show: Show,
) -> list[Entry]:
    """Dry runs of the first of each family, and of its next smaller one where that does not fit, until CONFIRMED do."""
    taken: list[Entry] = []
    done: set[Any] = set()
    most: dict[Any, float] = {}
    """Of a family the estimated bytes of a plan that turned out not to fit: the next one has to be smaller."""
    while len(done) < CONFIRMED and len(taken) < TRIED:
        now: dict[Any, tuple[Choice, Estimate]] = {}
        for choice, guess in ranked:
            family = choice.family
            if family in done or family in now or guess.bytes >= most.get(family, math.inf):
                continue
            wrong = problems(choice.on(config), world, elsewhere=True)
            if wrong:
                refused[f"{wrong[0].key}: {wrong[0].sentence}"] += 1
                continue
            now[family] = choice, guess
            if len(now) == CONFIRMED - len(done):
                break
        if not now:
            break
        jobs = [pool.submit(plan_job, choice.on(config), world, cluster, list, 1) for choice, _ in now.values()]
        for (choice, guess), future in show("dry runs", len(now), list(zip(now.values(), jobs, strict=True))):
            taken.append(Entry(choice, guess, future.result()))
            if fits(taken[-1].job, cluster):
                done.add(choice.family)
            else:
                most[choice.family] = guess.bytes
    return taken


def reasons(refused: Counter[str]) -> str:
    """The rules that refuse most, in words."""
    return "; ".join(f"{count} x {said}" for said, count in refused.most_common(3)) or "no rule refuses them"
