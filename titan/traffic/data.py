"""Weights gathered, gradients summed: FSDP2, HSDP, replicas (`titan.parallel.data`)."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from titan.parallel.data import BUCKET_BYTES
from titan.traffic.shape import Flow, Shape


def shards(shape: Shape) -> list[Flow]:
    """FSDP2 (`titan.parallel.data`): of each unit the weights, padded so that all ranks have as many rows."""
    mesh, config = shape.mesh, shape.config
    if mesh.fsdp is None:
        return []
    names = mesh.fsdp.mesh_dim_names or ()
    sharing, dimension = mesh.fsdp[names[-1]].size(), names[-1]
    asked = config.parallel.reshard_after_forward
    reshard = mesh.degree("pp") == 1 if asked == "auto" else asked != "never"
    gathers, padded, forward, backward = 0, 0, [0, 0], [0, 0]
    for number, stage in shape.stages.items():
        for name, size in _units(stage, sharing).items():
            frees = reshard and name != ""
            first, again = _gathers(shape, number, frees)
            gathers, padded = gathers + 1, padded + size
            forward = [forward[0] + first, forward[1] + first * size]
            backward = [backward[0] + again, backward[1] + again * size]
    pipelined = mesh.degree("pp") > 1
    sums, phase = (1, "gradients") if pipelined else (shape.micros, "backward")

    def of_units(phase: str, op: str, dtype: str, counted: list[int], what: str, formula: str) -> Flow:
        size = getattr(torch, dtype).itemsize
        return Flow(phase, dimension, op, dtype, counted[0], counted[1] * size, what, f"{formula} = {counted[1]:,} x {size} B")

    rows = "M x P, rows padded to S" if not pipelined else "P, rows padded to S"
    reduced = [sums * gathers, sums * padded]
    found = [
        of_units("forward", "all_gather", shape.dtype, forward, "weights of a unit before it runs", rows),
        of_units("backward", "all_gather", shape.dtype, backward, "weights of a unit, once more", rows),
        of_units(phase, "reduce_scatter", shape.reduce, reduced, "gradients of a unit", rows),
    ]
    if len(names) == 2:
        times = 1 if shape.reduce == "float32" else sums
        counted = [times * gathers, times * padded // sharing]
        over = of_units(phase, "all_reduce", shape.reduce, counted, "gradients of a shard, over replicas", "P / S, padded")
        found.append(replace(over, dimension=names[0]))
    return found


def _units(stage: nn.Module, sharing: int) -> dict[str, int]:
    """Name of each FSDP module with parameters of its own -> elements of what it gathers."""
    modules = sorted((name for name, module in stage.named_modules() if isinstance(module, FSDPModule)), key=len, reverse=True)
    found: dict[str, int] = {}
    for name, parameter in stage.named_parameters():
        assert isinstance(parameter, DTensor)
        unit = next(module for module in modules if name.startswith(f"{module}.") or not module)
        rows = -(-parameter.shape[0] // sharing) * sharing
        found[unit] = found.get(unit, 0) + rows * math.prod(parameter.shape[1:])
    return found


def _gathers(shape: Shape, stage: int, frees: bool) -> tuple[int, int]:
    """How often a unit of a stage is gathered in a step's forward and backward passes."""
    if shape.mesh.degree("pp") == 1:
        return shape.micros, shape.micros * frees
    whole, forward, backward = False, 0, 0
    for action in shape.schedule.orders[shape.mesh.coordinate("pp")]:
        if action.stage != stage or action.kind == "W":
            continue
        if action.kind == "F":
            forward += not whole
            whole = not frees
        else:
            backward += not whole
            whole = True  # until the step's end, where the gradients are summed
    return forward, backward


def replicas(shape: Shape) -> list[Flow]:
    """Without shards: all gradients in buckets."""
    if shape.mesh.fsdp is not None or shape.mesh.degree("dp_replicate") == 1:
        return []
    size, room, buckets, total = getattr(torch, shape.reduce).itemsize, 0, 0, 0
    for parameter in reversed([p for stage in shape.stages.values() for p in stage.parameters()]):
        own = parameter.numel() * size
        if own > room:
            buckets, room = buckets + 1, BUCKET_BYTES
        room, total = room - own, total + own
    phase = "gradients" if shape.mesh.degree("pp") > 1 else "backward"
    formula = f"P = {total // size:,} x {size} B"
    return [Flow(phase, "dp_replicate", "all_reduce", shape.reduce, buckets, total, "gradients in buckets", formula)]
