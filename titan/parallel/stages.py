"""A pipeline's stages: which blocks each has, and the part of the model that a rank holds.

A step lasts as long as its slowest stage, so blocks are shared out by what they cost: multiplications per token, the
embedding's counted with the first stage and the head's with the last, where a large vocabulary weighs several blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from functools import cache
from typing import Any

from torch import Tensor, nn

from titan.sharding import Sharding, matching


def shares(costs: Sequence[float], parts: int) -> list[int]:
    """How many of a row of items each of `parts` runs gets, at least one, so that the dearest run is as cheap as can be.

    Of several ways the one with the least sum of squares, which keeps the other runs even.
    """

    @cache
    def best(begin: int, left: int) -> tuple[float, float, tuple[int, ...]]:
        if left == 1:
            cost = sum(costs[begin:])
            return cost, cost**2, (len(costs) - begin,)
        found = []
        for count in range(1, len(costs) - begin - left + 2):
            cost = sum(costs[begin : begin + count])
            rest_most, rest_squares, rest = best(begin + count, left - 1)
            found.append((max(cost, rest_most), cost**2 + rest_squares, (count, *rest)))
        return min(found)

    return list(best(0, parts)[2])


def block_costs(whole: nn.Module, table: Sharding, seq_len: int) -> list[float]:
    """Each block's multiplications per token, the embedding's counted with the first and the head's with the last.

    Weights of matrices once, and attention seq_len x width (queries with keys, shares with values, over half of the sequence).
    """
    modules = dict(whole.named_modules())
    costs = [_matrices(modules[name]) + seq_len * table.width for name in matching(table.block, modules)]
    costs[0] += table.width * len(table.before)  # rows that are looked up and added
    costs[-1] += sum(_matrices(modules[name]) for name in (*table.after, table.tied) if name)
    return costs


def _matrices(module: nn.Module) -> float:
    return sum(parameter.numel() for parameter in module.parameters() if parameter.dim() > 1)


def split(whole: nn.Module, table: Sharding, sizes: Sequence[int], mine: Sequence[int]) -> Stages:
    """The stages of these numbers, out of a model on the meta device; sizes: blocks of every stage."""
    return Stages({stage: _stage(whole, table, sizes, stage) for stage in mine}, len(sizes), table)


def _stage(whole: nn.Module, table: Sharding, sizes: Sequence[int], number: int) -> nn.Module:
    begin, last = sum(sizes[:number]), number == len(sizes) - 1
    modules = dict(whole.named_modules())
    blocks = matching(table.block, modules)
    others = set(blocks) - set(blocks[begin : begin + sizes[number]])
    stage = deepcopy(whole, {id(modules[name]): None for name in others})
    for name in others:
        parent, _, own = name.rpartition(".")
        delattr(stage.get_submodule(parent), own)
    empty = [name for name in table.before if number > 0 and not (last and name == table.tied)]
    for name in empty + list(table.after if not last else ()):
        setattr(stage, name, None)
    return stage


class Stages(nn.ModuleList):
    """The stages that a rank holds. Modules and parameters go by their names in the whole model; a tied copy is left out."""

    def __init__(self, stages: dict[int, nn.Module], count: int, table: Sharding) -> None:
        super().__init__(stages.values())
        self.stages = stages
        self.last = count - 1
        self.copy_name = f"{table.tied}.weight" if table.tied and count > 1 else ""

    def named_modules(
        self, memo: Any = None, prefix: str = "", remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Module]]:
        yield prefix, self
        for stage in self:
            for name, module in stage.named_modules(memo, prefix, remove_duplicate):
                if name != prefix:
                    yield name, module

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]:
        for number, stage in self.stages.items():
            for name, parameter in stage.named_parameters(prefix, recurse, remove_duplicate):
                if not (number == self.last and name == self.copy_name):
                    yield name, parameter

    def forward(self, tokens: Tensor, *, positions: Tensor) -> Tensor:
        """Logits of whole sequences, on every rank of the pipeline."""
        return self.logits(tokens, positions)

    logits: Callable[[Tensor, Tensor], Tensor]
    """Set by the Pipeline, which knows where the other stages are."""
