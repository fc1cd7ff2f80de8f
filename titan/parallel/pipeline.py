"""Pipeline parallelism: the layers are shared out, and micro batches follow one another through the ranks.

A stage is a run of blocks, the first with the embedding, the last with norm, head and loss. It hands hidden states to
the next stage and gradients to the one before; nothing else travels, once per micro batch and border:

    [micro batch, seq, width] forward, and the same backward                   in each rank's part of the sequence

What a rank does when is decided beforehand: a schedule (`schedules.py`) lists every rank's passes in order, and where its
messages go in between (`timeline.py`). This file carries such a list out, whatever schedule made it. Messages are posted
without waiting, in an order that all ranks share, and a rank waits only for what its next pass needs: no two ranks can wait
for each other.

The zero-bubble schedules part a backward pass in two: I, the gradient of the stage's input, for which the stage before waits,
and W, that of the weights, for which nobody does (`weight_gradients.py`). FSDP sums gradients over ranks once, after the last
pass.

A tied weight belongs to the first stage, which has its optimizer states. The last stage has a copy: its gradient is
handed back and added, and the new weight comes before the next step.

Sources: Huang et al., "GPipe" (arXiv:1811.06965); Narayanan et al., "Efficient large-scale training" (arXiv:2104.04473); Qi et
al., "Zero bubble pipeline parallelism" (arXiv:2401.10241).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from titan.layout import local
from titan.parallel.schedules import Table, forward_only
from titan.parallel.stages import Stages
from titan.parallel.timeline import Action, Recv, Send, program
from titan.parallel.weight_gradients import WeightGradients, at_once
from titan.sharding import Sharding

if TYPE_CHECKING:
    from titan.batch import Micro
    from titan.parallel.apply import Plan


class Pipeline:
    """Carries a schedule out over the micro batches of a step."""

    def __init__(
        self,
        stages: Stages,
        schedule: Table,
        group: dist.ProcessGroup,
        table: Sharding,
        dtype: torch.dtype,
        plan: Plan,
    ) -> None:
        """schedule: of a training step. dtype: of hidden states."""
        self.stages = stages
        self.schedule = schedule
        self.group = group
        self.rank = dist.get_rank(group)
        self.training = program(schedule.orders, schedule.owners, self.rank)
        self.width, self.vocabulary = table.width, table.vocabulary
        self.dtype = dtype
        self.plan = plan
        self.around: Callable[[Action], AbstractContextManager[object]] = lambda _: nullcontext()
        """Entered around each pass, when what it needs is there."""
        self.isend: Callable[..., dist.Work | None] = dist.isend
        stages.logits = self.logits
        self.forward_programs: dict[int, list[Action | Send | Recv]] = {}
        if stages.last in stages.stages:
            at_once(stages.stages[stages.last].get_submodule(table.loss))

    def train(self, micros: list[Micro], valid_tokens: int, step: int) -> Tensor:
        """Forward and backward of all; this rank's summed loss over valid_tokens, 0 where another rank has the last stage."""
        self.plan.sync.hold()
        return _Run(self, micros, valid_tokens, step).carry_out(self.training)

    def evaluate(self, micros: list[Micro]) -> Tensor:
        """The summed loss, without gradients."""
        owners, count = self.schedule.owners, len(micros)
        if count not in self.forward_programs:
            self.forward_programs[count] = program(forward_only(owners, count), owners, self.rank)
        return _Run(self, micros, 1, 0).carry_out(self.forward_programs[count])

    def logits(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """Forward passes of the stages in turn; the last one's logits go to all. Only while sequences are not cut."""
        owners = self.schedule.owners
        h = tokens
        for number, owner in enumerate(owners):
            if owner != self.rank:
                continue
            if number and owners[number - 1] != self.rank:
                h = tokens.new_empty((*tokens.shape, self.width), dtype=self.dtype)
                dist.recv(h, group=self.group, group_src=owners[number - 1])
            h = self.stages.stages[number](h if number else tokens, positions=positions)
            if number + 1 < len(owners) and owners[number + 1] != self.rank:
                dist.send(h.contiguous(), group=self.group, group_dst=owners[number + 1])
        if self.rank != owners[-1]:
            h = tokens.new_empty((*tokens.shape, self.vocabulary), dtype=self.dtype)
        h = h.contiguous()
        dist.broadcast(h, group=self.group, group_src=owners[-1])
        return h


Key = tuple[str, int, int]
"""What a pass needs from another stage: F or B, the stage that needs it, micro batch."""


class _Run:
    """One step of a pipeline, as far as this rank goes."""

    def __init__(self, pipeline: Pipeline, micros: list[Micro], valid_tokens: int, step: int) -> None:
        self.pipeline = pipeline
        self.micros = micros
        self.valid_tokens = valid_tokens
        self.step = step
        self.loss = torch.zeros((), device=micros[0].tokens.device)
        self.arrived: dict[Key, Tensor] = {}
        self.coming: dict[Key, tuple[Tensor, dist.Work]] = {}
        self.leaving: list[tuple[Tensor, dist.Work]] = []
        self.passes: dict[tuple[int, int], tuple[Tensor, GradientEdge]] = {}
        """Stage and micro batch -> input of its forward pass, and where the backward pass starts; the output may go."""
        self.weights: dict[tuple[int, int], WeightGradients] = {}

    def carry_out(self, program: list[Action | Send | Recv]) -> Tensor:
        split = {(item.stage, item.micro) for item in program if isinstance(item, Action) and item.kind == "I"}
        self.weights = {place: WeightGradients() for place in split}
        for item in program:
            if isinstance(item, Send):
                self._send(self.arrived.pop(_made(item.action)), item.peer)
            elif isinstance(item, Recv):
                self._receive(_made(item.action), item.peer)
            else:
                self._await(item)
                with self.pipeline.around(item):
                    self._act(item)
        for _, work in self.leaving:
            work.wait()
        return self.loss

    def _act(self, action: Action) -> None:
        if action.kind == "F":
            self._forward(action.stage, action.micro)
        elif action.kind == "W":
            self.weights.pop((action.stage, action.micro)).run()
            self.pipeline.plan.sync.settle()
        else:
            self._backward(action.stage, action.micro)

    def _forward(self, number: int, m: int) -> None:
        pipeline, micro = self.pipeline, self.micros[m]
        last = number == pipeline.stages.last
        x = micro.tokens if number == 0 else self.arrived.pop(("F", number, m)).requires_grad_(torch.is_grad_enabled())
        labels = {"labels": micro.labels} if last else {}
        with pipeline.plan.noise.at(self.step, micro.rows, micro.offsets), self.weights.get((number, m), nullcontext()):
            out = pipeline.stages.stages[number](x, positions=micro.positions, document_ids=micro.documents, **labels)
        if last:
            out = out / self.valid_tokens
            self.loss += out.detach()
        else:
            self.arrived["F", number + 1, m] = out.detach()
        if torch.is_grad_enabled():
            # An edge, also since of a tensor PyTorch would ask the mode below what to do, and recompute outside of it.
            self.passes[number, m] = (x, get_gradient_edge(out))

    def _backward(self, number: int, m: int) -> None:
        x, edge = self.passes.pop((number, m))
        gradient = None if number == self.pipeline.stages.last else self.arrived.pop(("B", number, m))
        with self.weights.get((number, m), nullcontext()):
            torch.autograd.backward(edge, gradient)
        if number > 0:
            assert x.grad is not None
            self.arrived["B", number - 1, m] = x.grad

    def _await(self, action: Action) -> None:
        """Return when what a pass needs of another rank is there."""
        key = ("F" if action.kind == "F" else "B", action.stage, action.micro)
        if action.kind != "W" and key in self.coming:
            tensor, work = self.coming.pop(key)
            work.wait()
            self.arrived[key] = tensor

    def _receive(self, key: Key, source: int) -> None:
        pipeline, micro = self.pipeline, self.micros[key[2]]
        batch, seq = micro.tokens.shape
        shape = (batch, seq // pipeline.plan.sequence_degree, pipeline.width)
        buffer = torch.empty(shape, dtype=pipeline.dtype, device=micro.tokens.device)
        work = dist.irecv(buffer, group=pipeline.group, group_src=source)
        assert work is not None
        self.coming[key] = (buffer, work)

    def _send(self, tensor: Tensor, to: int) -> None:
        self.leaving = [(kept, work) for kept, work in self.leaving if not work.is_completed()]
        tensor = tensor.contiguous()
        work = self.pipeline.isend(tensor, group=self.pipeline.group, group_dst=to)
        assert work is not None
        self.leaving.append((tensor, work))


def _made(action: Action) -> Key:
    """What an action makes, by who needs it."""
    return ("F", action.stage + 1, action.micro) if action.kind == "F" else ("B", action.stage - 1, action.micro)


class TiedWeight:
    """A weight of the first stage whose copy the last stage uses. Shards of equal place in both are handed over."""

    def __init__(self, stages: Stages, owners: Sequence[int], group: dist.ProcessGroup) -> None:
        self.stages, self.group = stages, group
        self.first, self.last = owners[0], owners[-1]
        self.rank = dist.get_rank(group)

    def copy_weight(self) -> None:
        """The copy becomes what the weight is."""
        weight, copy = (None if p is None else local(p).detach() for p in self._pair())
        if weight is not None and copy is not None:
            copy.copy_(weight)
        elif weight is not None:
            dist.send(weight.contiguous(), group=self.group, group_dst=self.last)
        elif copy is not None:
            received = torch.empty_like(copy)
            dist.recv(received, group=self.group, group_src=self.first)
            copy.copy_(received)

    def add_gradient(self) -> None:
        """The copy's gradient is added to the weight's, and forgotten."""
        weight, copy = self._pair()
        if weight is not None:
            assert weight.grad is not None
            total = local(weight.grad)
            if copy is not None:
                assert copy.grad is not None
                received = local(copy.grad)
            else:
                received = torch.empty_like(total)
                dist.recv(received, group=self.group, group_src=self.last)
            total += received
        elif copy is not None:
            assert copy.grad is not None
            dist.send(local(copy.grad).contiguous(), group=self.group, group_dst=self.first)
        if copy is not None:
            copy.grad = None

    def _pair(self) -> tuple[nn.Parameter | None, nn.Parameter | None]:
        """The weight and the copy, where this rank has them. Looked up each time: FSDP swaps parameters."""
        name, stages = self.stages.copy_name, self.stages.stages
        weight = stages[0].get_parameter(name) if 0 in stages else None
        return weight, stages[self.stages.last].get_parameter(name) if self.stages.last in stages else None
