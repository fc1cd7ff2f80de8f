"""A few steps of a config, to be looked at: what training does in a step, part by part, without logs and checkpoints.

`titan trace`, `titan schedule` and `titan draw memory` run it on the workers of a pool. A step has these parts:

    count      the tokens of the batch are counted over all ranks
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
from titan.batch import reader
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
    loss: float
    """The mean over them."""
    norm: float
    """The gradient's, before it is clipped."""
    lr: float


class Rehearsal:
    """A rank's job: `mesh`, `parts`, and one step after the other."""

    def __init__(self, rank: int, config: Config, seconds: float) -> None:
        """In a gloo process group. config: from `with_data`. seconds: how long a collective waits for the other ranks."""
        self.config = config
        self.ranks = between.Ranks(rank, dist.get_world_size(), torch.device("cpu"))
        self.mesh: Mesh = make_mesh("cpu", degrees(config.parallel, self.ranks.world), seconds, config.offload.states)
        self.parts: Parts = build(config, self.ranks.device, self.mesh)
        splits = open_splits(config.data, prepared_tokenizer(config.data), config.training, validate=False)
        self.batches = reader(config, self.mesh)(splits.train, start_sample=0, workers=0)
        self.number = 0

    def step(self, part: Part = lambda _: nullcontext()) -> Outcome:
        """One step, each of its parts inside `part(name)`."""
        self.number += 1
        step, plan, config = self.parts.step, self.parts.step.plan, self.config
        batch = next(self.batches)
        with part("count"):
            own = step.count(batch)
            valid, *_ = between.agree(self.ranks, own, *FLAGS)
        with part("weights"):
            plan.refresh()
        with part("forward"):
            loss: Tensor = step.passes.train(step.batches.split(batch), max(1, valid), self.number) * plan.share
        with part("gradients"):
            plan.finish()
        with part("norm"):
            norm, mean = self.parts.norms.clip(config.training.clip_norm, loss)
        with part("optimizer"):
            lr = config.optimizer.lr * lr_share(config.schedule, self.number, config.training.steps)
            set_lr(self.parts.optimizer, lr)
            self.parts.optimizer.step()
            self.parts.optimizer.zero_grad()
        return Outcome(own, valid, mean.item(), norm.item(), lr)

    def close(self) -> None:
        self.batches.close()
