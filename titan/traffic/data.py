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
    size = getattr(torch, shape.dtype).itemsize
    gathered: dict[tuple[str, str], list[int]] = {}
    elements: list[int] = []
    for number, stage in shape.stages.items():
        for name, (plain, narrow) in _units(stage, sharing).items():
            elements.append(plain + narrow)
            first, again = _gathers(shape, number, reshard and name != "")
            for phase, times in (("forward", first), ("backward", again)):
                counted = gathered.setdefault((phase, "uint8" if narrow else shape.dtype), [0, 0])
                counted[0], counted[1] = counted[0] + times, counted[1] + times * (plain * size + narrow)
    pipelined = mesh.degree("pp") > 1
    sums, phase = (1, "gradients") if pipelined else (shape.micros, "backward")
    padded, gathers = sums * sum(elements), sums * len(elements)
    rows = "M x P, rows padded to S" if not pipelined else "P, rows padded to S"

    def of_units(phase: str, op: str, dtype: str, count: int, number: int, what: str, formula: str) -> Flow:
        itemsize = getattr(torch, dtype).itemsize
        said = f"{formula} = {number:,} x {itemsize} B" if dtype != "uint8" else f"{formula}, Float8 of 1 B, others of {size} B"
        return Flow(phase, dimension, op, dtype, count, number * itemsize, what, said)

    found: list[Flow] = []
    what = {"forward": "weights of a unit before it runs", "backward": "weights of a unit, once more"}
    for (passing, dtype), (count, bytes_) in gathered.items():
        number = bytes_ // getattr(torch, dtype).itemsize
        found.append(of_units(passing, "all_gather", dtype, count, number, what[passing], rows))
    found.append(of_units(phase, "reduce_scatter", shape.reduce, gathers, padded, "gradients of a unit", rows))
    if (float8 := shape.parts.step.plan.float8) is not None:
        largest = "each Float8 weight's largest number"
        found.append(of_units("weights", "all_reduce", "float32", 1, len(float8.shards), largest, "Float8 weights"))
    if len(names) == 2:
        times = 1 if shape.reduce == "float32" else sums
        count, number = times * len(elements), times * sum(elements) // sharing
        what_over = "gradients of a shard, over replicas"
        over = of_units(phase, "all_reduce", shape.reduce, count, number, what_over, "P / S, padded")
        found.append(replace(over, dimension=names[0]))
    return found


def _units(stage: nn.Module, sharing: int) -> dict[str, tuple[int, int]]:
    """Name of each FSDP module with parameters of its own -> elements that it gathers, and besides those in Float8."""
    modules = sorted((name for name, module in stage.named_modules() if isinstance(module, FSDPModule)), key=len, reverse=True)
    found: dict[str, tuple[int, int]] = {}
    for name, parameter in stage.named_parameters():
        assert isinstance(parameter, DTensor)
        unit = next(module for module in modules if name.startswith(f"{module}.") or not module)
        rows = -(-parameter.shape[0] // sharing) * sharing
        own, (plain, narrow) = rows * math.prod(parameter.shape[1:]), found.get(unit, (0, 0))
        in_float8 = hasattr(parameter._local_tensor, "fsdp_pre_all_gather")
        found[unit] = (plain, narrow + own) if in_float8 else (plain + own, narrow)
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
