"""What the ranks say to each other in a step: every collective and message, as PyTorch sends it.

A dispatch mode sees each operation that PyTorch carries out, those of torch.distributed among them, whoever asked for it: our
own code, FSDP, the pipeline. A record has the dimension of the plan (told by the process group), the operation, the type and
bytes of its message, and when in the step it was:

    count      the tokens of the batch are counted over all ranks
    weights    before the first pass: a tied weight's copy becomes what the weight is
    forward    in forward passes          backward   in backward passes, and what recompute does again there
    hand-over  between a pipeline's stages
    gradients  after the last pass        norm       the gradients' norm, and the loss with it

Bytes are of a message as the operation sees it: of a tensor that is added up, sent or received; of all that an all-gather has
in the end, or a reduce-scatter or an all-to-all in the beginning. Of those a rank sends (n - 1)/n, of an all-reduce twice as
much.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from titan.config import Config
from titan.parallel.mesh import Mesh
from titan.rehearsal import FLAGS, Rehearsal
from titan.traffic.shape import Flow
from titan.traffic.step import expected

MESSAGES = {
    "allreduce_": ("all_reduce", 0),
    "_allgather_base_": ("all_gather", 0),
    "_reduce_scatter_base_": ("reduce_scatter", 1),
    "alltoall_base_": ("all_to_all", 1),
    "send": ("send", 0),
    "recv_": ("recv", 0),
    "broadcast_": ("broadcast", 0),
}
"""c10d's operation -> its name here, and which argument is the message."""


@dataclass(frozen=True, order=True)
class Kind:
    """What records have in common that are counted together."""

    phase: str
    dimension: str
    op: str
    dtype: str


Traffic = dict[Kind, tuple[int, int]]
"""Kind -> how many in a step, and their bytes together."""


class Recorder(TorchDispatchMode):
    """Counts messages while it is entered."""

    def __init__(self, mesh: Mesh) -> None:
        super().__init__()
        self.dimensions = {dist.group.WORLD.group_name: "all"} if dist.group.WORLD is not None else {}
        for axes in (mesh.axes, mesh.fsdp):
            for name in axes.mesh_dim_names or () if axes is not None else ():
                assert axes is not None
                self.dimensions[axes[name].get_group().group_name] = name
        # FSDP makes a group of its own where it keeps weights within some of the ranks that share them.
        self.other = "" if mesh.fsdp is None else (mesh.fsdp.mesh_dim_names or ("",))[-1]
        self.phase = ""
        self.counts: Counter[Kind] = Counter()
        self.bytes: Counter[Kind] = Counter()

    @contextmanager
    def at(self, phase: str) -> Iterator[None]:
        """What follows is in this part of the step."""
        self.phase = phase
        with self:
            yield

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            self._note(func.overloadpacket.__name__, args)
        return func(*args, **(kwargs or {}))

    def read(self, name: str, args: Any) -> tuple[str, str, int, dist.ProcessGroup]:
        """Of one of c10d's operations: its name here, the dimension that it is of, its message's bytes, and the group."""
        if name not in MESSAGES:
            raise RuntimeError(f"c10d.{name} travels, and nothing here knows its bytes")
        op, place = MESSAGES[name]
        group = next(dist.ProcessGroup.unbox(arg) for arg in args if isinstance(arg, torch.ScriptObject))
        dimension = "all" if self.phase in ("count", "norm") else self.dimensions.get(group.group_name, self.other)
        return op, dimension, sum(tensor.numel() * tensor.element_size() for tensor in _messages(args, place)), group

    def _note(self, name: str, args: Any) -> None:
        op, dimension, size, _ = self.read(name, args)
        phase = self.phase
        if phase == "forward":
            inside = torch._C._current_graph_task_id() != -1  # type: ignore[attr-defined]
            phase = "backward" if inside else "hand-over" if dimension == "pp" else phase
        kind = Kind(phase, dimension, op, str(_messages(args, MESSAGES[name][1])[0].dtype).removeprefix("torch."))
        self.counts[kind] += 1
        self.bytes[kind] += size

    def traffic(self, steps: int) -> Traffic:
        """A step's, of so many equal ones. ValueError where they were not equal."""
        if odd := [kind for kind in self.counts if self.counts[kind] % steps or self.bytes[kind] % steps]:
            raise ValueError(f"the steps differ in {odd[0]}")
        return {kind: (self.counts[kind] // steps, self.bytes[kind] // steps) for kind in sorted(self.counts)}


def _messages(args: Any, place: int) -> list[torch.Tensor]:
    return list(args[place]) if isinstance(args[place], (list, tuple)) else [args[place]]


def trace(rank: int, config: Config, steps: int, seconds: float) -> tuple[Traffic, list[Flow]]:
    """On a rank: what it says in a step, and what it should, from the second step on: the first makes what is kept.

    config: from `titan.rehearsal.with_data`.
    """
    job = Rehearsal(rank, config, seconds)
    job.step()
    recorder = Recorder(job.mesh)
    for _ in range(steps):
        job.step(recorder.at)
    job.close()
    return recorder.traffic(steps), expected(config, job.mesh, job.parts, len(FLAGS))
