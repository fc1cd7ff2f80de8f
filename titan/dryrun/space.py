"""The plans that a search looks at: every way to share a config's work among so many GPUs.

    degrees      all that multiply up to the world; tp within a node; cp while a rank keeps 4,096 tokens of a sequence or more
    pipeline     1F1B, interleaved with 2 or 4 stages a rank, the two schedules in a V
    recompute    none, selective, full
    micro batch  1, 2, 4, .. 16 sequences
    cp method    ring, allgather, ulysses
    FSDP         weights freed after a block's forward pass, or kept
    Float8       none, tensorwise, rowwise

None but the last changes what is trained: `titan plan --search` pins that to the config's own value, unless it is asked for. A
key that is pinned has its one value. Not all are legal: check.py has the rules.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import product
from typing import Any, NamedTuple

from titan.config import Config
from titan.dryrun.estimate import Cut

SCHEDULES = (("1F1B", 0), ("Interleaved1F1B", 2), ("Interleaved1F1B", 4), ("ZBVZeroBubble", 0), ("DualPipeV", 0))
MICRO_BATCHES = (1, 2, 4, 8, 16)
LEAST_TOKENS = 4096
FLOAT8 = "precision.float8"
KEYS = (
    "parallel.dp_replicate",
    "parallel.dp_shard",
    "parallel.tp",
    "parallel.cp",
    "parallel.cp_method",
    "parallel.pp",
    "parallel.pp_schedule",
    "parallel.pp_stages_per_rank",
    "parallel.reshard_after_forward",
    "recompute.mode",
    "training.micro_batch_size",
    FLOAT8,
)
"""That a search may change."""


class Choice(NamedTuple):
    """A value for each of KEYS."""

    dp_replicate: int
    dp_shard: int
    tp: int
    cp: int
    cp_method: str
    pp: int
    pp_schedule: str
    pp_stages_per_rank: int
    reshard_after_forward: str
    mode: str
    micro_batch_size: int
    float8: str

    def on(self, config: Config) -> Config:
        """The config with these values."""
        own: dict[str, Any] = self._asdict()
        mode, micro, float8 = own.pop("mode"), own.pop("micro_batch_size"), own.pop("float8")
        return replace(
            config,
            parallel=replace(config.parallel, **own),
            recompute=replace(config.recompute, mode=mode),
            training=replace(config.training, micro_batch_size=micro),
            precision=replace(config.precision, float8=float8),
        )

    def keys(self) -> dict[str, Any]:
        return dict(zip(KEYS, self, strict=True))

    @property
    def cut(self) -> Cut:
        sharded = self.dp_shard * self.cp > 1 or self.float8 != "tensorwise"
        return Cut(self.tp, self.cp, self.cp_method, self.mode, self.float8, sharded)

    @property
    def family(self) -> tuple[Any, ...]:
        """Plans of one differ in how data and weights are shared, in the micro batch and the cp method alone."""
        return self.tp, self.cp, self.pp, self.pp_schedule, self.pp_stages_per_rank, self.mode, self.float8


def choices(config: Config, world: int, gpus_per_node: int, pins: Mapping[str, Any] | None = None) -> Iterator[Choice]:
    """Every combination, legal or not; what does not multiply up is not among them. pins: values of KEYS."""
    for choice in _choices(config, world, gpus_per_node, pins or {}):
        if all(choice.keys()[key] == value for key, value in (pins or {}).items()):
            yield choice


def _choices(config: Config, world: int, gpus_per_node: int, pins: Mapping[str, Any]) -> Iterator[Choice]:
    """Those, and some others."""
    of = lambda key, values: [pins[key]] if key in pins else values  # noqa: E731
    training, tables = config.training, list[tuple[str, int]](SCHEDULES)
    if "parallel.pp_schedule" in pins:
        name = pins["parallel.pp_schedule"]
        tables = [pair for pair in SCHEDULES if pair[0] == name] or [(name, 0)]
    if "parallel.pp_stages_per_rank" in pins:
        tables = list({(name, pins["parallel.pp_stages_per_rank"]): None for name, _ in tables})
    modes = of("recompute.mode", ("none", "selective", "full"))
    float8s = of(FLOAT8, ("none", "tensorwise", "rowwise"))
    tps = of("parallel.tp", [n for n in divisors(world) if gpus_per_node % n == 0])
    cps = of("parallel.cp", [n for n in divisors(world) if n == 1 or training.seq_len >= n * LEAST_TOKENS])
    pps = [n for n in divisors(world) if n <= config.model.config.n_layers]
    for tp, cp, pp in product(tps, cps, pps):
        if world % (tp * cp * pp):
            continue
        rest = world // (tp * cp * pp)
        methods = of("parallel.cp_method", ("ring", "allgather", "ulysses") if cp > 1 else ("ring",))
        for shard, micro in product(divisors(rest), of("training.micro_batch_size", MICRO_BATCHES)):
            if training.global_batch_size % (rest * micro):
                continue
            free = ("auto", "never") if pp == 1 and shard * cp > 1 else ("auto",)
            keeps = of("parallel.reshard_after_forward", free)
            pipelines = tables if pp > 1 else tables[:1]
            for (name, stages), method, keep, mode, eight in product(pipelines, methods, keeps, modes, float8s):
                yield Choice(rest // shard, shard, tp, cp, method, pp, name, stages, keep, mode, micro, eight)


def divisors(n: int) -> list[int]:
    """In order."""
    return [d for d in range(1, n + 1) if n % d == 0]
