"""Offload: what a device has no room for lies in the host's memory, which is ten times larger and behind a slower link.

Two kinds, which may be had together. Of P parameters that a rank holds, and n tokens in L blocks of width d (keys k wide, the
feed-forward layer f), in bytes, with e a number's in activations:

    what                                                       off the device            over the bus
    states        parameters, gradients, AdamW's two states    16 P                      4 P down each time that weights are
                                                                                         gathered, 4 P of gradients up
    activations   what the blocks keep for the backward pass   e n L (8 d + 2 k + 4 f)   as many up, and down again

`states` is FSDP's own policy: a block's shard is copied to the device before it is gathered, its gradients' shard goes back
after they are summed, and the optimizer runs on the host's cores. Of the weights a device then holds two blocks' and the ends'.
(Under a pipeline, gathered weights and whole gradients stay until the step's end, with this as without.) It needs FSDP, which a
single rank uses for this alone.

`activations` is below. Autograd asks two hooks about each tensor that it would keep. The first has the tensor's storage copied
to the host (pinned, on a stream of its own, beside the next block's computation), once for all tensors that share it; the
second brings it back. A block's backward pass has the block before it fetched, so that it is there in time. At most two blocks'
copies are under way: then the computation waits, or the device would fill up with what is still to be copied. So a device has
at most four blocks' activations, where the backward pass begins. Weights are not copied: they are there anyway, and FSDP's
gathered ones it gathers again. With recompute, a block keeps its input alone: that is what goes, n L d numbers, and the rest is
never kept.

On a CPU the same code runs, with plain copies: it saves nothing there, and computes the same to the bit. For a GPU, host memory
is pinned, and PyTorch makes each pinned piece as large as the next power of two: up to twice the figures above.

Sources: Ren et al., "ZeRO-Offload" (arXiv:2101.06840); Rajbhandari et al., "ZeRO-Infinity" (arXiv:2104.07857).
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

LEAST_BYTES = 2**12
"""Smaller storages stay: a copy of them takes longer than it saves."""
UNDER_WAY = 2
"""Blocks whose copies to the host may be waited for later."""


@dataclass
class _Away:
    """A storage that is in the host's memory."""

    host: Tensor
    """Its bytes."""
    origin: weakref.ref[Any]
    version: int
    back: Tensor | None = None
    """Its bytes on the device again."""


@dataclass(frozen=True)
class _View:
    """What autograd keeps in a tensor's place."""

    storage: _Away
    dtype: torch.dtype
    size: torch.Size
    stride: tuple[Any, ...]
    offset: Any


class _Pass:
    """One forward pass of a block: what it keeps."""

    def __init__(self, link: Link, block: nn.Module, before: _Pass | None) -> None:
        self.link, self.block, self.before = link, block, before
        self.weights: set[int] | None = None
        self.by_address: dict[int, _Away] = {}
        self.away: list[_Away] = []
        self.fetched: Mark = (0, None)

    def pack(self, tensor: Tensor) -> _View | Tensor:
        if self.weights is None:  # asked for within the pass: by now FSDP has gathered them, or a cast has narrowed them
            self.weights = {held.untyped_storage()._cdata for weight in self.block.parameters() for held in _memory(weight)}
        if is_traceable_wrapper_subclass(tensor):  # a weight in a format of its own
            return tensor
        storage = tensor.untyped_storage()
        if tensor.device.type != self.link.device.type or storage.nbytes() < LEAST_BYTES or storage._cdata in self.weights:
            return tensor
        if storage.nbytes() % tensor.itemsize or tensor.is_conj():  # is no run of such elements
            return tensor
        found = self.by_address.get(storage._cdata)
        if found is None or found.origin() is not storage:
            whole = tensor.detach().as_strided((storage.nbytes() // tensor.itemsize,), (1,), 0)
            host = self.link.to_host(whole.view(torch.uint8))
            found = self.by_address[storage._cdata] = _Away(host, weakref.ref(storage), tensor._version)
            self.away.append(found)
        elif found.version != tensor._version:  # a copy that is under way would have had to be waited for
            raise RuntimeError("offload.activations: a block changes in place what its backward pass needs")
        return _View(found, tensor.dtype, tensor.size(), tensor.stride(), tensor.storage_offset())

    def unpack(self, kept: _View | Tensor) -> Tensor:
        if isinstance(kept, Tensor):
            return kept
        self.fetch()
        if self.before is not None:
            self.before.fetch()
            self.before = None
        self.link.wait(self.fetched)
        assert kept.storage.back is not None
        return kept.storage.back.view(kept.dtype).as_strided(kept.size, kept.stride, kept.offset)

    def fetch(self) -> None:
        """Have all of it on its way to the device, if it is not yet."""
        if self.away:
            for storage in self.away:
                storage.back = self.link.to_device(storage.host)
            self.away, self.by_address = [], {}
            self.fetched = self.link.mark()


def _memory(tensor: Tensor) -> list[Tensor]:
    """The tensor, or those that it is made of and that have its memory."""
    if not is_traceable_wrapper_subclass(tensor):
        return [tensor]
    return [getattr(tensor, name) for name in tensor.__tensor_flatten__()[0]]


Mark = tuple[int, torch.cuda.Event | None]
"""A place in the order of all copies, and what tells that they have come so far."""


class Link:
    """Copies between the device and the host; on a GPU, on a stream beside the computation."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.marks = 0
        self.under_way: deque[tuple[Mark, list[Any]]] = deque()
        self.leaving: list[Any] = []

    def to_host(self, flat: Tensor) -> Tensor:
        """A copy of a storage's bytes, uint8, complete once the link has been waited for."""
        if self.stream is None:
            return flat.clone()
        host = torch.empty(flat.shape, dtype=torch.uint8, pin_memory=True)
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            host.copy_(flat, non_blocking=True)
        self.leaving.append(flat)  # until the copy is done, nothing else may be there
        return host

    def to_device(self, host: Tensor) -> Tensor:
        if self.stream is None:
            return host.clone()
        here = torch.empty(host.shape, dtype=torch.uint8, device=self.device)
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            here.copy_(host, non_blocking=True)
        here.record_stream(self.stream)
        return here

    def mark(self) -> Mark:
        self.marks += 1
        return self.marks, None if self.stream is None else self.stream.record_event()

    def wait(self, mark: Mark) -> None:
        """What is computed from now on comes after what was copied before the mark; let go of what those copies still held."""
        number, event = mark
        if event is not None:
            torch.cuda.current_stream(self.device).wait_event(event)
        while self.under_way and self.under_way[0][0][0] <= number:
            self.under_way.popleft()

    def block_done(self) -> None:
        """A block's copies are all asked for: wait for those of the blocks before the last two."""
        self.under_way.append((self.mark(), self.leaving))
        self.leaving = []
        if len(self.under_way) > UNDER_WAY:
            self.wait(self.under_way[0][0])


def offload_activations(parts: list[list[nn.Module]], device: torch.device) -> None:
    """Have what blocks keep for their backward passes lie in the host's memory, in place.

    parts: the model's blocks in their order, or those of each pipeline stage.
    """
    link = Link(device)
    last: list[_Pass | None] = [None]
    for blocks in parts:
        for number, block in enumerate(blocks):
            block.forward = _offloaded(block, block.forward, link, last, first=number == 0)


def _offloaded(
    block: nn.Module, original: Callable[..., Any], link: Link, last: list[_Pass | None], first: bool
) -> Callable[..., Any]:
    def forward(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return original(*args, **kwargs)
        own = last[0] = _Pass(link, block, None if first else last[0])
        with torch.autograd.graph.saved_tensors_hooks(own.pack, own.unpack):
            out = original(*args, **kwargs)
        link.block_done()
        return out

    return forward
