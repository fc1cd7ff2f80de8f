"""Apply a plan to a model, in place: the one file that knows every dimension, and their order.

Order: FSDP last, since it takes the parameters as it finds them. Mixed precision is FSDP's own policy where there are shards
and hooks of ours where there are none. A dimension of size one is skipped: FSDP2 on one rank would cost a small model a fifth
of its speed.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from titan.config import Precision
from titan.parallel.data import GradientSync, Replicated, shard
from titan.parallel.mesh import axes
from titan.precision.mixed import compute_in
from titan.sharding import Sharding, matching


def parallelize(model: nn.Module, table: Sharding, mesh: DeviceMesh | None, precision: Precision) -> GradientSync:
    """Cut a model on the meta device for this rank. mesh: None for one process without a process group.

    Raises ValueError where the table names modules that the model does not have.
    """
    modules = dict(model.named_modules())
    units = [modules[name] for pattern in (*table.before, table.block) for name in matching(pattern, modules)]
    units.append(model)
    param, reduce = getattr(torch, precision.param), getattr(torch, precision.reduce)
    shards, replicas = axes(mesh, "dp_shard"), axes(mesh, "dp_replicate")
    data_mesh = axes(mesh, "dp_replicate", "dp_shard")
    if shards is not None and data_mesh is not None:
        return shard(model, units, data_mesh, param, reduce)
    if param != torch.float32:
        compute_in(units, param)
    return GradientSync() if replicas is None else Replicated(model, replicas, reduce)
