"""What lies in a rank's memory during a step, and of what kind it is: every tensor's storage from first to last.

A dispatch mode sees each operation's results. A storage that is new is noted with its bytes, and, by a weak reference, when it
is gone; views share their storage and count once. FSDP empties and fills its gathered weights' storages in place, which is seen
as well. The kinds:

    parameters  the shards, or whole weights, that the rank owns    gathered     FSDP's whole weights of a block
    optimizer   AdamW's two states                                  activations  what forward passes made
    gradients   of the parameters                                   backward     what backward passes made, recompute's included
                                                                    buffers      all else: FSDP's messages, sums, norms

What autograd keeps is not told apart from what a forward pass drops soon: both are activations, while they are there. With
`[offload]`, what a GPU would have in the host's memory is counted there, apart: on a CPU it is the same memory.

Seen are tensors. What a kernel takes for itself while it runs, and what an allocator rounds up or holds back, is not.
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor._sharding_prop import ShardingPropagator
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from titan.batch import Batch, Micro
from titan.build import Parts
from titan.config import Config
from titan.drawing.memory import KINDS, Story
from titan.layout import local
from titan.optim import state_tensors
from titan.parallel.offload import Link
from titan.rehearsal import Rehearsal

PLAIN = (Tensor, nn.Parameter, FakeTensor)
MADE_IN = {"forward": "activations", "backward": "backward"}
FSDP_SENDS = ("_allgather_base_", "_reduce_scatter_base_")
"""On a CPU nothing else uses them (`titan.parallel.collectives`)."""


@dataclass
class _Storage:
    """A storage that is or was there. kind: of all its life, even where it is known only later."""

    kind: str
    bytes: int
    alive: Any = None
    """A weak reference, which calls when it is gone."""
    sizes: list[tuple[float, int]] = field(default_factory=list)
    """(when, bytes from then on)."""

    def resized(self, size: int) -> None:
        self.bytes = size
        self.sizes.append((time.perf_counter(), size))


class Memory(TorchDispatchMode):
    """Follows storages while it is entered, and forgets none."""

    def __init__(self) -> None:
        super().__init__()
        self.known: dict[int, _Storage] = {}
        self.all: list[_Storage] = []
        self.phase = ""
        self.phases: list[tuple[float, str]] = []
        self.looks_away = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.looks_away:
            return func(*args, **(kwargs or {}))
        if any(kind not in PLAIN for kind in types):
            return NotImplemented  # below it come the plain tensors that it is made of
        if func.namespace == "c10d" and func.overloadpacket.__name__ in FSDP_SENDS:
            for tensor in tree_iter(args):
                if type(tensor) in PLAIN and self._kind(tensor) in MADE_IN.values():
                    self.label(tensor, "buffers")
        out = func(*args, **(kwargs or {}))
        inside = torch._C._current_graph_task_id() != -1  # type: ignore[attr-defined]
        where = "backward" if inside else self.phase
        if self.phase and where != (self.phases[-1][1] if self.phases else ""):
            self.phases.append((time.perf_counter(), where))
        for tensor in tree_iter(out):
            if type(tensor) in PLAIN:
                self.label(tensor, MADE_IN.get(where, "buffers"), again=False)
        return out

    @contextmanager
    def at(self, phase: str) -> Iterator[None]:
        """What follows is in this part of the step."""
        self.phase = phase
        with self:
            yield

    def label(self, tensor: Tensor, kind: str, again: bool = True) -> None:
        """A tensor's storage is of this kind; again: also where another one was noted."""
        if tensor.device.type == "meta":
            return
        storage = tensor.untyped_storage()
        key = storage._cdata
        if (found := self.known.get(key)) is None:
            found = self.known[key] = _Storage(kind, 0)
            self.all.append(found)
            found.alive = weakref.ref(storage, lambda _: self._gone(key))
        elif again:
            found.kind = kind
        if found.bytes != storage.nbytes():
            found.resized(storage.nbytes())

    def _kind(self, tensor: Tensor) -> str:
        found = self.known.get(tensor.untyped_storage()._cdata)
        return "" if found is None else found.kind

    def _gone(self, key: int) -> None:
        self.known.pop(key).resized(0)

    @contextmanager
    def patched(self) -> Iterator[None]:
        """While FSDP's refilled storages and offload's copies are seen, which pass no dispatcher."""
        resize, to_host, to_device = torch.UntypedStorage.resize_, Link.to_host, Link.to_device
        propagate = ShardingPropagator._propagate_tensor_meta_non_cached

        def resized(storage: Any, size: int) -> Any:
            out = resize(storage, size)
            if found := self.known.get(storage._cdata):
                found.kind = "gathered"
                found.resized(storage.nbytes())
            return out

        def labelled(copy: Callable[..., Tensor], kind: str) -> Callable[..., Tensor]:
            def labelling(*args: Any) -> Tensor:
                out = copy(*args)
                self.label(out, kind)
                return out

            return labelling

        def unseen(*args: Any) -> Any:
            """DTensor finds out shapes on fake tensors as large as the whole, when an operation is new to it."""
            before, self.looks_away = self.looks_away, True
            try:
                return propagate(*args)
            finally:
                self.looks_away = before

        ShardingPropagator._propagate_tensor_meta_non_cached = unseen  # type: ignore[method-assign, assignment]
        torch.UntypedStorage.resize_ = resized  # type: ignore[method-assign, assignment]
        Link.to_host = labelled(to_host, "host")  # type: ignore[method-assign]
        Link.to_device = labelled(to_device, "activations")  # type: ignore[method-assign]
        try:
            yield
        finally:
            torch.UntypedStorage.resize_ = resize  # type: ignore[method-assign]
            ShardingPropagator._propagate_tensor_meta_non_cached = propagate  # type: ignore[method-assign]
            Link.to_host, Link.to_device = to_host, to_device  # type: ignore[method-assign]

    def story(self) -> Story:
        """What there was when, by kind."""
        changes, last = [], dict.fromkeys(KINDS, 0)
        for storage in self.all:
            size = 0
            for when, now in storage.sizes:
                changes.append((when, storage.kind, now - size))
                size = now
        points = []
        for when, kind, change in sorted(changes, key=lambda change: change[0]):
            last[kind] += change
            points.append((when, tuple(last.values())))
        begin = self.phases[0][0]
        before = [sizes for when, sizes in points if when < begin]
        during = [(when - begin, sizes) for when, sizes in points if when >= begin]
        phases = [(when - begin, name) for when, name in self.phases]
        return Story([(0.0, before[-1] if before else (0,) * len(KINDS)), *during], phases)


def watch_step(rank: int, config: Config, seconds: float) -> Story:
    """On a rank: its memory during one step, the third. config: from `titan.rehearsal.with_data`."""
    job = Rehearsal(rank, config, seconds)
    for _ in range(2):
        job.step()
    memory = Memory()
    states = config.offload.states
    label_held(memory, job.parts, states)

    @contextmanager
    def part(name: str) -> Iterator[None]:
        if name in ("gradients", "norm"):
            label_gradients(memory, job.parts, "host" if states and name == "norm" else "gradients")
        with nullcontext() if name == "batch" else memory.at(name):
            yield

    def split(batch: Batch) -> list[Micro]:
        micros = Rehearsal.split(job, batch)
        label_micros(memory, micros)
        return micros

    job.split = split  # type: ignore[method-assign]
    with memory.patched():
        job.step(part)
    job.close()
    return memory.story()


def label_micros(memory: Memory, micros: list[Micro]) -> None:
    """Micro batches on the device. The loader's batch, of which they may be views on a CPU, counts as they do."""
    for micro in micros:
        for value in vars(micro).values():
            if isinstance(value, Tensor):
                memory.label(value, "activations")


def label_held(memory: Memory, parts: Parts, on_host: bool) -> None:
    """Parameters and optimizer states, which are there before a step."""
    for name, tensor in (*parts.model.named_parameters(), *state_tensors(parts.model, parts.optimizer).items()):
        kind = "optimizer" if name.startswith("optimizer.") else "parameters"
        memory.label(local(tensor.detach()), "host" if on_host else kind)


def label_gradients(memory: Memory, parts: Parts, kind: str) -> None:
    """Of the parameters, and those that FSDP keeps whole until all micro batches have added to them."""
    for parameter in parts.model.parameters():
        if parameter.grad is not None:
            memory.label(local(parameter.grad), kind)
    for module in parts.model.modules():
        group = module._get_fsdp_state()._fsdp_param_group if isinstance(module, FSDPModule) else None
        for own in group.fsdp_params if group is not None else ():
            whole = getattr(own, "_unsharded_param", None)
            for grad in (own.unsharded_accumulated_grad, None if whole is None else whole.grad):
                if grad is not None:
                    memory.label(local(grad), "gradients")
