"""Mistakes that are easily made in distributed training, to be made on purpose: `titan verify --mistake NAME`.

None of them stops a run. The loss goes down in all of them, a little slower or to another place, and a curve alone tells
nobody. Each is a few lines that stand in a worker in the place of the right ones; a plan with one has to fail `titan verify`,
so they are the proof of its tests, too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor

import titan.build
from titan import ranks
from titan.batch import Batches, Micro
from titan.config import Config, degrees
from titan.dropout import Noise
from titan.parallel.data import Bucket, Replicated
from titan.parallel.mesh import Mesh
from titan.parallel.pipeline import Pipeline
from titan.parallel.tensor import PartialGradients


def weights_by_rank() -> Any:
    """Each rank draws its initial weights from a seed of its own."""
    right = titan.build.init_weights

    def wrong(model: Any, rule: Any, seed: int, *rest: Any) -> None:
        right(model, rule, seed + dist.get_rank(), *rest)

    return patch.object(titan.build, "init_weights", wrong)


def same_samples() -> Any:
    """All ranks read the same samples, as with a sampler that was not told its rank."""
    return patch.object(Mesh, "data_rank", 0)


def mean_of_means() -> Any:
    """Each rank divides its loss by its own tokens, and the ranks' gradients are averaged."""

    def wrong(who: ranks.Ranks, count: int, *flags: bool) -> tuple[int, ...]:
        return count * who.world, *map(int, flags)

    return patch.object(ranks, "agree", wrong)


def no_sum() -> Any:
    """Replicas do not add up their gradients."""

    def wrong(self: Replicated, bucket: Bucket) -> None:
        found = [p.grad.flatten() * dist.get_world_size(self.group) for p in bucket.parameters if p.grad is not None]
        bucket.flat, bucket.work = torch.cat(found), []

    return patch.object(Replicated, "_send", wrong)


def partial_norms() -> Any:
    """A tensor-parallel rank keeps the gradient that its part of the sequence gives for a whole weight."""
    return patch.object(PartialGradients, "finish", lambda self: None)


def divided_twice() -> Any:
    """The pipeline divides gradients by the number of micro batches, and the loss was divided already."""
    right: Callable[..., Tensor] = Pipeline.train

    def wrong(self: Pipeline, micros: list[Micro], valid_tokens: int, step: int) -> Tensor:
        return right(self, micros, valid_tokens * len(micros), step)

    return patch.object(Pipeline, "train", wrong)


def positions_from_zero() -> Any:
    """Under context parallelism each rank numbers its tokens from 0 on."""
    right: Callable[..., Micro] = Batches._micro

    def wrong(self: Batches, *given: Any) -> Micro:
        micro = right(self, *given)
        return replace(micro, positions=torch.arange(micro.tokens.shape[1], device=micro.tokens.device))

    return patch.object(Batches, "_micro", wrong)


def new_masks() -> Any:
    """What is computed again in the backward pass draws new dropout masks."""
    right = Noise.using

    def wrong(self: Noise, keys: Tensor | None) -> Any:
        again = torch._C._current_graph_task_id() != -1  # type: ignore[attr-defined]
        return right(self, keys + 1 if again and keys is not None else keys)

    return patch.object(Noise, "using", wrong)


MISTAKES: dict[str, Callable[[], Any]] = {
    function.__name__.replace("_", "-"): function
    for function in (
        weights_by_rank,
        same_samples,
        mean_of_means,
        no_sum,
        partial_norms,
        divided_twice,
        positions_from_zero,
        new_masks,
    )
}


def has_place(name: str, config: Config) -> str:
    """Where a plan has no place for a mistake: what it would need. "": it has one."""
    plan = degrees(config.parallel, 1)
    shards = plan.dp_shard * plan.cp
    needed = {
        "weights-by-rank": (plan.world > 1, "several ranks"),
        "same-samples": (plan.data_parallel > 1, "dp_shard or dp_replicate"),
        "mean-of-means": (plan.data_parallel == plan.world > 1, "dp_shard or dp_replicate, and nothing else"),
        "no-sum": (plan.dp_replicate > 1 and shards == 1 and not config.offload.states, "dp_replicate without shards"),
        "partial-norms": (plan.tp > 1, "tp"),
        "divided-twice": (plan.pp > 1, "pp"),
        "positions-from-zero": (plan.cp > 1, "cp"),
        "new-masks": (
            config.recompute.mode != "none" and getattr(config.model.config, "dropout", 0) > 0,
            "recompute, and a model with dropout (--model.name=gpt2 --model.dropout=0.1)",
        ),
    }
    fits, what = needed[name]
    return "" if fits else what


@contextmanager
def made(name: str) -> Iterator[None]:
    """The mistake of this name, for a while; "": none."""
    if not name:
        yield
        return
    with MISTAKES[name]():
        yield
