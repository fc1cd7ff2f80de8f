"""A few steps of a config, to be looked at: what training does in a step, part by part, without logs and checkpoints.

`titan trace`, `titan schedule` and `titan draw memory` run it on the workers of a pool, `titan plan` in a world that is not
there. A step has these parts:

    count      the tokens of the batch are counted over all ranks
    batch      the batch becomes micro batches on the device
    weights    before the first pass: a tied weight's copy becomes what the weight is
    forward    all passes, forward and backward
    gradients  after the last pass
    norm       the gradients' norm, and the loss with it
    optimizer  the weights change, gradients are forgotten
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from titan import ranks as between
from titan.batch import Batch, Micro, reader
from titan.build import Parts, build
from titan.config import Config, degrees
from titan.data.splits import open_splits, prepare_sources, prepared_tokenizer
from titan.optim import set_lr
from titan.parallel.mesh import Mesh, make_mesh
from titan.schedule import lr_share

FLAGS = (False,) * 4
"""What rides on the count of a batch's tokens in training: who wants to stop, and how saves stand."""

Part = Callable[[str], AbstractContextManager[object]]
"""A part's name -> what is entered around it."""


def with_data(config: Config, say: Callable[[str], None]) -> Config:
    """The config with its text prepared and packed, once for all ranks."""
    data = prepare_sources(config.data, say)
    open_splits(data, prepared_tokenizer(data), config.training, validate=False)
    return replace(config, data=data)


class Outcome(NamedTuple):
    """What came of a step."""

    own: int
    """Tokens to predict that this rank counts: 0 where another one counts the same."""
    valid: int
    """Those of the global batch."""
    loss: Tensor
    """The mean over them, float32."""
    norm: Tensor
    """The gradient's, before it is clipped, float32."""
    lr: float


class Steps:
    """One step after the other of what was built."""

    def __init__(self, config: Config, ranks: between.Ranks, parts: Parts) -> None:
        self.config, self.ranks, self.parts = config, ranks, parts
        self.number = 0

    def take(self, batch: Batch, part: Part = lambda _: nullcontext()) -> Outcome:
        """A step on a batch, each of its parts inside `part(name)`."""
        self.number += 1
        step, plan, config = self.parts.step, self.parts.step.plan, self.config
        with part("count"):
            own = step.count(batch)
            valid, *_ = between.agree(self.ranks, own, *FLAGS)
        with part("weights"):
            plan.refresh()
        with part("batch"):
            micros = self.split(batch)
        with part("forward"):
            loss: Tensor = step.passes.train(micros, max(1, valid), self.number) * plan.share
        with part("gradients"):
            plan.finish()
        with part("norm"):
            norm, mean = self.parts.norms.clip(config.training.clip_norm, loss)
        with part("optimizer"):
            lr = config.optimizer.lr * lr_share(config.schedule, self.number, config.training.steps)
            set_lr(self.parts.optimizer, lr)
            self.parts.optimizer.step()
            self.parts.optimizer.zero_grad()
        return Outcome(own, valid, mean, norm, lr)


    def split(self, batch: Batch) -> list[Micro]:
        """Its micro batches on the device."""
        return self.parts.step.batches.split(batch)


class Rehearsal(Steps):
    """A rank's job: `mesh`, `parts`, data, and one step after the other."""

    def __init__(self, rank: int, config: Config, seconds: float) -> None:
        """In a gloo process group. config: from `with_data`. seconds: how long a collective waits for the other ranks."""
        ranks = between.Ranks(rank, dist.get_world_size(), torch.device("cpu"))
        self.mesh: Mesh = make_mesh("cpu", degrees(config.parallel, ranks.world), seconds, config.offload.states)
        super().__init__(config, ranks, build(config, ranks.device, self.mesh))
        splits = open_splits(config.data, prepared_tokenizer(config.data), config.training, validate=False)
        self.batches = reader(config, self.mesh)(splits.train, start_sample=0, workers=0)

    def step(self, part: Part = lambda _: nullcontext()) -> Outcome:
        """One step on the next batch."""
        return self.take(next(self.batches), part)

    def close(self) -> None:
        self.batches.close()
