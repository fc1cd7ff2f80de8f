"""Which layers compute in Float8: the blocks' linear layers, less those that a config leaves out. No torch.

A layer is chosen by its size in the whole model, so that the same ones are under every plan. The embedding and the head stay as
they are, as is usual: the loss is sensitive to them.
"""

from __future__ import annotations

from titan.config import Precision
from titan.sharding import Sharding, matching, of_each_block

UNIT = 16
"""GPUs take Float8 products whose widths are multiples of this."""


def float8_layers(table: Sharding, precision: Precision) -> dict[str, tuple[int, int]]:
    """Name -> outputs and inputs, in the whole model.

    Raises ValueError where a pattern of `float8_skip` matches none.
    """
    if precision.float8 == "none":
        return {}
    found = of_each_block(table, table.matrices)
    left = {name for pattern in precision.float8_skip for name in _layers(pattern, found)}
    return {name: size for name, size in found.items() if name not in left and min(size) >= precision.float8_min_width}


def _layers(pattern: str, sizes: dict[str, tuple[int, int]]) -> list[str]:
    try:
        return matching(pattern, sizes)
    except ValueError as error:
        shown = ", ".join(list(sizes)[:8])
        raise ValueError(f"{pattern!r} matches no linear layer of the blocks; there are {shown} ..") from error
