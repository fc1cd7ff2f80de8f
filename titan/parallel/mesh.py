"""The device mesh: every rank's coordinates, one axis per dimension of the plan.

A mesh lays the ranks 0 .. world-1 out as an array, the last axis fastest. Ranks that talk most stand on the last axis, so that
they share a node: FSDP's shards inside, the replicas, which meet once a step, outside. An axis of size one is kept, so that
every name can always be asked for; who applies a dimension skips it then.
"""

from __future__ import annotations

from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from titan.config import Degrees


def make_mesh(device_type: str, degrees: Degrees) -> DeviceMesh:
    """The mesh of a plan over all ranks of the default process group, which must be as many as the plan's product."""
    names = ("dp_replicate", "dp_shard")
    return init_device_mesh(device_type, tuple(getattr(degrees, name) for name in names), mesh_dim_names=names)


def data_rank(mesh: DeviceMesh | None) -> int:
    """This rank's position among the ranks that see different samples."""
    if mesh is None:
        return 0
    return mesh.get_local_rank("dp_replicate") * mesh["dp_shard"].size() + mesh.get_local_rank("dp_shard")
