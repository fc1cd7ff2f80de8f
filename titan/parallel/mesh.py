"""The device mesh: every rank's coordinates, one axis per dimension of the plan.

A mesh lays the ranks 0 .. world-1 out as an array, the last axis fastest. Ranks that talk most stand on the last axis, so that
they share a node: FSDP's shards inside, the replicas, which meet once a step, outside. An axis of size one is left out: it
would make a process group for every rank, and nothing would travel there.
"""

from __future__ import annotations

from datetime import timedelta

from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.distributed_c10d import _set_pg_timeout

from titan.config import Degrees

AXES = ("dp_replicate", "dp_shard")


def make_mesh(device_type: str, degrees: Degrees, timeout_seconds: float) -> DeviceMesh | None:
    """The mesh of a plan over all ranks of the default process group; None where there is one rank alone."""
    axes = {name: getattr(degrees, name) for name in AXES if getattr(degrees, name) > 1}
    if not axes:
        return None
    mesh = init_device_mesh(device_type, tuple(axes.values()), mesh_dim_names=tuple(axes))
    for group in mesh.get_all_groups():  # a mesh makes its groups with PyTorch's own time-out
        _set_pg_timeout(timedelta(seconds=timeout_seconds), group)
    return mesh


def axes(mesh: DeviceMesh | None, *names: str) -> DeviceMesh | None:
    """The part of a mesh with these axes, as far as it has them; None where it has none."""
    found = tuple(name for name in names if mesh is not None and name in (mesh.mesh_dim_names or ()))
    return mesh[found] if mesh is not None and found else None


def data_rank(mesh: DeviceMesh | None) -> int:
    """This rank's position among the ranks that see different samples."""
    rank = 0
    for name in AXES:
        axis = axes(mesh, name)
        if axis is not None:
            rank = rank * axis.size() + axis.get_local_rank()
    return rank
