"""A step's messages, of all dimensions."""

from __future__ import annotations

from typing import TYPE_CHECKING

from titan.config import Config
from titan.parallel.mesh import Mesh
from titan.parallel.stages import Stages
from titan.traffic.context import context
from titan.traffic.data import replicas, shards
from titan.traffic.pipeline import pipeline
from titan.traffic.shape import Flow, Shape
from titan.traffic.tensor import tensor

if TYPE_CHECKING:
    from titan.build import Parts


def expected(config: Config, mesh: Mesh, parts: Parts, flags: int) -> list[Flow]:
    """A step's messages of this rank. flags: numbers that ride on the count of a batch's tokens."""
    model = parts.model
    stages = model.stages if isinstance(model, Stages) else {0: model}
    shape = Shape(config, mesh, parts, stages)
    found: list[Flow] = []
    if mesh.axes is not None:
        found.append(shape.flow("count", "all", "all_reduce", "int64", 1, 1 + flags, "tokens of the batch, flags", "1 + flags"))
    for dimension in (shards, replicas, tensor, context, pipeline):
        found += dimension(shape)
    if mesh.axes is not None:
        found.append(shape.flow("norm", "all", "all_reduce", "float32", 1, 2, "the norm's square, the loss", "2"))
    return [flow for flow in found if flow.count]
