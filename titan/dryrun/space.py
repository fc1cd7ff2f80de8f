"""The plans that a search looks at: every way to share a config's work among so many GPUs.

    degrees      all that multiply up to the world; tp within a node; cp while a rank keeps 4,096 tokens of a sequence or more
    pipeline     1F1B, interleaved with 2 or 4 stages a rank, the two schedules in a V
    recompute    none, selective, full
    micro batch  1, 2, 4, .. 16 sequences
    cp method    ring, allgather, ulysses
    FSDP         weights freed after a block's forward pass, or kept

None of them changes what is trained. A key that is pinned has its one value. Not all are legal: check.py has the rules.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from typing import Any, NamedTuple

from titan.config import Config
from titan.dryrun.estimate import Cut

SCHEDULES = (("1F1B", 0), ("Interleaved1F1B", 2), ("Interleaved1F1B", 4), ("ZBVZeroBubble", 0), ("DualPipeV", 0))
MICRO_BATCHES = (1, 2, 4, 8, 16)
LEAST_TOKENS = 4096
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

    def on(self, config: Config) -> Config:
        """The config with these values."""
        own: dict[str, Any] = self._asdict()
        mode, micro = own.pop("mode"), own.pop("micro_batch_size")
        return replace(
            config,
            parallel=replace(config.parallel, **own),
            recompute=replace(config.recompute, mode=mode),
            training=replace(config.training, micro_batch_size=micro),
        )

    def keys(self) -> dict[str, Any]:
        return dict(zip(KEYS, self, strict=True))

    @property
    def cut(self) -> Cut:
        return Cut(self.tp, self.cp, self.cp_method, self.mode)

    @property
    def family(self) -> tuple[Any, ...]:
        """Plans that differ in how data and weights are shared alone are of one."""
        return self.tp, self.cp, self.pp, self.pp_schedule, self.pp_stages_per_rank, self.mode


def choices(config: Config, world: int, gpus_per_node: int) -> Iterator[Choice]:
    """Every combination, legal or not. Raises nothing: what does not multiply up is not among them."""
    training = config.training
    tps = [n for n in divisors(world) if gpus_per_node % n == 0]
    cps = [n for n in divisors(world) if n == 1 or training.seq_len >= n * LEAST_TOKENS]
    pps = [n for n in divisors(world) if n <= config.model.config.n_layers]
    for tp, cp, pp in product(tps, cps, pps):
        if world % (tp * cp * pp):
            continue
        rest = world // (tp * cp * pp)
        methods = ("ring", "allgather", "ulysses") if cp > 1 else ("ring",)
        for shard, micro in product(divisors(rest), MICRO_BATCHES):
            if training.global_batch_size % (rest * micro):
                continue
            keeps = ("auto", "never") if pp == 1 and shard * cp > 1 else ("auto",)
            schedules = SCHEDULES if pp > 1 else (("1F1B", 0),)
            for (name, stages), method, keep, mode in product(schedules, methods, keeps, ("none", "selective", "full")):
                yield Choice(rest // shard, shard, tp, cp, method, pp, name, stages, keep, mode, micro)


def divisors(n: int) -> list[int]:
    """In order."""
    return [d for d in range(1, n + 1) if n % d == 0]
