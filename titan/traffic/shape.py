"""What should travel in a step, by formula: for every dimension of a plan, how many messages, and how large.

The letters, of one rank:

    M   micro batches in a step          B   sequences in one            s   tokens of a sequence that it has (seq_len / cp)
    d   width of hidden states           L   blocks that it has          P   parameters that it has
    T   tp    n   cp    S   ranks that share parameters                  H, G, h   its query heads, key heads, their width

Nothing is measured here. What a formula needs of the model is the shapes of its parameters, and how many of its modules the
sharding table has under which word. On a CPU our own gathers and reduce-scatters are all-to-alls of as many bytes
(`titan.parallel.collectives`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from titan.config import Config
from titan.parallel.mesh import Mesh
from titan.parallel.schedules import Table
from titan.parallel.schedules import table as schedule
from titan.sharding import matching, styles

if TYPE_CHECKING:
    from titan.build import Parts


@dataclass(frozen=True)
class Flow:
    """Messages of one kind in a step."""

    phase: str
    dimension: str
    op: str
    dtype: str
    count: int
    bytes: int
    """Of all of them together."""
    what: str
    formula: str
    """Count x elements x bytes of one."""


@dataclass(frozen=True)
class Shape:
    """What the formulas share."""

    config: Config
    mesh: Mesh
    parts: Parts
    stages: dict[int, nn.Module]
    """The stages of the model that this rank has; the whole is stage 0."""

    @property
    def micros(self) -> int:
        return self.parts.step.batches.per_step

    @property
    def batch(self) -> int:
        return self.config.training.micro_batch_size

    @property
    def tokens(self) -> int:
        return self.config.training.seq_len // self.mesh.degree("cp")

    @property
    def dtype(self) -> str:
        return self.config.precision.param

    @property
    def reduce(self) -> str:
        return "float32" if self.mesh.degree("pp") > 1 else self.config.precision.reduce

    def number(self, word: str) -> int:
        """How many of this rank's modules the sharding table has under a word. A tied weight's copy is no embedding."""
        table = self.parts.table
        words = styles(table, self.config.parallel.sharding)
        names = [(stage, name) for stage, module in self.stages.items() for name, _ in module.named_modules()]
        return sum(words.get(name) == word for stage, name in names if stage == 0 or name not in table.before)

    def again(self) -> list[str]:
        """This rank's blocks whose forward pass is done again in the backward pass."""
        recompute, table = self.config.recompute, self.parts.table
        blocks = [name for stage in self.stages.values() for name in found(table.block, stage)]
        return [] if recompute.mode == "none" else blocks[:: recompute.every if recompute.mode == "block" else 1]

    @property
    def schedule(self) -> Table:
        """The pipeline's."""
        parallel = self.config.parallel
        return schedule(parallel.pp_schedule, self.mesh.degree("pp"), parallel.pp_stages_per_rank, self.micros)

    def cores(self) -> int:
        """Attention cores of this rank."""
        return sum(len(found(self.parts.table.core, stage)) for stage in self.stages.values())

    def flow(self, phase: str, dimension: str, op: str, dtype: str, count: int, elements: int, what: str, formula: str) -> Flow:
        size = getattr(torch, dtype).itemsize
        figures = f"{formula} = {count:,} x {elements:,} x {size} B"
        return Flow(phase, dimension, op, dtype, count, count * elements * size, what, figures)


def found(pattern: str, stage: nn.Module) -> list[str]:
    """Names of a stage's modules that a glob matches."""
    try:
        return matching(pattern, dict(stage.named_modules()))
    except ValueError:  # a stage may have no block
        return []
