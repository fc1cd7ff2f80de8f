"""Data parallelism: every rank takes its own samples, and the ranks' gradients are added.

Three ways, one meaning. With R replicas of S shards and P parameters, in elements that a rank sends:

    replicate  (S = 1)  each rank holds all P; all-reduce of the gradients, once a step                      2 P (R-1)/R
    shard      (R = 1)  each rank holds P/S; all-gather of a block's weights before its forward and again before its
                        backward, reduce-scatter of its gradients after it (FSDP2), per micro batch          3 P (S-1)/S
    both       (HSDP)   shards inside; and over the replicas, once a step, an all-reduce of P/S              2 P/S (R-1)/R

What runs last (norm and head) is gathered once, not twice: its backward comes at once.

Nothing is averaged: the loss is already divided by the valid tokens of the whole batch, so gradients are summed. FSDP would
divide by the number of ranks; its divide factor is set to 1.

With accumulation, FSDP reduces after every micro batch, which keeps one shard of gradients instead of all of them; the
all-reduce over replicas waits for the last.

Sources: Li et al., "PyTorch Distributed" (arXiv:2006.15704) for buckets; Zhao et al., "PyTorch FSDP" (arXiv:2304.11277).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard

BUCKET_BYTES = 25 * 2**20


class GradientSync:
    """Called around the micro batches of a step: `begin` before each, `finish` after the last. One rank has nothing to do."""

    def begin(self, last: bool) -> None:
        """A micro batch starts; `last` says that its gradients complete the step's."""

    def hold(self) -> None:
        """Instead of `begin`, where passes of many micro batches mix, as in a pipeline: nothing travels before `finish`."""

    def settle(self) -> None:
        """Held gradients were added to by hand: have them kept in the format in which they add up."""

    def finish(self) -> None:
        """Return when every gradient is the sum over the ranks."""

    def release(self) -> None:
        """A forward pass ended that no backward pass follows: parameters are what this rank holds, as between steps."""


class Sharded(GradientSync):
    """FSDP2 does the work in hooks of its own; only the all-reduce over replicas has to know the last micro batch.

    Held, it keeps each parameter's whole gradient until the end, and sums once.
    """

    def __init__(self, roots: list[FSDPModule], reduce: torch.dtype) -> None:
        """roots: the model, or the stages of it that this rank holds, from `shard`."""
        self.roots = roots
        self.exact = reduce == torch.float32
        self.held = False

    def begin(self, last: bool) -> None:
        for root in self.roots:  # FSDP holds what waits for the replicas in `reduce`: only float32 may accumulate there
            root.set_requires_all_reduce(last or not self.exact)

    def hold(self) -> None:
        self.held = True
        self._now(False)

    def finish(self) -> None:
        if not self.held:
            return
        self._now(True)
        self.settle()
        self.held = False

    def settle(self) -> None:
        for root in self.roots:
            # What FSDP does at the end of every backward pass; there is no public name for doing it later.
            fully_shard.state(root)._root_post_backward_final_callback()  # type: ignore[attr-defined]

    def _now(self, wanted: bool) -> None:
        for root in self.roots:
            root.set_is_last_backward(wanted)
            root.set_requires_gradient_sync(wanted)
            root.set_reshard_after_backward(wanted)

    def release(self) -> None:
        for root in self.roots:
            assert isinstance(root, nn.Module)
            for module in root.modules():
                if isinstance(module, FSDPModule):
                    module.reshard()  # the root keeps its gathered weights for the backward pass


def shard(
    units: list[nn.Module],
    mesh: DeviceMesh,
    param: torch.dtype,
    reduce: torch.dtype,
    reshard: bool | int = True,
    offload: bool = False,
) -> FSDPModule:
    """FSDP2 over a mesh [shard], or HSDP over [replicate, shard], in place.

    units: modules that gather and free their weights together, in the order they run, the whole model last. Weights are
    gathered and computed in `param`, gradients summed in `reduce`; the shards stay in the parameters' own dtype. reshard:
    whether a unit frees its weights between forward and backward; a number: keeps a copy within so many ranks. offload: shards,
    their gradients and so the optimizer's states lie in the host's memory.
    """
    # Inputs are not cast: the embedding already gives `param`, and the rotary tables are meant to stay float32.
    policy = MixedPrecisionPolicy(param_dtype=param, reduce_dtype=reduce, cast_forward_inputs=False)
    home = CPUOffloadPolicy(pin_memory=mesh.device_type == "cuda") if offload else OffloadPolicy()
    for unit in units:
        # What runs last frees nothing: its backward pass comes at once.
        after = reshard if unit is not units[-1] else None
        fully_shard(unit, mesh=mesh, mp_policy=policy, reshard_after_forward=after, offload_policy=home)
        assert isinstance(unit, FSDPModule)
        unit.set_gradient_divide_factor(1.0)
        unit.set_force_sum_reduction_for_comms(True)  # gloo has no pre-multiplied sum
    root = units[-1]
    assert isinstance(root, FSDPModule)
    return root


@dataclass
class Bucket:
    """Parameters whose gradients travel as one flat message, and the message once it is under way."""

    parameters: list[nn.Parameter]
    missing: int = 0
    flat: Tensor | None = None
    work: list[dist.Work] = field(default_factory=list)


class Replicated(GradientSync):
    """All-reduce of the gradients in buckets, each sent as soon as the backward pass has filled it.

    The backward pass reaches the last parameters first, so buckets are filled from the end, and their sums travel while the
    earlier layers still compute.
    """

    def __init__(self, parameters: Callable[[], list[nn.Parameter]], group: dist.ProcessGroup, reduce: torch.dtype) -> None:
        """parameters: asked for at the first step, since materialising a model replaces its parameters."""
        self.parameters = parameters
        self.group = group
        self.reduce = reduce
        self.last = False
        self.buckets: list[Bucket] = []

    def begin(self, last: bool) -> None:
        if not self.buckets:
            self._fill_buckets()
        self.last = last
        for bucket in self.buckets:
            bucket.missing = len(bucket.parameters)

    def hold(self) -> None:
        self.begin(last=False)

    def finish(self) -> None:
        if not self.last:
            for bucket in self.buckets:
                self._send(bucket)
        for bucket in self.buckets:
            assert bucket.flat is not None, "a parameter got no gradient, so its bucket was never sent"
            for work in bucket.work:
                work.wait()
            grads = [p.grad for p in bucket.parameters if p.grad is not None]
            sums = bucket.flat.split([g.numel() for g in grads])
            for grad, total in zip(grads, sums, strict=True):
                grad.copy_(total.view_as(grad))
            bucket.flat, bucket.work = None, []

    def _fill_buckets(self) -> None:
        room = 0
        for parameter in reversed(self.parameters()):
            size = parameter.numel() * self.reduce.itemsize
            if size > room:
                self.buckets.append(Bucket([]))
                room = BUCKET_BYTES
            room -= size
            bucket = self.buckets[-1]
            bucket.parameters.append(parameter)
            parameter.register_post_accumulate_grad_hook(lambda _, bucket=bucket: self._ready(bucket))  # type: ignore[misc]

    def _ready(self, bucket: Bucket) -> None:
        bucket.missing -= 1
        if self.last and bucket.missing == 0:
            self._send(bucket)

    def _send(self, bucket: Bucket) -> None:
        bucket.flat = torch.cat([p.grad.flatten().to(self.reduce) for p in bucket.parameters if p.grad is not None])
        work = dist.all_reduce(bucket.flat, group=self.group, async_op=True)
        bucket.work = [work] if work is not None else []
