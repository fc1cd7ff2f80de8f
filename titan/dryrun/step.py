"""One step of one rank in a world that is not there: what would lie in its memory when, and what it would send.

Nothing here knows how training works: `titan.rehearsal` takes the step, `titan.memory` follows every storage, `titan.tracing`
every message, as on real ranks. Values matter to none of them. The batch has one document in each sequence.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from titan.batch import Batch, Micro
from titan.build import Parts
from titan.config import Compile, Config
from titan.drawing.memory import Story
from titan.dryrun.work import Span, Work
from titan.dryrun.world import build_without_memory, pretended, shapes_alone
from titan.memory import Memory, label_gradients, label_held, label_micros
from titan.parallel.data import Sharded
from titan.parallel.pipeline import Pipeline
from titan.ranks import Ranks
from titan.rehearsal import Steps
from titan.tracing import Recorder, Traffic

ON_THE_HOST = ("count", "batch")
"""Parts of a step that look at values: they are done with real, small tensors."""


class Seen(NamedTuple):
    """Of a rank's step."""

    memory: Story
    traffic: Traffic
    work: list[Span]
    """Parts of the step and passes, in the order in which they are done."""


def dry_step(config: Config, rank: int, world: int, gpus_per_node: int = 8) -> Seen:
    """Take a step as a rank, the second or a later one: what is made once is there.

    Raises ValueError where it cannot be built. Compiled blocks run as they are: what the compiler saves is not known here.
    """
    config = replace(config, compile=Compile())
    with pretended(config, rank, world) as mesh:
        nothing, memory, recorder = shapes_alone(), Memory(), Recorder(mesh)
        work = Work(memory, recorder, gpus_per_node)
        parts = build_without_memory(config, mesh, nothing)
        as_in_a_later_step(parts, nothing)
        label_held(memory, parts, config.offload.states)

        @contextmanager
        def part(name: str) -> Iterator[None]:
            if name in ON_THE_HOST:
                with recorder.at(name), work.at(name):
                    yield
                return
            if name in ("gradients", "norm"):
                label_gradients(memory, parts, "host" if config.offload.states and name == "norm" else "gradients")
            with nothing, memory.at(name), recorder.at(name), work.at(name):
                yield

        parts.step.passes.around = work.at  # type: ignore[attr-defined]
        with memory.patched(), work.patched(), without_gc():
            steps = DrySteps(config, Ranks(rank, world, torch.device("cpu")), parts, nothing, memory)
            steps.take(batch_of(config, mesh.data_degree), part)
        return Seen(memory.story(), recorder.traffic(1), [span for span in work.spans if span.items])


@contextmanager
def without_gc() -> Iterator[None]:
    """As in training, which collects garbage between steps; it takes a sixth of a dry step's time, too."""
    before = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if before:
            gc.enable()


class _Sent(dist.Work):
    """A message that has left, as one soon has; PyTorch's pretended ones never do, and would be kept until the step's end."""

    def wait(self, timeout: Any = None) -> bool:
        return True

    def is_completed(self) -> bool:
        return True


def as_in_a_later_step(parts: Parts, nothing: FakeTensorMode) -> None:
    """What the first step makes once is made: FSDP pads shards of uneven parameters. And messages arrive."""
    if isinstance(parts.step.plan.sync, Sharded):
        with nothing:
            for root in parts.step.plan.sync.roots:
                root._get_fsdp_state()._lazy_init()
    if isinstance(parts.step.passes, Pipeline):
        isend = parts.step.passes.isend

        def sent(*args: Any, **kwargs: Any) -> dist.Work:
            isend(*args, **kwargs)
            return _Sent()

        parts.step.passes.isend = sent


class DrySteps(Steps):
    """Steps whose micro batches, cut with their values, have none afterwards."""

    def __init__(self, config: Config, ranks: Ranks, parts: Parts, nothing: FakeTensorMode, memory: Memory) -> None:
        super().__init__(config, ranks, parts)
        self.nothing, self.memory = nothing, memory

    def split(self, batch: Batch) -> list[Micro]:
        found = []
        for micro in super().split(batch):
            tensors = {name: value for name, value in vars(micro).items() if isinstance(value, Tensor)}
            without: dict[str, Any] = {name: self.nothing.from_tensor(value) for name, value in tensors.items()}
            found.append(replace(micro, **without))
        label_micros(self.memory, found)
        return found


def batch_of(config: Config, data_degree: int) -> Batch:
    """A rank's part of a global batch, as the loader gives it: every label counts, a document a sequence."""
    shape = (config.training.global_batch_size // data_degree, config.training.seq_len)
    batch = {"tokens": torch.zeros(shape, dtype=torch.int64), "labels": torch.zeros(shape, dtype=torch.int64)}
    if config.data.document_mask:
        batch["document_ids"] = torch.zeros(shape, dtype=torch.int64)
        batch["positions"] = torch.arange(shape[1]).expand(shape).contiguous()
    return batch
