"""The device mesh: every rank's coordinates, one axis per dimension of the plan.

A mesh lays the ranks 0 .. world-1 out as an array, the last axis fastest. Ranks that talk most stand on the last axis, so that
they share a node: tensor parallelism (in every layer), then context, FSDP's shards, the replicas (once a step), and outside
all the pipeline, whose messages are few and small. An axis of size one is left out: it would make a process group for every
rank, and nothing would travel there.

FSDP shards over dp_shard and cp together, since ranks that share a sequence need the same weights too: one flattened axis, `fsdp`.
"""

from __future__ import annotations

from datetime import timedelta

from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.distributed_c10d import _set_pg_timeout

from titan.config import Degrees

AXES = ("pp", "dp_replicate", "dp_shard", "cp", "tp")
FSDP = ("dp_shard", "cp")


def make_mesh(device_type: str, degrees: Degrees, timeout_seconds: float) -> DeviceMesh | None:
    """The mesh of a plan over all ranks of the default process group; None where there is one rank alone."""
    axes = {name: getattr(degrees, name) for name in AXES if getattr(degrees, name) > 1}
    if not axes:
        return None
    mesh = init_device_mesh(device_type, tuple(axes.values()), mesh_dim_names=tuple(axes))
    groups = mesh.get_all_groups()
    if set(FSDP) <= set(axes):
        groups.append(mesh[FSDP]._flatten("fsdp").get_group())
    for group in groups:  # a mesh makes its groups with PyTorch's own time-out
        _set_pg_timeout(timedelta(seconds=timeout_seconds), group)
    return mesh


def axis(mesh: DeviceMesh | None, name: str) -> DeviceMesh | None:
    """One axis of a mesh, or None where it has only one rank on it."""
    return mesh[name] if mesh is not None and name in (mesh.mesh_dim_names or ()) else None


def coordinate(mesh: DeviceMesh | None, name: str) -> int:
    """This rank's place on an axis; 0 where the axis is left out."""
    found = axis(mesh, name)
    return 0 if found is None else found.get_local_rank()


def fsdp_mesh(mesh: DeviceMesh | None) -> DeviceMesh | None:
    """What FSDP2 takes: [shards], or [replicas, shards] for HSDP; None where no rank shares its parameters."""
    names = [name for name in FSDP if axis(mesh, name) is not None]
    if mesh is None or not names:
        return None
    shards = "fsdp" if len(names) == 2 else names[0]
    return mesh[("dp_replicate", shards)] if axis(mesh, "dp_replicate") is not None else mesh[shards]


def size(mesh: DeviceMesh | None, name: str) -> int:
    """Ranks on an axis."""
    found = axis(mesh, name)
    return 1 if found is None else found.size()


def data_rank(mesh: DeviceMesh | None) -> int:
    """This rank's position among the ranks that see different samples."""
    return coordinate(mesh, "dp_replicate") * size(mesh, "dp_shard") + coordinate(mesh, "dp_shard")


def data_degree(mesh: DeviceMesh | None) -> int:
    """How many ranks see different samples."""
    return size(mesh, "dp_replicate") * size(mesh, "dp_shard")
