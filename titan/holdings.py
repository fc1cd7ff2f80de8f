"""Which part of each parameter a rank holds, of any number of ranks: the real code in a world that is not there.

PyTorch has a process group whose collectives do nothing. In it this process can be any rank of any world: the model is cut by
the same code as in training, on the meta device, where tensors have shapes and no memory. Nothing is computed.
"""

from __future__ import annotations

from math import prod
from typing import NamedTuple

import torch
from torch import nn

from titan.build import cut
from titan.config import Config
from titan.drawing.shards import ranges
from titan.dryrun.world import pretended
from titan.layout import Cuts, block
from titan.sharding import Sharding


class Held(NamedTuple):
    """A rank's part of a parameter: a rectangle that begins at `offset` in `shape`."""

    shape: tuple[int, ...]
    offset: tuple[int, ...]
    size: tuple[int, ...]


def holdings(config: Config, rank: int, world: int) -> dict[str, Held]:
    """Parameter name -> this rank's part of it; parameters of other pipeline stages are not there."""
    with pretended(config, rank, world) as mesh:
        _, plan, _ = cut(config, torch.device("cpu"), mesh)
        return parts_of(plan.model, plan.cuts)


def parts_of(model: nn.Module, cuts: Cuts) -> dict[str, Held]:
    """Of a model that is cut already."""
    found = {name: block(parameter, cuts.get(name)) for name, parameter in model.named_parameters()}
    return {name: Held(tuple(b.shape), tuple(b.offset), tuple(b.local.shape)) for name, b in found.items()}


def in_words(held: dict[str, Held], table: Sharding) -> str:
    """Which of the model's modules these are: embedding, layers 0-3."""
    blocks = table.block.split(".")[0]
    numbers = sorted({int(name.split(".")[1]) for name in held if name.startswith(f"{blocks}.")})
    tops = list(dict.fromkeys(name.split(".")[0] for name in held))
    names = [top for top in tops if top in table.before]
    names += [f"{blocks} {ranges(numbers)}"] if numbers else []
    return ", ".join(names + [top for top in tops if top not in table.before and top != blocks])


def share(held: dict[str, Held]) -> tuple[int, int]:
    """How many parameters a rank holds, and how many there are in all that it holds a part of."""
    return sum(prod(part.size) for part in held.values()), sum(prod(part.shape) for part in held.values())
