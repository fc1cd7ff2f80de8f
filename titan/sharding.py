"""What a model says about its own shape, so that the parallel dimensions need not know it.

The table is data: dotted paths and globs of module names. One entry, `block`, serves every technique that works layer by
layer. A pattern that matches no module is an error, so that a renamed layer is noticed at start and not in the memory.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase


@dataclass(frozen=True)
class Sharding:
    """A model's table; each model folder has one in sharding.py."""

    block: str
    """Glob of the repeated blocks, such as "layers.*": the unit of FSDP."""
    core: str
    """Glob of the attention cores, such as "layers.*.attention.core": q, k, v [batch, seq, heads, head_dim] in, values out."""
    before: tuple[str, ...] = ()
    """Globs of the modules that run before the blocks and are done with then, such as the embedding."""


def matching(pattern: str, names: Iterable[str]) -> list[str]:
    """Module names that a glob matches, part by part: `layers.*` is every layer, not what is inside one.

    Raises ValueError where nothing matches.
    """
    parts = pattern.split(".")
    names = list(names)
    found = [
        name
        for name in names
        if len(name.split(".")) == len(parts) and all(fnmatchcase(n, p) for n, p in zip(name.split("."), parts, strict=True))
    ]
    if not found:
        shown = ", ".join(n for n in names if n and n.count(".") <= 1)[:300]
        raise ValueError(f"the sharding table's pattern {pattern!r} matches no module; there are {shown}")
    return found
