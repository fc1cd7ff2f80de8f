"""What the page tells besides the plan: of each pipeline rank the parts of its parameters, and its messages flow by flow.

As in the plan, one rank stands for those alike: `titan.dryrun.plan.typical_ranks`.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import torch

from titan import zoo
from titan.config import Config
from titan.dryrun.plan import JobPlan
from titan.dryrun.world import build_without_memory, pretended, shapes_alone
from titan.explaining.letters import bytes_of
from titan.explaining.numbers import Number
from titan.layout import block, local
from titan.parallel.stages import Stages
from titan.rehearsal import FLAGS
from titan.sharding import Sharding
from titan.traffic.shape import Flow, Shape
from titan.traffic.step import expected


@dataclass(frozen=True)
class Part:
    """A rank's part of a parameter."""

    whole: tuple[int, ...]
    cut: tuple[int, ...]
    """What tensor parallelism leaves a rank."""
    own: tuple[int, ...]
    """What FSDP leaves of that."""
    itemsize: int

    @property
    def elements(self) -> int:
        return prod(self.own)


@dataclass(frozen=True)
class RankFacts:
    """Of the rank that stands for a pipeline rank."""

    rank: int
    parts: dict[str, Part]
    """By the parameter's name."""
    flows: list[tuple[Flow, Number]]
    """With the bytes of their messages."""
    shards: int
    """Among how many ranks FSDP shares its parameters; 0 without FSDP."""
    shards_named: str
    """The dimension over which it does."""


@dataclass(frozen=True)
class Facts:
    """Of a job."""

    table: Sharding
    whole: dict[str, tuple[int, ...]]
    """Parameters of the whole model."""
    lookups: frozenset[str]
    """Those that are looked up and not multiplied with."""
    ranks: list[RankFacts]


def facts(config: Config, job: JobPlan) -> Facts:
    """Look at each pipeline rank."""
    with torch.device("meta"):
        model = zoo.make(config.model.name, config.model.config)
    named = {name: tuple(p.shape) for name, p in model.named_parameters()}
    tables = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, torch.nn.Embedding)}
    table = zoo.sharding(config.model.name, config.model.config)
    lookups = frozenset(tables - {f"{table.tied}.weight"})
    return Facts(table, named, lookups, [look(config, rank.rank, job.plan.world) for rank in job.ranks])


def look(config: Config, rank: int, world: int) -> RankFacts:
    """At one."""
    with pretended(config, rank, world) as mesh:
        parts = build_without_memory(config, mesh, shapes_alone())
        model = parts.model
        shape = Shape(config, mesh, parts, model.stages if isinstance(model, Stages) else {0: model})
        held = {}
        for name, parameter in model.named_parameters():
            own = block(parameter, parts.cuts.get(name))
            held[name] = Part(tuple(own.shape), tuple(parameter.shape), tuple(local(parameter).shape), parameter.itemsize)
        flows = [(flow, bytes_of(flow, shape)) for flow in expected(config, mesh, parts, len(FLAGS))]
        name = (mesh.fsdp.mesh_dim_names or ("",))[-1] if mesh.fsdp is not None else ""
        return RankFacts(rank, held, flows, mesh.fsdp[name].size() if mesh.fsdp is not None else 0, name)
