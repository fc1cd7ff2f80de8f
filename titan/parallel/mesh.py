"""The device mesh: every rank's coordinates, one axis per dimension of the plan.

A mesh lays the ranks 0 .. world-1 out as an array, the last axis fastest. Ranks that talk most stand on the last axis, so that
they share a node: tensor parallelism (in every layer), then context, FSDP's shards, the replicas (once a step), and outside
all the pipeline, whose messages are few and small. An axis of size one is left out: it would make a process group for every
rank, and nothing would travel there.

FSDP shards over dp_shard and cp together, since ranks that share a sequence need the same weights too. Where both are there,
that is a second view of the same ranks, with one axis in the place of the two.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.distributed_c10d import _set_pg_timeout

from titan.config import Degrees

AXES = ("pp", "dp_replicate", "dp_shard", "cp", "tp")


@dataclass(frozen=True)
class Mesh:
    """This rank among the others. Without arguments: one process, alone."""

    axes: DeviceMesh | None = None
    fsdp: DeviceMesh | None = None
    """What FSDP2 takes: [shards], or [replicas, shards]; None without FSDP."""

    def degree(self, axis: str) -> int:
        """Ranks on an axis."""
        return 1 if self.axes is None or axis not in self._names else self.axes[axis].size()

    def coordinate(self, axis: str) -> int:
        """This rank's place on an axis."""
        return 0 if self.axes is None or axis not in self._names else self.axes[axis].get_local_rank()

    def group(self, axis: str) -> dist.ProcessGroup:
        """The ranks that differ from this one on this axis alone. KeyError where there are none."""
        assert self.axes is not None
        return self.axes[axis].get_group()

    @property
    def data_degree(self) -> int:
        """How many ranks see different samples."""
        return self.degree("dp_replicate") * self.degree("dp_shard")

    @property
    def data_rank(self) -> int:
        """This rank's position among those."""
        return self.coordinate("dp_replicate") * self.degree("dp_shard") + self.coordinate("dp_shard")

    @property
    def _names(self) -> tuple[str, ...]:
        return () if self.axes is None else self.axes.mesh_dim_names or ()


def make_mesh(device_type: str, degrees: Degrees, timeout_seconds: float, always_fsdp: bool = False) -> Mesh:
    """The mesh of a plan over all ranks of the default process group.

    always_fsdp: FSDP even where no rank shares its parameters, for what else it does: it then has a mesh of one shard.
    """
    sizes = {name: getattr(degrees, name) for name in AXES}
    axes = _view(device_type, sizes, timeout_seconds)
    if degrees.dp_shard * degrees.cp == 1:
        if not always_fsdp:
            return Mesh(axes)
        alone = _view(device_type, sizes, timeout_seconds, keep="dp_shard")
        assert alone is not None
        return Mesh(axes, alone["dp_replicate", "dp_shard"] if degrees.dp_replicate > 1 else alone["dp_shard"])
    assert axes is not None
    shards, view = "dp_shard" if degrees.dp_shard > 1 else "cp", axes
    if degrees.dp_shard > 1 and degrees.cp > 1:
        shared = {"pp": degrees.pp, "dp_replicate": degrees.dp_replicate, "dp_shard_cp": degrees.dp_shard * degrees.cp}
        both = _view(device_type, {**shared, "tp": degrees.tp}, timeout_seconds)
        assert both is not None
        shards, view = "dp_shard_cp", both
    return Mesh(axes, view["dp_replicate", shards] if degrees.dp_replicate > 1 else view[shards])


def _view(device_type: str, sizes: dict[str, int], timeout_seconds: float, keep: str = "") -> DeviceMesh | None:
    """All ranks as an array of these sizes, the axes of one rank left out, but for the one to keep."""
    sizes = {name: size for name, size in sizes.items() if size > 1 or name == keep}
    if not sizes:
        return None
    mesh = init_device_mesh(device_type, tuple(sizes.values()), mesh_dim_names=tuple(sizes))
    for group in mesh.get_all_groups():  # a mesh makes its groups with PyTorch's own time-out
        _set_pg_timeout(timedelta(seconds=timeout_seconds), group)
    return mesh
