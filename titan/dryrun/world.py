"""A world that is not there: this process as any rank of any number of ranks, with tensors that have no memory.

PyTorch has a process group whose collectives do nothing, and a mode in which tensors are shapes alone. In both together the
code of training builds its model, cuts it, and takes steps, as any rank of a cluster would; nothing is computed and nothing
waits. What it would allocate and send is seen as it is on a real rank, operation by operation.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.tensor.debug import _clear_sharding_prop_cache
from torch.testing._internal.distributed.fake_pg import FakeStore

from titan.build import Parts, assemble, cut
from titan.config import Config, degrees
from titan.parallel.mesh import Mesh, make_mesh


@contextmanager
def pretended(config: Config, rank: int, world: int) -> Iterator[Mesh]:
    """Be one rank of so many for a while, with its mesh."""
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Set timeout is now only supported")
            yield make_mesh("cpu", degrees(config.parallel, world), 60, config.offload.states)
    finally:
        dist.destroy_process_group()
        _clear_sharding_prop_cache()  # it would answer with another rank's mesh: to it they are equal


def shapes_alone() -> FakeTensorMode:
    """Inside, tensors have a shape, a type and a device, and no memory. Real ones may be read."""
    return FakeTensorMode(allow_non_fake_inputs=True)


def build_without_memory(config: Config, mesh: Mesh, nothing: FakeTensorMode) -> Parts:
    """What `titan.build.build` makes on a rank, without memory. nothing: of `shapes_alone`, to be entered for what runs it.

    Raises ValueError where it cannot be built, with the sentence that training would give.
    """
    device = torch.device("cpu")
    made = cut(config, device, mesh)
    with nothing:
        return assemble(config, device, mesh, *made, initialise=False)
